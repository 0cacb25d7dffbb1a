"""`fedrad-server status | page | metrics | traces | backup | restore`: what the operator looks at, keeps."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.terminal import answer
from server.enrolment_cli import DEFAULT_HOME

if TYPE_CHECKING:
    from rich.console import RenderableType

    from server.connections import ServerView
    from server.status import StudyView

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        envvar="FEDRAD_SERVER_HOME",
        help="The server's directory, a study's, or one above studies.",
    ),
]


def add_operator_commands(app: typer.Typer) -> None:
    """Mount these commands at the top of `fedrad-server`."""
    app.command("status")(status)
    app.command("page")(page)
    app.command("metrics")(metrics)
    app.command("traces")(traces)
    app.command("backup")(backup)
    app.command("restore")(restore)


def status(
    directory: Directory = DEFAULT_HOME,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show changes as they come.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.5, help="Seconds between looks.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Show studies: rounds, ε spent, which sites are missing and why, and what to do."""
    from dataclasses import asdict

    from server.connections import read_server
    from server.status import find_studies, read_view

    if watch and as_json:
        raise typer.BadParameter("--watch: expected it without --json, got both")

    def looked() -> tuple[list[StudyView], ServerView | None]:
        return [read_view(path) for path in find_studies(directory)], read_server(directory)

    if watch:
        _watch(looked, every_s=every_s)
        return
    found, server = looked()
    value = [asdict(view) | {"missing_now": view.missing_now} for view in found]
    if as_json:
        answer(value, as_json=True, text=str)
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 110, highlight=False).print(
        draw(found, server, now_s=time.time())
    )


def page(
    directory: Annotated[
        Path,
        typer.Option(
            "--study",
            "--dir",
            envvar="FEDRAD_SERVER_HOME",
            help="The server's directory, a study's, or one above studies.",
        ),
    ] = DEFAULT_HOME,
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT; port 0 takes a free one.")
    ] = "127.0.0.1:8090",
    host_name: Annotated[
        list[str] | None, typer.Option("--host-name", help="A further name that browsers may ask for.")
    ] = None,
) -> None:
    """Serve the operator's read-only web page until Ctrl-C or SIGTERM; it has no login of its own."""
    import socket

    import uvicorn

    from common.errors import ListenAddressInvalid
    from common.metrics_page import parse_listen
    from server.operator_page.page import make_page

    host, port = parse_listen(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(64)
    except OSError as error:
        raise ListenAddressInvalid(f"--listen {listen}: expected a free address, got {error}") from error
    _warn_beyond_loopback(host)
    name = f"[{host}]" if ":" in host else host
    names = ("localhost", "127.0.0.1", "[::1]", name, *(host_name or []))
    application = make_page(directory, hosts=tuple(dict.fromkeys(names)))
    print(f"http://{name}:{listener.getsockname()[1]}/", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, server_header=False, date_header=False,
        proxy_headers=False, ws="none", lifespan="off", timeout_keep_alive=10, limit_concurrency=32,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def metrics(
    directory: Directory = DEFAULT_HOME,
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT; port 0 takes a free one.")
    ] = "127.0.0.1:9464",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Serve the studies' metrics to Prometheus until Ctrl-C or SIGTERM."""
    from common.metrics_page import serve_metrics
    from server.metrics import registry_of

    if not once:
        _warn_beyond_loopback(listen.rpartition(":")[0])
    serve_metrics(registry_of(directory), listen=listen, once=once)


def traces(
    directory: Directory = DEFAULT_HOME,
    once: Annotated[bool, typer.Option("--once", help="Send all that has been logged, and end.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.5, help="Seconds between looks.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Send rounds and stages to OpenTelemetry's collector (OTEL_EXPORTER_OTLP_ENDPOINT), from now on."""
    import os

    from common.errors import CollectorInvalid
    from common.traces import Outbox, parse_collector, say_and_stop_on_signal
    from server.traces import StudyTraces, follow

    collector = parse_collector(os.environ, service="fedrad-server")
    if collector is None:
        raise CollectorInvalid("OTEL_EXPORTER_OTLP_ENDPOINT: expected a collector's URL, got none")
    outbox, studies = Outbox(collector), StudyTraces(directory)
    if not once:
        follow(studies, outbox, every_s=every_s, stop=say_and_stop_on_signal(collector))
        return
    outbox.put(studies.new_spans())
    if not outbox.send():
        raise CollectorInvalid(
            f"{collector.url}: expected a collector that takes traces, got {outbox.trouble}"
        )
    answer({"spans": outbox.sent}, as_json=as_json, text=lambda: f"{outbox.sent} spans sent")


def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Study or server directory.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup to write; must not exist.")],
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", help="Put the keys in too, encrypted with this file's first line."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one file that another machine can go on from; keys are left out unless --passphrase-file."""
    from server.backup import read_passphrase, write_backup

    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    made = write_backup(directory, file, passphrase=passphrase, now_unix_s=int(time.time()))
    value = {
        "backup": str(file), "sha256": made.sha256, "files": made.files, "bytes": made.bytes,
        "keys": made.keys, "left_out": list(made.left_out),
    }  # fmt: skip

    def text() -> str:
        keys = f"{made.keys} key files, encrypted" if passphrase else "no keys: keep them elsewhere"
        return f"{file}: {made.files} files, {made.bytes} bytes, {keys}\nsha256 {made.sha256}"

    answer(value, as_json=as_json, text=text)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `backup` wrote.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; must not exist or be empty.")],
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="Of the keys; needed where they are in it.")
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Restore a backup with keys without them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a backup and unpack it into a new directory; the old server must never run again."""
    from server.backup import read_passphrase, restore_backup

    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    made = restore_backup(file, directory, passphrase=passphrase, without_keys=without_keys)
    value = {"directory": str(directory), "files": made.files, "bytes": made.bytes, "keys": made.keys}

    def text() -> str:
        missing = "" if made.keys else "\nno keys in it: put the operator's keys back before you start it"
        return (
            f"{directory}: {made.files} files, every hash checked{missing}\n"
            "never run the old server again: two that go on from one state give two histories"
        )

    answer(value, as_json=as_json, text=text)


def draw(views: list[StudyView], server: ServerView | None = None, *, now_s: float) -> RenderableType:
    """Draw studies for a terminal, and the server's sites where they are known."""
    from rich.console import Group

    parts: list[RenderableType] = []
    for view in views:
        parts += [_heading(view, now_s=now_s), _sites(view), ""]
    if not views:
        parts += ["no study yet", ""]
    if server is not None:
        parts += [_connections(server, now_s=now_s), ""]
    return Group(*parts[:-1])


def _connections(server: ServerView, *, now_s: float) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from server.operator_page.page import until

    heading = Text(server.consortium, style="bold").append(f"  {server.address}", style="dim")
    if server.running is False:
        heading.append("  fedrad-server up is not running", style="yellow")
    words = {True: ("connected", "green"), False: ("not connected", "yellow"), None: ("not known", "dim")}
    lines: list[RenderableType] = [heading]
    for site in server.sites:
        revoked = site.state == "revoked"
        told, style = ("revoked", "dim") if revoked else words[site.online]
        line = Text(f"  {site.site:<24}").append(f"{told:<16}", style=style)
        if not revoked:
            line.append(f"certificate {until(site.certificate_until_s, now_s)}", style="dim")
        lines.append(line)
    lines += [Text(f"  {text}", style="yellow") for text in server.warnings.values()]
    return Group(*lines)


def _heading(view: StudyView, *, now_s: float) -> RenderableType:
    from rich.text import Text

    from server.operator_page.page import ago, in_seconds, time_left

    colour = {"running": "green", "finished": "green", "stopped": "yellow"}.get(view.state, "default")
    width = 30
    done = round(width * view.rounds_done / view.rounds_planned)
    text = Text()
    text.append(view.id, style="bold").append(f"  {view.state}", style=colour)
    text.append(f"   {view.sha256[:12]}  mode {view.mode}  base {view.base}\n", style="dim")
    text.append("━" * done, style="green").append("━" * (width - done), style="bright_black")
    text.append(f"  round {view.rounds_done} of {view.rounds_planned}")
    if view.release_epsilon is not None:
        text.append(f"   release ε {view.release_epsilon:.2f} of {view.release_epsilon_limit:g}")
        text.append(f" at δ {view.delta:.1e}", style="dim")
    timed = [one.seconds for one in view.rounds if one.seconds is not None]
    if timed:
        text.append(f"   {in_seconds(sum(timed) / len(timed))} a round", style="dim")
        text.append(f", last {ago(view.rounds[-1].time_unix_s, now_s)}", style="dim")
    if view.attempt is not None and view.state != "finished":
        text.append(f"\nround {view.attempt.round + 1} attempt {view.attempt.attempt} is open: ")
        text.append(time_left(view.attempt.deadline_unix_s, grace_s=view.grace_s, now_s=now_s))
    return text


def _sites(view: StudyView) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from server.operator_page.page import in_seconds

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim", expand=False)
    for name in ("site", "now", "rounds", "last"):
        table.add_column(name, justify="right" if name in ("rounds", "last") else "left", no_wrap=True)
    if view.site_epsilon_limit is not None:
        table.add_column("site ε", justify="right", no_wrap=True)
    table.add_column("why, and what to do")
    for site in view.sites:
        last = "–" if site.last_round is None else str(site.last_round + 1)
        now = (
            "[yellow]missing[/]"
            if not site.serves
            else "[green]serves[/]"
            if last != "–"
            else "[dim]not yet[/]"
        )
        row = [site.site, now, str(site.rounds_served), last]
        if view.site_epsilon_limit is not None:
            bound = "" if site.epsilon_signed else "≤ "
            row.append(f"{bound}{site.epsilon:.2f} of {view.site_epsilon_limit:g}")
        past = [f"{reason} × {count}" for reason, count in site.absences.items()]
        past += [f"answered {in_seconds(site.late_s)} past the deadline"] if site.late_s else []
        row.append(f"{site.reason}: {site.advice}" if site.reason else f"[dim]{', '.join(past)}[/]")
        table.add_row(*row)
    return table


def _watch(looked: Any, *, every_s: float) -> None:
    """Redraw a terminal's screen until interrupted; elsewhere, print again what has changed."""
    from rich.console import Console
    from rich.live import Live

    from common.errors import FedRadError

    def look() -> RenderableType:
        try:
            return draw(*looked(), now_s=time.time())
        except FedRadError as error:
            return f"{error.code}: {error}"

    console = Console(highlight=False)
    if not console.is_terminal:
        shown: object = None
        while True:
            found = looked()
            if found != shown:
                shown = found
                console.print(draw(*found, now_s=time.time()))
                sys.stdout.flush()
            time.sleep(every_s)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(look(), refresh=True)
            time.sleep(every_s)


def _warn_beyond_loopback(host: str) -> None:
    if host not in ("127.0.0.1", "localhost", "::1", "[::1]"):
        print(
            f"warning: {host} is reachable from other machines, and this page has no login", file=sys.stderr
        )
