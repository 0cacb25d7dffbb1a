"""`fedrad-site` as it is installed: the commands of `client.cli`, and those that run a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli import app
from common.terminal import answer, run_program

if TYPE_CHECKING:
    import threading

    from client.home import SiteHome

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        envvar="FEDRAD_PROXY",
        help="http://[USER:PASSWORD@]HOST:PORT, or none; default: HTTPS_PROXY and NO_PROXY.",
    ),
]
RelayDirectory = Annotated[
    Path | None, typer.Option("--relay-dir", help="The relay's folder; default HOME/relay, HOME-relay.")
]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()
_GATEWAY_PORT = 9410
_RUNTIME_PORT = 9411


@app.command()
def up(
    home: Home = _DEFAULT_HOME,
    relay_user: Annotated[
        str, typer.Option("--relay-user", help="Account for SuperNode and ClientApp; needs root.")
    ] = "",
    relay_dir: RelayDirectory = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Folder of the agent's socket."),
    ] = None,
    proxy: ProxyOption = None,
    gateway_port: Annotated[
        int, typer.Option("--gateway-port", min=0, max=65535, help="On loopback; 0 takes a free one.")
    ] = 0,
    runtime_port: Annotated[
        int, typer.Option("--runtime-port", min=0, max=65535, help="On loopback; 0 takes a free one.")
    ] = 0,
) -> None:
    """Run the site until it is told to stop: agent, connection, SuperNode and ClientApp."""
    from client.proxy import choose_proxy, format_proxy, parse_proxy
    from deploy.site.up import SiteOptions, run_site

    opened = _open(home)
    options = SiteOptions(
        relay_user=relay_user,
        relay_directory=relay_dir.absolute() if relay_dir else None,
        run_directory=run_dir.absolute() if run_dir else None,
        gateway_port=gateway_port,
        runtime_port=runtime_port,
        proxy=format_proxy(parse_proxy(choose_proxy(proxy)(_server_host(opened)))),
    )
    run_site(opened, options, stop=_stop_on_signal())


@app.command()
def link(
    home: Home = _DEFAULT_HOME,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The gateway's, for the SuperNode.")
    ] = _GATEWAY_PORT,
    host: Annotated[str, typer.Option("--host", help="Where the gateway listens.")] = "127.0.0.1",
    proxy: ProxyOption = None,
) -> None:
    """Run the connection alone: gateway, renewal, studies (the site's user; part of `up`)."""
    from client.proxy import choose_proxy
    from common.logs import start_json_log
    from deploy.site.link import SiteLink

    opened = _open(home)
    stop = _stop_on_signal()
    start_json_log(opened.directory / "logs" / "link.jsonl")
    SiteLink(opened, port=port, proxy=choose_proxy(proxy), host=host).run(stop)


@app.command("relay-files")
def relay_files(
    relay_dir: Annotated[Path, typer.Option("--relay-dir", help="The relay's folder.")],
    home: Home = _DEFAULT_HOME,
    relay_user: Annotated[str, typer.Option("--relay-user", help="Who gets the folder; needs root.")] = "",
    as_json: Json = False,
) -> None:
    """Hand the relay its node key and the gateway's authority; run it after `link` has started."""
    from client.enrolment import node_key_path
    from common.errors import EngineFailed
    from deploy.site.relay import Relay, account_of, give_relay_files

    opened = _open(home)
    authority = opened.directory / "run" / "gateway" / "ca.crt"
    if not authority.is_file():
        raise EngineFailed(f"{authority}: expected the gateway's authority, got none; start `link` first")
    relay = Relay(
        directory=relay_dir.absolute(), site=opened.site, gateway_port=0, runtime_port=0, agent="",
        account=account_of(relay_user) if relay_user else None,
    )  # fmt: skip
    changed = give_relay_files(
        relay,
        node_key=node_key_path(opened).read_bytes(),
        gateway_authority=authority.read_bytes(),
    )
    value = {"relay": str(relay_dir), "changed": changed}
    answer(value, as_json=as_json, text=lambda: f"{relay_dir}: {'new files' if changed else 'unchanged'}")


@app.command()
def relay(
    relay_dir: Annotated[Path, typer.Option("--relay-dir", help="The relay's folder.")],
    site: Annotated[str, typer.Option("--site", help="This site's id.")],
    agent: Annotated[str, typer.Option("--agent", help="The agent's socket: unix:///PATH.")],
    gateway_port: Annotated[
        int, typer.Option("--gateway-port", min=1, max=65535, help="As `link` has it.")
    ] = _GATEWAY_PORT,
    runtime_port: Annotated[
        int, typer.Option("--runtime-port", min=1, max=65535, help="SuperNode's, for the ClientApp.")
    ] = _RUNTIME_PORT,
) -> None:
    """Run SuperNode and ClientApp alone (the relay's user; part of `up`)."""
    from deploy.site.relay import Relay
    from deploy.site.up import run_relay

    made = Relay(
        directory=relay_dir.absolute(), site=site, gateway_port=gateway_port, runtime_port=runtime_port,
        agent=agent,
    )  # fmt: skip
    run_relay(made, stop=_stop_on_signal())


@app.command()
def status(home: Home = _DEFAULT_HOME, as_json: Json = False) -> None:
    """Say in words what is going on: connection, studies, rounds, budget, what is wrong."""
    from deploy.site.status import read_status, unix_now, words

    now = unix_now()
    value = read_status(_open(home), now=now)
    answer(value, as_json=as_json, text=lambda: words(value, now=now))


def _open(home: Path) -> SiteHome:
    from client.enrolment_cli import open_with_credentials

    return open_with_credentials(home.absolute())


def _server_host(home: SiteHome) -> str:
    from client.enrolment import read_enrolled

    return read_enrolled(home).host


def _stop_on_signal() -> threading.Event:
    import logging
    import signal
    import threading

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
