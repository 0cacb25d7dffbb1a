"""`fedrad-server init`, `show` and `site …`: the consortium, and who belongs to it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.terminal import answer

if TYPE_CHECKING:
    from common.enrolment import SignedBundle
    from server.consortium import ServerHome
    from server.enrolment import RegisteredSite

site_app = typer.Typer(help="The sites of the consortium.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SERVER_HOME", help="The operator's directory.")]
Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File with the passphrase of the authority's key, if it has one."),
]
Fingerprint = Annotated[
    str, typer.Option("--fingerprint", help="What the site read to you on the telephone.")
]
RequestFile = Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that the site sent.")]
Out = Annotated[Path | None, typer.Option("--out", help="The bundle to write; default SITE.bundle.json.")]
DEFAULT_HOME = Path("~/.fedrad-server").expanduser()


def mount(app: typer.Typer) -> None:
    """Add the commands of enrolment to `fedrad-server`."""
    app.command("init")(init)
    app.command("show")(show)
    app.add_typer(site_app, name="site")


def init(
    consortium: Annotated[str, typer.Argument(help="The consortium's name, such as chest-2026.")],
    address: Annotated[str, typer.Option("--address", help="HOST:PORT where sites reach the server.")],
    home: Home = DEFAULT_HOME,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Make the consortium: authority, operator key, server certificate, policy."""
    from server.consortium import create_server_home, utc_now

    made = create_server_home(
        home,
        consortium=consortium,
        address=address,
        now=utc_now(),
        passphrase=read_passphrase(passphrase_file),
    )
    _show(made, as_json=as_json)


def show(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show the consortium and the operator's fingerprint, to read to the sites on the telephone."""
    from server.consortium import open_server_home

    _show(open_server_home(home, credentials=credentials_directory()), as_json=as_json)


@site_app.command("approve")
def site_approve(
    request: RequestFile,
    fingerprint: Fingerprint,
    home: Home = DEFAULT_HOME,
    out: Out = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Enter a site, after comparing its fingerprint, and write the bundle to send back."""
    from server.consortium import utc_now
    from server.enrolment import approve

    opened = _open(home)
    authority = opened.authority(passphrase=read_passphrase(passphrase_file))
    bundle = approve(opened, authority, _read_request(request), fingerprint=fingerprint, now=utc_now())
    _write_bundle(bundle, out, as_json=as_json)


@site_app.command("rotate")
def site_rotate(
    request: RequestFile,
    fingerprint: Fingerprint,
    home: Home = DEFAULT_HOME,
    out: Out = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Take a site's new keys (`fedrad-site rotate`) for its old ones, which end."""
    from server.consortium import utc_now
    from server.enrolment import rotate

    opened = _open(home)
    authority = opened.authority(passphrase=read_passphrase(passphrase_file))
    bundle = rotate(opened, authority, _read_request(request), fingerprint=fingerprint, now=utc_now())
    _write_bundle(bundle, out, as_json=as_json)


@site_app.command("renew")
def site_renew(
    request: RequestFile,
    home: Home = DEFAULT_HOME,
    out: Out = None,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Answer a renewal request that came as a file (`fedrad-site renew`)."""
    from common.enrolment import Ask, parse_site_request, verify_site_request
    from common.errors import EnrolmentInvalid
    from server.consortium import utc_now
    from server.enrolment import approved_site, renew

    opened = _open(home)
    signed = parse_site_request(_read(request))
    asked = signed.request
    verify_site_request(signed, message_key=approved_site(opened, asked.site).message_key)
    if asked.ask is not Ask.RENEW:
        raise EnrolmentInvalid(f"{request}: expected a renewal request, got {asked.ask.value}")
    authority = opened.authority(passphrase=read_passphrase(passphrase_file))
    _write_bundle(renew(opened, authority, asked.site, asked.argument, now=utc_now()), out, as_json=as_json)


@site_app.command("revoke")
def site_revoke(
    site: Annotated[str, typer.Argument(help="The site's id.")],
    reason: Annotated[str, typer.Option(help="left, compromised or superseded.")] = "left",
    home: Home = DEFAULT_HOME,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """End a site's part: it is out at the next round, and its certificates count no more."""
    from common.ledger.entries import RevocationReason
    from server.consortium import utc_now
    from server.enrolment import revoke

    if reason not in ("left", "compromised", "superseded"):
        raise typer.BadParameter(f"expected left, compromised or superseded, got {reason!r}")
    opened = _open(home)
    authority = opened.authority(passphrase=read_passphrase(passphrase_file))
    revoked = revoke(opened, authority, site, reason=RevocationReason(reason), now=utc_now())
    answer(_site_value(revoked), as_json=as_json, text=lambda: f"site {site}: revoked ({revoked.reason})")


@site_app.command("list")
def site_list(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """List the sites, with the end of each one's certificate."""
    from server.enrolment import read_sites

    values = [_site_value(site) for site in read_sites(_open(home)).values()]

    def text() -> str:
        lines = [f"{'site':<24}{'state':<10}{'certificate until':<22}message key"]
        lines += [
            f"{v['site']:<24}{v['state']:<10}{(v['not_after'] or '-')[:16]:<22}{v['message_key'][:16]}…"
            for v in values
        ]
        return "\n".join(lines) if values else "no site yet"

    answer(values, as_json=as_json, text=text)


def credentials_directory() -> Path | None:
    """Return systemd's credential directory, when this process has one."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(directory) if directory else None


def read_passphrase(path: Path | None) -> bytes:
    return _read(path).rstrip(b"\r\n") if path is not None else b""


def _open(home: Path) -> ServerHome:
    from server.consortium import open_server_home

    return open_server_home(home, credentials=credentials_directory())


def _read(path: Path) -> bytes:
    from common.errors import EnrolmentInvalid

    try:
        return path.read_bytes()
    except OSError as error:
        raise EnrolmentInvalid(f"{path}: expected a file, got {error.strerror}") from error


def _read_request(path: Path) -> Any:
    from common.enrolment import parse_request

    return parse_request(_read(path))


def _show(home: ServerHome, *, as_json: bool) -> None:
    from common.identity import fingerprint

    public = home.message_key().public
    value = {
        "consortium": home.consortium,
        "address": home.address,
        "home": str(home.directory),
        "operator_key": public,
        "fingerprint": fingerprint(public),
    }
    answer(
        value,
        as_json=as_json,
        text=lambda: (
            f"consortium {home.consortium} at {home.address}: {home.directory}\n"
            f"operator key              {public}\nread this to every site:  {value['fingerprint']}"
        ),
    )


def _write_bundle(signed: SignedBundle, out: Path | None, *, as_json: bool) -> None:
    from common.enrolment import format_bundle
    from common.files import write_atomic

    site = signed.bundle.site
    path = out or Path(f"{site}.bundle.json")
    write_atomic(path, format_bundle(signed))
    answer(
        {"site": site, "bundle": str(path)},
        as_json=as_json,
        text=lambda: f"site {site}: send {path} back; the site installs it with `fedrad-site enrol --bundle`",
    )


def _site_value(site: RegisteredSite) -> dict[str, Any]:
    ends = site.not_after_s
    return {
        "site": site.site,
        "state": site.state.value,
        "reason": site.reason,
        "not_after": datetime.fromtimestamp(ends, UTC).isoformat() if ends else "",
        "message_key": site.message_key,
        "node": site.node_sha256,
    }
