"""`fedrad-server`: what the operator runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from common.terminal import answer, run_program
from server import enrolment_cli, submission_cli
from server.operator_cli import add_operator_commands
from server.release_cli import audit_app, release_app

app = typer.Typer(help="The operator's side of FedRad.", no_args_is_help=True)
study_app = typer.Typer(help="Make, check and sign study manifests.", no_args_is_help=True)
enrolment_cli.mount(app)
submission_cli.mount(study_app)
app.add_typer(study_app, name="study")
app.add_typer(release_app, name="release")
app.add_typer(audit_app, name="audit")
add_operator_commands(app)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Manifest = Annotated[Path, typer.Argument(metavar="STUDY", help="study.toml")]


@app.callback()
def server() -> None:
    """The operator's side of FedRad; it never sees images, reports or un-noised sums of a private study."""


@study_app.command("init")
def study_init(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The study.toml to write.")],
    sites: Annotated[str, typer.Option("--sites", help="Site ids, separated by commas.")],
    base: Annotated[str, typer.Option("--base", help="tiny, or the name of a base.")] = "tiny",
    mode: Annotated[str, typer.Option("--mode", help="consortium, local or plain.")] = "consortium",
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds of the tune stage.")] = None,
    patients: Annotated[
        int | None, typer.Option("--patients", min=1, help="Nominal training patients of all sites.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a complete, commented manifest that runs as it is."""
    from common.config import parse_study_toml
    from server.studies import study_template, write_manifest

    names = [name.strip() for name in sites.split(",") if name.strip()]
    text = study_template(
        id=_study_id(out), base=base, sites=names, mode=mode, rounds=rounds, patients=patients
    )
    parse_study_toml(text, source=str(out))
    write_manifest(out, text)
    value = {"manifest": str(out), "sites": names, "base": base, "mode": mode}
    answer(value, as_json=as_json, text=lambda: f"{out}: edit it, then `fedrad-server study check {out}`")


@study_app.command("check")
def study_check(study: Manifest, as_json: Json = False) -> None:
    """Parse a manifest and say what it allows; errors name line, key, expected and got."""
    from common.config import describe

    parsed = _parse(study)
    value = {"id": parsed.study.id, "rounds": parsed.rounds, "allows": describe(parsed)}
    lines = [f"{study}: well-formed", *(f"  {name}: {words}" for name, words in describe(parsed).items())]
    answer(value, as_json=as_json, text=lambda: "\n".join(lines))


@study_app.command("sign")
def study_sign(
    study: Manifest,
    out: Annotated[Path, typer.Option("--out", help="Study directory to make.")],
    base: Annotated[Path | None, typer.Option("--base", help="Base model directory, if not tiny.")] = None,
    key: Annotated[Path, typer.Option("--key", help="The operator's key; made on first use.")] = Path(
        "operator/message.key"
    ),
    public: Annotated[
        Path | None, typer.Option("--public", help="Prepared public pairs for the acceptance test.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pin base, tensors, keys and noise, and sign: study.json and operator.sig are what sites receive."""
    from common.errors import ManifestInvalid
    from common.identity import load_key, load_or_create_key, save_key
    from common.model.tiny import known_base
    from server.studies import resolve_study, write_study

    parsed = _parse(study)
    directory = known_base(parsed.base.name, base)
    if directory is None:
        raise ManifestInvalid(f"--base: expected the directory of base {parsed.base.name!r}, got none")
    operator = load_or_create_key(key)
    resolved = resolve_study(
        parsed, base=directory, operator_key=operator.public, site_keys={}, public=public
    )
    write_study(out, resolved, operator, base=directory, public=public)
    own = out / "keys" / "message.key"
    if not own.exists():
        save_key(load_key(key), own)
    value = {"study": resolved.sha256, "directory": str(out), "operator_key": operator.public}
    answer(
        value,
        as_json=as_json,
        text=lambda: f"signed {resolved.sha256}\nsend {out}/study.json and operator.sig to the sites",
    )


def _parse(path: Path) -> Any:
    from common.config import parse_study_toml
    from common.errors import ManifestInvalid

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestInvalid(f"{path}: expected a study manifest, got none") from error
    return parse_study_toml(text, source=str(path))


def _study_id(out: Path) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "-", out.stem.lower()).strip("-")[:64] or "study"


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
