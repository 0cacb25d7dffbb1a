"""Seconds and memory per message exchange: FedRad's engines beside plain Flower in the same run.

An exchange is 20 MB down to every site and 20 MB of other bytes back (in process: the
same bytes, so that nothing but the engine takes time). FedRad's side is the relay contract (`common.relay`)
on its two engines; plain Flower is its own FedAvg strategy on arrays, with
Flower's default settings, on the same TLS, node authentication and SQLite state. The first exchange of a run
warms up and is left out; the median of the others counts. Takes six to ten minutes on two cores.

It does not measure signatures, masking or the agents: those are in `secagg` and in the study's own report.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from deploy.local.flower import FAB, PLAIN_FLOWER, Tuning, flower_engine
from deploy.local.guardian import marked_processes
from deploy.local.inprocess import run_inprocess
from tests.deploy import echo_client, echo_server

SIZE = 20_000_000
_EXCHANGES = 2
_TOOK = re.compile(r"exchange .* took ([0-9.]+) s")
_SERVER_PROGRAMS = ("flower-superlink", "flower-superexec", "flwr-serverapp")

Progress = Callable[[str], None]


def run(progress: Progress) -> dict[str, float]:
    """Measure and return the keys of DESIGN.md, "Benchmarks", `rounds`."""
    results = {"round_overhead_s_inprocess_5x20mb": _in_process(5, progress)}
    for sites in (2, 5):
        plain = _plain_flower(sites, progress)
        fedrad, _ = _fedrad(sites, progress)
        results |= {
            f"plain_flower_exchange_s_{sites}x20mb": plain,
            f"fedrad_exchange_s_{sites}x20mb": fedrad,
            f"round_ratio_to_plain_flower_{sites}x20mb": fedrad / plain,
        }
    results["fedrad_exchange_s_8x20mb"], results["server_peak_mb_8x20mb"] = _fedrad(8, progress)
    return results


def _in_process(sites: int, progress: Progress) -> float:
    progress(f"rounds: {sites} sites in process")
    app = ServerApp()
    seconds = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for number in range(1 + _EXCHANGES):
            envelope = echo_server.payload(number, SIZE)
            start = time.perf_counter()
            echo_server.ask(grid, list(grid.get_node_ids()), "echo", envelope)
            seconds.append(time.perf_counter() - start)

    nodes = {100 + number: {"site": f"site{number}", "agent": "none"} for number in range(sites)}
    run_inprocess(app, echo_client.app, node_configs=nodes, run_config={})
    return statistics.median(seconds[1:])


def _plain_flower(sites: int, progress: Progress) -> float:
    with tempfile.TemporaryDirectory(prefix="fedrad-rounds-") as name:
        folder = Path(name)
        (folder / "plan").write_text(f"{sites} {1 + _EXCHANGES} {SIZE}")
        fab = _fab(folder, "tests.benchmarks.plain_server", "tests.benchmarks.plain_client")
        return _on_flower(folder, sites, fab, PLAIN_FLOWER, f"plain Flower, {sites} sites", progress)[0]


def _fedrad(sites: int, progress: Progress) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="fedrad-rounds-") as name:
        folder = Path(name)
        (folder / "stages").write_text(" ".join([f"turn:{SIZE}"] * (1 + _EXCHANGES)))
        fab = _fab(folder, "tests.deploy.echo_server", "tests.deploy.echo_client")
        return _on_flower(folder, sites, fab, Tuning(), f"FedRad, {sites} sites", progress)


def _on_flower(
    folder: Path, sites: int, fab: Path, tuning: Tuning, title: str, progress: Progress
) -> tuple[float, float]:
    """Run one app pair; return the median seconds of its exchanges and the server side's peak MB."""
    seconds: list[float] = []

    def on_log(line: str) -> None:
        if match := _TOOK.match(line):
            seconds.append(float(match[1]))
            progress(f"rounds: {title}: exchange {len(seconds)} of {1 + _EXCHANGES} took {match[1]} s")

    progress(f"rounds: {title}: starting")
    agents = {f"site{number}": f"unix:///none/{number}.sock" for number in range(sites)}
    with flower_engine(folder / "engine", sites=agents, tuning=tuning) as engine:
        token = (folder / "engine" / "token").read_text()
        with _peak_mb(token) as peak:
            engine.run({"study-dir": str(folder)}, fab=fab, on_log=on_log)
    return statistics.median(seconds[1:]), sum(peak.values())


@contextmanager
def _peak_mb(token: str) -> Iterator[dict[int, float]]:
    """Fill a mapping from pid to peak resident MB of the server side's processes until the end."""
    peak: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for pid in marked_processes(token):
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_text()
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                if any(program in command for program in _SERVER_PROGRAMS):
                    peak[pid] = int(status.split("VmHWM:")[1].split()[0]) / 1000

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def _fab(folder: Path, server: str, client: str) -> Path:
    fab = folder / "fab"
    fab.mkdir()
    project = (FAB / "pyproject.toml").read_text()
    entries = project.replace("server.app:app", f"{server}:app").replace("client.app:app", f"{client}:app")
    (fab / "pyproject.toml").write_text(entries)
    (fab / "README.md").write_bytes((FAB / "README.md").read_bytes())
    return fab
