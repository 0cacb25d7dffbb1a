"""Seconds, CPU-seconds and memory of a round: FedRad's machinery beside plain Flower in the same run.

A FedRad round is two exchanges, as in the steady state of secure aggregation: signed vectors down and
others up (large), then little both ways (small); through server/cohort.py, the relaying ClientApp and the
socket of agents that compute nothing (`exchange_study`). Plain Flower's round is one exchange of its FedAvg
strategy on arrays of the same size, with Flower's default settings, on the same TLS, node authentication and
SQLite state. Ratios are per exchange of vectors. The first round of a run warms up and is left out; of the
others the median counts, for CPU-seconds the mean.

CPU-seconds are those of all processes of the engine and the agents, looked at every 0.25 s, so that what a
process spent in its last moments is missing. Masking, noise and training are not in it: `secagg`, `noise`,
`dp_step`. In process, sites send the same bytes each time, so that nothing but the engine takes time.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from deploy.local.flower import FAB, PLAIN_FLOWER, Tuning, flower_engine
from deploy.local.guardian import marked_processes
from deploy.local.inprocess import calling, run_inprocess
from deploy.local.processes import command_line
from server.cohort import Cohort
from tests.benchmarks.exchange_study import EchoAgent, Plan, run_exchanges

MB = 1_000_000
_ROUNDS = 3
_TOOK = re.compile(r"(large|small) exchange took ([0-9.]+) s")
_SERVER_PROGRAMS = ("flower-superlink", "flower-superexec", "flwr-serverapp")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Progress = Callable[[str], None]
Seconds = dict[str, list[float]]


@dataclass
class Usage:
    """CPU-seconds by process so far and peak MB by process of the server side; `marks` at ends of rounds."""

    cpu_s: dict[int, float] = field(default_factory=dict)
    peak_mb: dict[int, float] = field(default_factory=dict)
    marks: list[float] = field(default_factory=list)

    @property
    def cpu_s_per_round(self) -> float:
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)

    def look(self, token: str) -> None:
        for pid in marked_processes(token):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            self.cpu_s[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            if any(program in command_line(pid) for program in _SERVER_PROGRAMS) and "VmHWM:" in status:
                self.peak_mb[pid] = int(status.split("VmHWM:")[1].split()[0]) / 1000


def run(progress: Progress) -> dict[str, float]:
    """Measure and return the keys of DESIGN.md, "Benchmarks", `rounds`, and what they are made of."""
    results: dict[str, float] = {}
    wall, cpu = _in_process(5, progress)
    results |= {"round_overhead_s_inprocess_5x20mb": wall, "round_cpu_s_inprocess_5x20mb": cpu}
    for sites in (2, 5, 8):
        case = f"{sites}x20mb"
        plain, plain_usage = _plain_flower(sites, progress)
        fedrad, usage = _fedrad(sites, 20 * MB, progress)
        exchange, plain_exchange = _median(fedrad["large"]), _median(plain["large"])
        results |= {
            f"plain_flower_exchange_s_{case}": plain_exchange,
            f"plain_flower_cpu_s_{case}": plain_usage.cpu_s_per_round,
            f"fedrad_exchange_s_{case}": exchange,
            f"fedrad_small_exchange_s_{case}": _median(fedrad["small"]),
            f"fedrad_round_cpu_s_{case}": usage.cpu_s_per_round,
            f"round_ratio_to_plain_flower_{case}": exchange / plain_exchange,
            f"server_peak_mb_{case}": sum(usage.peak_mb.values()),
            f"plain_flower_server_peak_mb_{case}": sum(plain_usage.peak_mb.values()),
        }
    for sites in (2, 5, 8):
        _, usage = _fedrad(sites, 5 * MB, progress)
        results[f"server_peak_mb_{sites}x5mb"] = sum(usage.peak_mb.values())
    return results


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds[1:])


def _in_process(sites: int, progress: Progress) -> tuple[float, float]:
    """Return wall and CPU seconds of a round (both exchanges) in this process."""
    progress(f"rounds: {sites} sites in process")
    plan = Plan(sites, 20 * MB, 2 * _ROUNDS, fresh=False)
    app, seconds, cpu = ServerApp(), defaultdict[str, list[float]](list), [time.process_time()]

    def took(kind: str, value: float) -> None:
        seconds[kind].append(value)
        if kind == "small":
            cpu.append(time.process_time())

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_exchanges(Cohort(grid, plan.study), plan, took)

    run_inprocess(
        app,
        calling({site: EchoAgent(plan, site) for site in plan.names}),
        node_configs={100 + number: {"site": site} for number, site in enumerate(plan.names)},
        run_config={},
    )
    return _median(seconds["large"]) + _median(seconds["small"]), (cpu[-1] - cpu[1]) / (len(cpu) - 2)


def _plain_flower(sites: int, progress: Progress) -> tuple[Seconds, Usage]:
    with tempfile.TemporaryDirectory(prefix="fedrad-rounds-") as name:
        folder = Path(name)
        (folder / "plan").write_text(f"{sites} {_ROUNDS} {20 * MB}")
        fab = _fab(folder, "tests.benchmarks.plain_server", "tests.benchmarks.plain_client")
        plan = Plan(sites, 20 * MB, 0)
        return _on_flower(folder, plan, fab, PLAIN_FLOWER, f"plain Flower, {sites} sites", progress)


def _fedrad(sites: int, size: int, progress: Progress) -> tuple[Seconds, Usage]:
    with tempfile.TemporaryDirectory(prefix="fedrad-rounds-") as name:
        folder = Path(name)
        plan = Plan(sites, size, _ROUNDS)
        (folder / "plan").write_text(plan.format())
        fab = _fab(folder, "tests.benchmarks.exchange_server", "client.app")
        return _on_flower(folder, plan, fab, Tuning(), f"FedRad, {sites} sites, {size // MB} MB", progress)


def _on_flower(
    folder: Path, plan: Plan, fab: Path, tuning: Tuning, title: str, progress: Progress
) -> tuple[Seconds, Usage]:
    """Run one app pair; return the seconds of its exchanges by kind, and what its processes used."""
    seconds: Seconds = defaultdict(list)
    last = "small" if plan.exchanges else "large"
    progress(f"rounds: {title}: starting")
    with tempfile.TemporaryDirectory(prefix="fedrad-") as sockets:
        agents = {site: f"unix://{sockets}/{site}.sock" for site in plan.names}
        with flower_engine(folder / "engine", sites=agents, tuning=tuning) as engine:
            token = (folder / "engine" / "token").read_text()
            if plan.exchanges:
                command = [sys.executable, "-m", "tests.benchmarks.exchange_study", plan.format(), sockets]
                engine.processes.start("agents", command, environment=dict(os.environ))
                engine.processes.wait_until(
                    lambda: all(Path(sockets, f"{site}.sock").exists() for site in plan.names),
                    what="the agents to listen",
                    timeout_s=60.0,
                )
            with _watched(token) as usage:

                def on_log(line: str) -> None:
                    if match := _TOOK.match(line):
                        seconds[match[1]].append(float(match[2]))
                        progress(f"rounds: {title}: {match[0]}")
                        if match[1] == last:
                            usage.look(token)
                            usage.marks.append(sum(usage.cpu_s.values()))

                engine.run({"study-dir": str(folder)}, fab=fab, on_log=on_log)
    return seconds, usage


@contextmanager
def _watched(token: str) -> Iterator[Usage]:
    """Look at the engine's processes until the end."""
    usage, over = Usage(), threading.Event()

    def watch() -> None:
        while not over.wait(0.25):
            usage.look(token)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield usage
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
