"""`fedrad-site model …` and `fedrad-site access …`: releases of this site, and who used them."""

from __future__ import annotations

import getpass
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.terminal import answer

if TYPE_CHECKING:
    from client.access import AccessLog
    from client.releases import ModelStore

model_app = typer.Typer(help="Pull, check, switch and go back between released models.", no_args_is_help=True)
access_app = typer.Typer(help="Who used which model version; retention.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
Pin = Annotated[str, typer.Option("--pin", help="Run it all the same, for this reason; it is recorded.")]
Unprotected = Annotated[bool, typer.Option(help="Allow a release without differential privacy.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()


@model_app.command("trust")
def trust(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="The repository's first root file.")],
    study: Annotated[str, typer.Option("--study", help="Approved study whose log is believed.")],
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Pin the release repository's root and believe the log of a study that this site approved."""
    from client.home import find_study, open_home, read_approved_study
    from common.ledger.release_proof import trust_of

    opened = open_home(home)
    approved = read_approved_study(opened, find_study(opened, study))
    ledger = trust_of(approved)
    _store(home).trust(root.read_bytes(), ledger)
    value = {"log": ledger.log.name, "witnesses": len(ledger.witnesses), "quorum": ledger.quorum}
    answer(
        value, as_json=as_json, text=lambda: f"believing {ledger.log.name} under {ledger.quorum} witnesses"
    )


@model_app.command("pull")
def pull(
    source: Annotated[str, typer.Argument(help="https URL or folder of the release repository.")],
    version: Annotated[int | None, typer.Option("--version", min=1, help="Default: the newest.")] = None,
    home: Home = _DEFAULT_HOME,
    allow_unprotected: Unprotected = False,
    as_json: Json = False,
) -> None:
    """Fetch a release; refused without TUF signatures and ledger proof."""
    got = _store(home).pull(source, version=version, allow_unprotected=allow_unprotected)
    text = f"version {got} is here; `fedrad-site model use {got}` switches to it"
    answer({"version": got}, as_json=as_json, text=lambda: text)


@model_app.command("list")
def list_versions(home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """List the versions held, the one in use, and every switch so far."""
    store = _store(home)
    current = store.current()
    value: dict[str, Any] = {
        "versions": store.versions(),
        "current": current.version if current else None,
        "previous": (current.previous or None) if current else None,
        "decisions": store.decisions(),
    }

    def text() -> str:
        lines = [f"{'*' if current and v == current.version else ' '} {v}" for v in value["versions"]]
        return "\n".join(lines) or "no release yet; `fedrad-site model pull`"

    answer(value, as_json=as_json, text=text)


@model_app.command("use")
def use(
    version: Annotated[int, typer.Argument(min=1, help="A version that is held.")],
    pin: Pin = "",
    home: Home = _DEFAULT_HOME,
    allow_unprotected: Unprotected = False,
    as_json: Json = False,
) -> None:
    """Switch to a version; a lower one needs the operator's logged permission or --pin."""
    current = _store(home).use(
        version, time_s=int(time.time()), by=_user(), pin_reason=pin, allow_unprotected=allow_unprotected
    )
    value = {"version": current.version, "previous": current.previous or None}
    answer(value, as_json=as_json, text=lambda: _in_use(current.version))


@model_app.command("rollback")
def rollback(pin: Pin = "", home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """Go back to the previous version, by the operator's logged permission or --pin."""
    current = _store(home).rollback(time_s=int(time.time()), by=_user(), pin_reason=pin)
    value = {"version": current.version, "previous": current.previous or None}
    answer(value, as_json=as_json, text=lambda: _in_use(current.version))


@model_app.command("verify")
def verify(
    version: Annotated[int | None, typer.Argument(min=1, help="Default: every version held.")] = None,
    home: Home = _DEFAULT_HOME,
    allow_unprotected: Unprotected = False,
    as_json: Json = False,
) -> None:
    """Check held versions again, file by file, against the ledger."""
    store = _store(home)
    versions = [version] if version else store.versions()
    verified = [store.verify(v, allow_unprotected=allow_unprotected).version for v in versions]
    answer({"verified": verified}, as_json=as_json, text=lambda: f"verified: {verified}")


@access_app.command("list")
def access_list(home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """Verify the access log's chain and list its records, without what was drafted."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    log = _access_log(home)
    records = [asdict(record) for record in log.records()]

    def text() -> str:
        lines = [
            f"{datetime.fromtimestamp(r['time_s'], UTC):%Y-%m-%d %H:%M:%S} UTC  "
            f"{r['user']} {r['action'].value} model {r['model_version']}"
            for r in records
        ]
        return "\n".join([*lines, f"{len(records)} records, head {log.head}"])

    answer({"records": records, "head": log.head}, as_json=as_json, text=text)


@access_app.command("shred")
def access_shred(
    before: Annotated[str, typer.Option("--before", help="First month to keep, YYYY-MM.")],
    home: Home = _DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Destroy keys and payloads of earlier months, on record; the records stay."""
    months = _access_log(home).shred_before(before, user=_user(), time_s=int(time.time()))
    answer({"shredded": months}, as_json=as_json, text=lambda: f"shredded: {', '.join(months) or 'nothing'}")


def _in_use(version: int) -> str:
    return f"version {version} is in use; a running server tries it first and puts it back if it fails"


def _access_log(home: Path) -> AccessLog:
    from client.access import AccessLog
    from client.home import verify_site_folder

    return AccessLog(verify_site_folder(home, part="access"))


def _store(home: Path) -> ModelStore:
    from client.home import verify_site_folder
    from client.releases import ModelStore

    return ModelStore(verify_site_folder(home, part="models"))


def _user() -> str:
    try:
        return f"local:{getpass.getuser()}"
    except (KeyError, OSError):
        return "local:unknown"
