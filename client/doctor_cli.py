"""`fedrad-site doctor` and `fedrad-site metrics`: what a hospital's IT looks at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.terminal import answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from client.doctor import Finding

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


def mount(app: typer.Typer) -> None:
    """Add these commands to `fedrad-site`."""
    app.command()(doctor)
    app.command()(metrics)


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
    from common.terminal import bars

    with bars() as progress:
        facts = gather(
            home, proxy=_proxy(proxy), hash_bases=not quick,
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


def _proxy(given: str | None) -> Callable[[str], str]:
    import urllib.request

    if given is not None:
        return lambda host: "" if given == "none" else given
    return lambda host: (
        "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https", "")
    )


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
