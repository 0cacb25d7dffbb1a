"""`fedrad-site enrol`, `renew` and `rotate`: keys, the request to the operator, and the operator's answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.terminal import answer

if TYPE_CHECKING:
    from client.home import SiteHome
    from common.enrolment import EnrolmentRequest

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()


def mount(app: typer.Typer) -> None:
    """Add the commands of enrolment to `fedrad-site`."""
    app.command()(enrol)
    app.command()(renew)
    app.command()(rotate)


def enrol(
    site: Annotated[str | None, typer.Argument(help="This site's id, such as north-clinic.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared data folder (fedrad-site data import).")
    ] = None,
    home: Home = _DEFAULT_HOME,
    operator_key: Annotated[
        str | None,
        typer.Option("--operator-key", help="The operator's public key, 64 hex; else the bundle brings it."),
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option("--base", help="NAME=DIR of a base model, beside those known.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="ε that this site allows one patient, all studies; at first 20, then as it is."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="At this δ; at first 1e-5, then as it is.")] = None,
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="Put the present keys aside; after a revocation.")
    ] = False,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="The operator's answer: install it.")
    ] = None,
    operator: Annotated[
        str | None,
        typer.Option("--operator", help="The operator's fingerprint, as read to you on the telephone."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make this site's keys and request; later, with --bundle, install the operator's answer.

    Run again, it keeps every setting for which no option is given, and says which have changed.
    """
    if bundle is not None:
        _install(home, bundle, operator, as_json=as_json)
        return
    import sys
    from dataclasses import replace

    from client.enrolment import REQUEST_NAME, request_enrolment, set_keys_aside, utc_now
    from client.home import SiteHome, SiteHomeInvalid, open_home, verify_settings
    from common.enrolment import fingerprint_of
    from common.model.tiny import tiny_base_directory

    known = open_home(home) if (home / "site.json").is_file() else None
    if known is None and (site is None or data is None):
        raise typer.BadParameter("expected SITE and --data, or --bundle FILE")
    before = known or SiteHome(home, site or "", "", data or Path(), {"tiny": tiny_base_directory()})
    wanted = replace(
        before,
        site=site or before.site,
        operator_key=before.operator_key if operator_key is None else operator_key,
        data=data or before.data,
        bases={**before.bases, **_parse_bases(base or [])},
        epsilon=before.epsilon if epsilon is None else epsilon,
        delta=before.delta if delta is None else delta,
    )
    verify_settings(
        site=wanted.site, operator_key=wanted.operator_key, epsilon=wanted.epsilon, delta=wanted.delta
    )
    if operator_key == "":
        raise SiteHomeInvalid("--operator-key: expected 64 hex digits, got none")
    changes = setting_changes(known, wanted) if known else []
    if new_keys and known is not None:
        set_keys_aside(known, now=utc_now())
    _save(wanted)
    made = open_with_credentials(home)
    request = request_enrolment(made, software=_software(), now=utc_now())
    value = {
        "site": made.site,
        "home": str(home),
        "message_key": request.keys.message_key,
        "request": str(home / REQUEST_NAME),
        "fingerprint": fingerprint_of(request.keys),
        "epsilon": made.epsilon,
        "delta": made.delta,
        "changed": changes,
    }
    for change in changes:
        print(f"changed: {change}", file=sys.stderr)
    if not (made.data / "pairs.jsonl").is_file():
        print(f"warning: {made.data}: no prepared data here yet (`fedrad-site data import`)", file=sys.stderr)
    answer(
        value,
        as_json=as_json,
        text=lambda: (
            f"site {made.site}: {home}\nit allows one patient ε {made.epsilon:g} at δ {made.delta:g}\n"
            f"send this to the operator:  {value['request']}\n"
            f"and read on the telephone:  {value['fingerprint']}"
        ),
    )


def setting_changes(before: SiteHome, after: SiteHome) -> list[str]:
    """Say which settings differ and from what to what; a weaker privacy limit is called one."""
    changes = []
    for name, symbol in (("epsilon", "ε"), ("delta", "δ")):
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            way = "raised: a patient may lose more" if now > was else "lowered"
            changes.append(
                f"{symbol} from {was:g} to {now:g}, {way}; `fedrad-site up` takes it when it starts"
            )
    if before.data.absolute() != after.data.absolute():
        changes.append(f"data from {before.data} to {after.data}")
    if before.operator_key and before.operator_key != after.operator_key:
        changes.append(f"operator from {before.operator_key[:16]}… to {after.operator_key[:16]}…")
    for name, directory in sorted(after.bases.items()):
        if before.bases.get(name) != directory:
            changes.append(f"base {name} from {before.bases.get(name, 'none')} to {directory}")
    return changes


def _save(home: SiteHome) -> None:
    from client.home import create_home

    create_home(
        home.directory,
        site=home.site,
        operator_key=home.operator_key,
        data=home.data,
        bases=home.bases,
        epsilon=home.epsilon,
        delta=home.delta,
    )


def _parse_bases(entries: list[str]) -> dict[str, Path]:
    from client.home import SiteHomeInvalid

    bases = {}
    for entry in entries:
        name, separator, directory = entry.partition("=")
        if not separator:
            raise SiteHomeInvalid(f"--base: expected NAME=DIR, got {entry!r}")
        bases[name] = Path(directory)
    return bases


def open_with_credentials(home: Path) -> SiteHome:
    """Open the site's directory, its keys from systemd's credentials where this process has them."""
    import os

    from client.home import open_home

    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return open_home(home, credentials=Path(directory) if directory else None)


def renew(
    home: Home = _DEFAULT_HOME,
    out: Annotated[Path, typer.Option("--out", help="The request to write.")] = Path("renewal-request.json"),
    as_json: Json = False,
) -> None:
    """Write a renewal request to a file; `fedrad-site up` renews by itself where it reaches the server."""
    import secrets

    from client.enrolment import read_enrolled, renewal_request, utc_now
    from common.enrolment import format_site_request
    from common.files import write_atomic

    opened = open_with_credentials(home)
    read_enrolled(opened)
    request = renewal_request(opened, now=utc_now(), nonce=secrets.token_hex(16))
    write_atomic(out, format_site_request(request))
    value = {"site": opened.site, "request": str(out)}
    answer(
        value, as_json=as_json, text=lambda: f"send {out} to the operator, then `fedrad-site enrol --bundle`"
    )


def rotate(
    home: Home = _DEFAULT_HOME,
    message_keys: Annotated[
        bool, typer.Option("--message-keys", help="New message and witness keys too; running studies end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make new TLS and node keys and the request to use them; the old ones end with the operator's answer.

    A running `fedrad-site up` fetches the answer by itself; else install it (`enrol --bundle`).
    """
    from client.enrolment import REQUEST_NAME, request_rotation, utc_now

    opened = open_with_credentials(home)
    request = request_rotation(opened, software=_software(), now=utc_now(), message_keys=message_keys)
    value = _request_value(opened, request, home / REQUEST_NAME)
    answer(
        value,
        as_json=as_json,
        text=lambda: (
            f"changes: {', '.join(value['changes'])}\nsend this to the operator:  {value['request']}\n"
            f"and read on the telephone:  {value['fingerprint']}"
        ),
    )


def _install(home: Path, path: Path, operator: str | None, *, as_json: bool) -> None:
    from dataclasses import replace

    from client.enrolment import install_bundle, verify_operator
    from common.enrolment import parse_bundle
    from common.errors import EnrolmentInvalid

    opened = open_with_credentials(home)
    try:
        signed = parse_bundle(path.read_bytes())
    except OSError as error:
        raise EnrolmentInvalid(f"{path}: expected the operator's bundle, got none") from error
    if operator is not None:
        verify_operator(signed, fingerprint_read_out=operator)
        if not opened.operator_key:
            opened = replace(opened, operator_key=signed.bundle.operator_key)
    if not opened.operator_key:
        raise EnrolmentInvalid(
            "expected --operator FINGERPRINT, which the operator reads to you on the telephone "
            "(`fedrad-server show`), got none"
        )
    enrolled = install_bundle(opened, signed)
    _save(opened)
    value = {
        "site": opened.site,
        "consortium": enrolled.consortium,
        "server": enrolled.address,
        "not_after": enrolled.not_after.isoformat(),
    }
    answer(
        value,
        as_json=as_json,
        text=lambda: (
            f"site {opened.site} is enrolled in {enrolled.consortium}; server {enrolled.address}; "
            f"certificate until {enrolled.not_after:%Y-%m-%d %H:%M} UTC, renewed by `fedrad-site up`"
        ),
    )


def _request_value(home: SiteHome, request: EnrolmentRequest, path: Path) -> dict[str, Any]:
    from common.enrolment import fingerprint_of

    return {
        "site": home.site,
        "request": str(path),
        "changes": [rotation.use.value for rotation in request.rotations],
        "fingerprint": fingerprint_of(request.keys),
    }


def _software() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fedrad {version('fedrad')}"
    except PackageNotFoundError:
        return "fedrad 0-source"
