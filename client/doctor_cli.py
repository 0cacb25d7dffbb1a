"""`fedrad-site doctor`, `fedrad-site metrics` and `fedrad-site traces`: what a hospital's IT looks at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.terminal import answer

if TYPE_CHECKING:
    from client.doctor import Finding

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


def mount(app: typer.Typer) -> None:
    """Add these commands to `fedrad-site`."""
    app.command()(doctor)
    app.command()(metrics)
    app.command()(traces)


def doctor(
    home: Home = _DEFAULT_HOME,
    gpu: Annotated[bool, typer.Option("--gpu", help="A card is expected here: none is a failure.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not hash the bases' files.")] = False,
    proxy: Annotated[
        str | None,
        typer.Option(
            "--proxy",
            envvar="FEDRAD_PROXY",
            help="http://[USER:PASSWORD@]HOST:PORT, or none; default: HTTPS_PROXY and NO_PROXY.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check card, torch, disk, clock, network, certificates, data and bases, and say what to do."""
    from client.doctor import State, examine, worst
    from client.doctor_facts import gather
    from client.proxy import choose_proxy
    from common.terminal import bars

    with bars() as progress:
        facts = gather(
            home, proxy=choose_proxy(proxy), hash_bases=not quick,
            say=lambda what: progress.say(f"looking at {what}") if sys.stderr.isatty() else None,
        )  # fmt: skip
    findings = examine(facts, gpu_required=gpu)
    state = worst(findings)
    value = {
        "site": facts.site,
        "state": state.value,
        "findings": [
            {"check": one.check, "state": one.state.value, "seen": one.seen, "todo": one.todo}
            for one in findings
        ],
    }
    if as_json:
        answer(value, as_json=True, text=str)
    else:
        _print(findings)
    if state is State.FAIL:
        raise typer.Exit(1)


def metrics(
    home: Home = _DEFAULT_HOME,
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT; port 0 takes a free one.")
    ] = "127.0.0.1:9465",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Serve this site's metrics to the hospital's Prometheus until Ctrl-C or SIGTERM."""
    from client.metrics import registry_of
    from common.metrics_page import serve_metrics

    serve_metrics(registry_of(home), listen=listen, once=once)


def traces(
    home: Home = _DEFAULT_HOME,
    socket: Annotated[
        Path | None, typer.Option("--socket", help="The agent's; default HOME/run/agent.sock.")
    ] = None,
    beyond_loopback: Annotated[
        bool, typer.Option("--beyond-loopback", help="Allow a collector on another machine.")
    ] = False,
) -> None:
    """Send the agent's stages to OpenTelemetry's collector (OTEL_EXPORTER_OTLP_ENDPOINT), from now on."""
    import os

    from client.home import list_studies, open_home, read_study
    from client.traces import StageSpans, follow
    from common.errors import CollectorInvalid
    from common.traces import Outbox, parse_collector, say_and_stop_on_signal

    opened = open_home(home)
    collector = parse_collector(os.environ, service="fedrad-site", loopback_only=not beyond_loopback)
    if collector is None:
        raise CollectorInvalid("OTEL_EXPORTER_OTLP_ENDPOINT: expected a collector's URL, got none")
    spans = StageSpans(
        opened.site, lambda: {read_study(opened, one).study.id: one for one in list_studies(opened)}
    )
    path = (socket or home / "run" / "agent.sock").absolute()
    follow(f"unix:{path}", spans, Outbox(collector), stop=say_and_stop_on_signal(collector))


def _print(findings: tuple[Finding, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        mark, colour = _MARKS[one.state.value]
        words = Text(one.seen)
        if one.todo:
            words.append(f"\n→ {one.todo}", style="bold")
        table.add_row(Text(mark, style=colour), one.check, words)
    counts = {name: sum(one.state.value == name for one in findings) for name in ("fail", "warn")}
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)
    console.print(
        "all is well"
        if not any(counts.values())
        else f"{counts['fail']} to repair, {counts['warn']} to watch"
    )
