"""`fedrad-server` as it is installed: the commands of `server.cli`, and `up`, which runs the server."""

from __future__ import annotations

from typing import Annotated

import typer

from common.terminal import answer, run_program
from server.cli import app, study_app
from server.enrolment_cli import DEFAULT_HOME, Home, Passphrase, credentials_directory, read_passphrase

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def up(
    home: Home = DEFAULT_HOME,
    listen: Annotated[
        str | None,
        typer.Option("--listen", help="HOST:PORT of the proxy; default 0.0.0.0:PORT."),
    ] = None,
    proxy: Annotated[str, typer.Option("--proxy", help="nginx, caddy, or none: one of your own.")] = "nginx",
    superlink_port: Annotated[
        int | None,
        typer.Option(
            "--superlink-port",
            min=0,
            max=65535,
            help="On loopback; default a free one, 9400 with --proxy none.",
        ),
    ] = None,
    api_port: Annotated[
        int | None,
        typer.Option(
            "--api-port", min=0, max=65535, help="On loopback; default a free one, 9401 with --proxy none."
        ),
    ] = None,
    passphrase_file: Passphrase = None,
) -> None:
    """Run the consortium's server until it is told to stop (Ctrl-C or SIGTERM)."""
    import logging
    import signal
    import threading

    from deploy.server.up import Listening, Proxy, find_proxy, run_server
    from server.consortium import open_server_home

    if proxy not in (member.value for member in Proxy):
        raise typer.BadParameter(f"expected nginx, caddy or none, got {proxy!r}", param_hint="--proxy")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    opened = open_server_home(home.absolute(), credentials=credentials_directory())
    authority = opened.authority(passphrase=read_passphrase(passphrase_file))
    own = proxy == Proxy.NONE.value  # a proxy of the operator's own has the ports in its configuration
    listening = Listening(
        listen=listen or f"0.0.0.0:{opened.port}",
        proxy=Proxy(proxy),
        superlink_port=superlink_port if superlink_port is not None else 9400 * own,
        api_port=api_port if api_port is not None else 9401 * own,
    )
    if listening.proxy is not Proxy.NONE:
        find_proxy(listening.proxy)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run_server(opened, authority, listening, stop=stop)


@study_app.command("resume")
def study_resume(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study id or the start of its hash.")],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Let a study that ended with a refusal start again, after its reason is mended."""
    from deploy.server.runs import resume
    from server.consortium import open_server_home
    from server.submission import find_submitted

    submitted = find_submitted(open_server_home(home, credentials=credentials_directory()), study)
    resume(submitted)
    name = submitted.study.study.id
    answer({"study": name}, as_json=as_json, text=lambda: f"{name}: `fedrad-server up` starts it again")


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
