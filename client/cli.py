"""`fedrad-site`: what a hospital runs.

Enrol, import data, look at and approve studies, keep the agent up, write a report with a release. Heavy
libraries load inside the commands; the environment is read only here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client import doctor_cli, enrolment_cli
from client.base_cli import base_app
from client.data.cli import app as data_app
from client.evaluate_cli import evaluate_command
from client.pacs_cli import pacs_app
from client.release_cli import access_app, model_app
from client.serving_cli import mount as mount_serving
from common.terminal import answer, bars, run_program

if TYPE_CHECKING:
    from client.home import SiteHome

app = typer.Typer(help="A hospital's side of FedRad.", no_args_is_help=True)
study_app = typer.Typer(help="Studies offered to this site.", no_args_is_help=True)
enrolment_cli.mount(app)
doctor_cli.mount(app)
app.add_typer(study_app, name="study")
app.add_typer(data_app, name="data")
app.add_typer(base_app, name="base")
app.command("evaluate")(evaluate_command)
app.add_typer(model_app, name="model")
app.add_typer(access_app, name="access")
app.add_typer(pacs_app, name="pacs")
mount_serving(app)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[
    Path,
    typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory."),
]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="Study id or the start of its hash.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()


@app.callback()
def site() -> None:
    """A hospital's side of FedRad; images, reports and keys stay here."""


@study_app.command("receive")
def study_receive(
    manifest: Annotated[Path, typer.Argument(help="study.json; operator.sig must lie beside it.")],
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Take in a study that the operator signed; it runs only after approve."""
    from client.home import open_home, receive_study
    from common.errors import ManifestInvalid

    try:
        encoded = manifest.read_bytes()
        signature = bytes.fromhex((manifest.parent / "operator.sig").read_text().strip())
    except (OSError, ValueError) as error:
        raise ManifestInvalid(f"{manifest}: expected study.json and operator.sig beside it") from error
    study = receive_study(open_home(home), encoded, signature)
    answer(
        {"study": study.sha256, "id": study.study.id},
        as_json=as_json,
        text=lambda: f"received {study.study.id} {study.sha256}; look at it, then approve or refuse it",
    )


@study_app.command("show")
def study_show(
    study: Annotated[str | None, typer.Argument(help="Study id or hash; all where left out.")] = None,
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Say what a study may do with this site's data, in words."""
    from client.home import find_study, list_studies, open_home, read_study
    from common.config import describe

    opened = open_home(home)
    hashes = [find_study(opened, study)] if study else list_studies(opened)
    values = [_status(opened, sha) | {"allows": describe(read_study(opened, sha))} for sha in hashes]

    def text() -> str:
        blocks = []
        for value in values:
            lines = [f"{value['id']}  {value['study']}  [{value['state']}]"]
            lines += [f"  {name}: {words}" for name, words in value["allows"].items()]
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks) or "no study received"

    answer(values, as_json=as_json, text=text)


@study_app.command("approve")
def study_approve(study: StudyArgument, home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """Sign a study's hash: from now on the agent serves it."""
    from client.enrolment_cli import open_with_credentials
    from client.home import approve_study, find_study

    opened = open_with_credentials(home)
    sha256 = find_study(opened, study)
    approval = approve_study(opened, sha256).hex()
    value = _status(opened, sha256) | {"approval": approval, "site": opened.site}
    answer(value, as_json=as_json, text=lambda: f"approved {sha256}\napproval {approval}")


@study_app.command("refuse")
def study_refuse(
    study: StudyArgument,
    reason: Annotated[str, typer.Option(help="Kept at this site.")] = "",
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Refuse a study, or withdraw an approval; the agent stops serving it at once."""
    from client.home import find_study, open_home, refuse_study

    opened = open_home(home)
    sha256 = find_study(opened, study)
    refuse_study(opened, sha256, reason)
    answer(_status(opened, sha256), as_json=as_json, text=lambda: f"refused {sha256}")


@app.command()
def budget(home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """Show the privacy spent, committed and left, by study and in total; the agent may be running."""
    from dataclasses import asdict

    from client.budget import BudgetLimits, read_summary
    from client.home import open_home

    opened = open_home(home)
    summary = read_summary(opened.budget_path, BudgetLimits(epsilon=opened.epsilon, delta=opened.delta))
    value = asdict(summary) | {"epsilon_left": summary.epsilon_left}

    def text() -> str:
        lines = [f"{'study':<14}{'state':<8}{'rounds':>12}{'ε spent':>10}{'committed':>11}{'left':>8}"]
        for one in summary.studies:
            lines.append(
                f"{one.study[:12]:<14}{'open' if one.open else 'ended':<8}"
                f"{f'{one.charges}/{one.charges_committed}':>12}{one.epsilon_spent:>10.3f}"
                f"{one.epsilon_committed:>11.3f}{one.epsilon_left:>8.3f}"
            )
        lines.append(
            f"all studies, at δ = {summary.limits.delta:.1e}: spent ε {summary.epsilon_spent:.3f}, committed "
            f"{summary.epsilon_committed:.3f}, allowed {summary.limits.epsilon:.3f}, "
            f"left {summary.epsilon_left:.3f}"
        )
        return "\n".join(lines)

    answer(value, as_json=as_json, text=text)


@app.command("agent")
def run_agent(
    home: Home = _DEFAULT_HOME,
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Unix socket; default HOME/run/agent.sock.")
    ] = None,
    socket_group: Annotated[
        str | None,
        typer.Option(
            "--socket-group", help="Group of the SuperNode's user, which may connect; default none."
        ),
    ] = None,
) -> None:
    """Run the site agent alone until it is told to stop (Ctrl-C or SIGTERM); `up` runs all of the site.

    It also ends when its keys change, so that whoever keeps it up starts it with the new ones.
    """
    import logging
    import signal
    import threading

    _one_thread()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from client.agent import SiteAgent
    from client.enrolment_cli import open_with_credentials
    from client.heartbeat import AGENT_NAME, beat_until
    from client.metrics import LOG_NAME
    from client.models import verify_unwritable
    from client.service import ProgressBoard, start_service
    from client.socket_guard import group_id
    from common.errors import BaseWritable
    from common.logs import start_json_log

    opened = open_with_credentials(home)
    start_json_log(home / LOG_NAME)
    group = group_id(socket_group) if socket_group else None
    try:
        verify_unwritable(opened.bases.values(), relay_group=group)
    except BaseWritable as error:
        if group is not None:
            raise
        logging.getLogger("fedrad.agent").warning("%s: %s", error.code, error)
    board = ProgressBoard()
    path = socket or home / "run" / "agent.sock"
    agent = SiteAgent(opened, report=board.post)
    service = start_service(agent, board, path, version=_version(), group=group)
    logging.getLogger("fedrad.agent").info("agent of site %s listens on %s", opened.site, path)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    keys = (opened.key_path, opened.witness_key_path)
    if beat_until(stop, path=home / "run" / AGENT_NAME, keys=keys):
        logging.getLogger("fedrad.agent").warning("the keys of this site have changed")
    service.stop(grace=5.0).wait()


@app.command()
def report(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A frontal chest radiograph.")],
    release: Annotated[Path, typer.Option("--release", help="Release directory.")],
    indication: Annotated[str, typer.Option(help="Why the study was made.")] = "",
    base: Annotated[Path | None, typer.Option("--base", help="Base model directory, if not tiny.")] = None,
    operator_key: Annotated[
        str | None, typer.Option("--operator-key", help="Whose release it must be; default: this site's.")
    ] = None,
    home: Home = _DEFAULT_HOME,
    allow_unprotected: Annotated[
        bool, typer.Option(help="Run a release that has no differential privacy.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the findings of one image with a release, on this machine."""
    import sys

    _one_thread()
    data = None
    if (home / "site.json").is_file():
        from client.home import open_home

        opened = open_home(home)
        operator_key, data = operator_key or opened.operator_key, opened.data
    if operator_key is None:
        print("warning: no --operator-key and no enrolled --home: who signed is not checked", file=sys.stderr)
    from client.drafting import draft_findings

    with bars():
        value = draft_findings(
            image,
            release=release,
            indication=indication,
            base=base,
            operator_key=operator_key,
            allow_unprotected=allow_unprotected,
            data=data,
        )
    answer(value, as_json=as_json, text=lambda: str(value["findings"]))


def _status(home: SiteHome, sha256: str) -> dict[str, Any]:
    from client.home import read_approved_study, read_study
    from common.errors import StudyNotApproved

    study = read_study(home, sha256)
    try:
        read_approved_study(home, sha256)
        state = "approved"
    except StudyNotApproved:
        refused = (home.study_directory(sha256) / "refusal.json").is_file()
        state = "refused" if refused else "not approved yet"
    return {"id": study.study.id, "study": sha256, "state": state}


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedrad")
    except PackageNotFoundError:
        return "source"


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
