"""`fedrad-server study submit|list|approval`: a manifest's way from the operator to a running study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.terminal import answer
from server.enrolment_cli import DEFAULT_HOME, Home, credentials_directory

if TYPE_CHECKING:
    from server.consortium import ServerHome
    from server.submission import Submitted

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Study id or the start of its hash.")]


def mount(study_app: typer.Typer) -> None:
    """Add the commands to `fedrad-server study`."""
    study_app.command("submit")(submit)
    study_app.command("list")(list_studies)
    study_app.command("approval")(approval)


def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="study.toml")],
    home: Home = DEFAULT_HOME,
    base: Annotated[Path | None, typer.Option("--base", help="Base model directory, if not tiny.")] = None,
    public: Annotated[
        Path | None, typer.Option("--public", help="Prepared public pairs for the acceptance test.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pin the enrolled sites' keys, sign, and offer the study; it starts when every site has approved."""
    from common.config import parse_study_toml
    from common.errors import ManifestInvalid
    from common.model.tiny import known_base
    from server.submission import submit_study

    try:
        text = study.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestInvalid(f"{study}: expected a study manifest, got none") from error
    name = parse_study_toml(text, source=str(study)).base.name
    directory = known_base(name, base)
    if directory is None:
        raise ManifestInvalid(f"--base: expected the directory of base {name!r}, got none")
    submitted = submit_study(_open(home), text, source=str(study), base=directory, public=public)
    value = _value(submitted)
    answer(
        value,
        as_json=as_json,
        text=lambda: (
            f"signed {value['study']}\noffered to {', '.join(submitted.study.site_ids)}; "
            f"or send them {submitted.directory}/study.json and operator.sig"
        ),
    )


def list_studies(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """List the submitted studies: state as `up` last said it, and which sites have not approved."""
    from server.submission import broken_studies, submitted_studies

    opened = _open(home)
    running = _said_by_up(opened)
    values = [{**_value(one), **running.get(one.study.sha256, {})} for one in submitted_studies(opened)]
    values += [{"id": name, "error": reason} for name, reason in broken_studies(opened).items()]

    def text() -> str:
        lines = []
        for value in values:
            words = ": ".join(filter(None, (value.get("state", ""), value.get("reason", ""))))
            lines.append(f"{value['id']}  {value.get('study', '')[:16]}  {words}".rstrip())
            lines += [f"  {site}: {reason}" for site, reason in value.get("missing", {}).items()]
            lines += [f"  {value['error']}"] if "error" in value else []
        return "\n".join(lines) or "no study submitted"

    answer(values, as_json=as_json, text=text)


def approval(
    study: StudyName,
    site: Annotated[str, typer.Argument(help="The site's id.")],
    signature: Annotated[str, typer.Argument(help="The approval, 128 hex digits, or - to withdraw.")],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Take in a decision, as of now, that came by another way than the site's own connection."""
    import time

    from common.errors import SignatureInvalid
    from server.submission import record_approval, withdraw_approval

    opened, now_s = _open(home), int(time.time())
    if signature == "-":
        submitted = withdraw_approval(opened, study, site, decided_s=now_s)
    else:
        try:
            submitted = record_approval(opened, study, site, bytes.fromhex(signature), decided_s=now_s)
        except ValueError as error:
            raise SignatureInvalid("expected 128 hex digits") from error
    missing = ", ".join(submitted.missing) or "nobody"
    answer(_value(submitted), as_json=as_json, text=lambda: f"study {study}: still missing {missing}")


def _open(home: Path) -> ServerHome:
    from server.consortium import open_server_home

    return open_server_home(home, credentials=credentials_directory())


def _said_by_up(home: ServerHome) -> dict[str, dict[str, str]]:
    """Return state and reason by a study's hash out of `status.json`; nothing where `up` has not run."""
    from server.connections import STATUS_NAME
    from server.status import read_json

    try:
        studies = read_json(home.directory / STATUS_NAME)["studies"].values()
        return {one["study"]: {"state": one["state"], "reason": one["reason"]} for one in studies}
    except (KeyError, TypeError, AttributeError):
        return {}


def _value(submitted: Submitted) -> dict[str, Any]:
    return {
        "id": submitted.study.study.id,
        "study": submitted.study.sha256,
        "directory": str(submitted.directory),
        "missing": submitted.missing,
    }
