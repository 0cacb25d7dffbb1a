"""Flower's own processes on loopback: SuperLink, SuperExecs and one SuperNode per site.

Guarantees: TLS with a throw-away authority, node authentication by key, process isolation with a SuperExec
secret on both sides, telemetry, update check and runtime installation off; every port on 127.0.0.1; a dead
process and a failed run are named errors; all processes end with the context (`processes`).

It does not resume: Flower's state of an earlier run on the same directory is discarded, since Flower cannot
take up a run whose ServerApp died. Resuming a study is the ServerApp's business, by its study directory.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

import deploy
from common.errors import EngineFailed, RunFailed
from common.files import write_atomic
from deploy.local.certificates import LoopbackTls, write_loopback_tls, write_node_key
from deploy.local.control import Control, RunStatus
from deploy.local.processes import Processes, processes, tail

FAB = Path(__file__).parent / "fab"

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 120.0
_STATUS_POLL_S = 0.5
_SILENCE_S = 60.0
_END_GRACE_S = 5.0
_LOG_FAILURES = 5
_LOG_WAIT_S = 20.0
_SERVERAPP = "flwr-serverapp"
PRELOAD = ("client.app", "client.service", "common.protocol")
# For the processes that carry vectors: a part of 4 MiB that was joined goes back to the system at once, and
# threads that each keep a heap of 20 MB messages do not add up to gigabytes. Not for the agent: it computes,
# and with this its training step takes 1.65 times the CPU time (docs/protocol/secagg.md).
CARRIER_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_AGENT = re.compile(r"unix:///[^\"'\\\x00-\x1f\x7f]+")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tuning:
    """How Flower's waiting and process starts are cut; the SuperNode's own 3 s poll has no setting."""

    task_poll_s: float = 0.2
    fork_client_apps: bool = True


PLAIN_FLOWER = Tuning(task_poll_s=1.0, fork_client_apps=False)


class FlowerEngine:
    """A running SuperLink with its sites; made by `flower_engine`."""

    def __init__(self, group: Processes, control: Control, nodes: Mapping[str, int]) -> None:
        self._group = group
        self._control = control
        self.nodes = dict(nodes)

    @property
    def processes(self) -> Processes:
        """The group that the engine's processes are in."""
        return self._group

    def run(
        self,
        run_config: Mapping[str, str | int | float | bool],
        *,
        fab: Path = FAB,
        on_log: Progress = lambda line: None,
    ) -> None:
        """Run the FAB's ServerApp to its end.

        Each line of the ServerApp's output goes to `on_log` (from another thread) and to
        `logs/serverapp.log`. Raises RunFailed when the ServerApp failed, ProcessDied when a process did.
        """
        run_id = self._control.start_run(fab, run_config)
        log = self._group.logs / "serverapp.log"
        finished = threading.Event()
        follower = threading.Thread(
            target=_follow_log, args=(self._control, run_id, log, on_log, finished), daemon=True
        )
        follower.start()
        try:
            status = self._follow(run_id)
        finally:
            finished.set()
        follower.join(timeout=_LOG_WAIT_S)
        if not status.completed:
            raise RunFailed(
                f"the ServerApp ended {status.text}: {status.details or 'no details'}; the end of {log}:\n"
                f"{tail(log)}"
            )

    def _follow(self, run_id: int) -> RunStatus:
        """Wait for the end of a run; a SuperLink that is busy for a moment is asked again.

        Flower itself notices a killed ServerApp only when its lease is over, after a minute.
        """
        heard = alive = time.monotonic()
        seen = False
        while True:
            self._group.check()
            if self._group.has(_SERVERAPP):
                seen, alive = True, time.monotonic()
            elif seen and time.monotonic() - alive > _END_GRACE_S:
                raise RunFailed(
                    "the ServerApp's process was killed; the same command takes the study up again"
                )
            try:
                status = self._control.run_status(run_id)
                heard = time.monotonic()
                if status.finished:
                    return status
            except httpx.HTTPError as failure:
                if time.monotonic() - heard > _SILENCE_S:
                    raise EngineFailed(
                        f"no answer from the SuperLink for {_SILENCE_S:g} s: {failure}"
                    ) from failure
            time.sleep(_STATUS_POLL_S)


@contextlib.contextmanager
def flower_engine(
    directory: Path,
    *,
    sites: Mapping[str, str],
    progress: Progress = lambda line: None,
    python_path: tuple[Path, ...] = (),
    tuning: Tuning = Tuning(),
) -> Iterator[FlowerEngine]:
    """Start Flower for `sites` in a directory of its own (emptied first), and end it on leaving.

    As `flower_among`, which takes a group of processes that holds the site agents too.
    """
    with (
        processes(directory) as group,
        flower_among(group, sites=sites, progress=progress, python_path=python_path, tuning=tuning) as engine,
    ):
        yield engine


@contextlib.contextmanager
def flower_among(
    group: Processes,
    *,
    sites: Mapping[str, str],
    progress: Progress = lambda line: None,
    python_path: tuple[Path, ...] = (),
    tuning: Tuning = Tuning(),
) -> Iterator[FlowerEngine]:
    """Start Flower for `sites` (site id to agent socket, `unix:///…`) among the processes of a group.

    `python_path` is put before the folder of the FedRad packages in the module path of ServerApp and
    ClientApps. The processes end with the group. Raises ProcessDied, ProcessNotReady, EngineFailed.
    """
    for site, agent in sites.items():
        if not _SITE.fullmatch(site):
            raise EngineFailed(f"expected a site id of letters, digits, dot, dash, underscore, got {site!r}")
        if not _AGENT.fullmatch(agent):
            raise EngineFailed(f"expected an agent address unix:///… without quotes, got {agent!r}")
    start = _Start(group, python_path, tuning)
    progress("starting SuperLink")
    start.superlink()
    runtimes = {site: start.superexec_of(site) for site in sites}
    with contextlib.closing(Control(start.address, start.tls.authority)) as control:
        group.wait_until(control.is_up, what="the SuperLink to answer", timeout_s=_START_TIMEOUT_S)
        start.superexec()
        nodes = {}
        for site, agent in sites.items():
            key = group.directory / "keys" / f"{site}.node"
            nodes[site] = control.register_node(write_node_key(key), name=site)
            start.supernode(site, agent, key, runtimes[site])
        progress(f"waiting for {len(sites)} SuperNodes")
        group.wait_until(
            lambda: control.online_nodes() >= set(nodes.values()),
            what=f"{len(sites)} SuperNodes online",
            timeout_s=_START_TIMEOUT_S,
        )
        progress("Flower is up")
        yield FlowerEngine(group, control, nodes)


class _Start:
    """Command lines, ports and files of one engine."""

    def __init__(self, group: Processes, python_path: tuple[Path, ...], tuning: Tuning) -> None:
        directory = self._directory = group.directory
        self._group = group
        self._tuning = tuning
        self._python_path = (*python_path, Path(deploy.__file__).parents[1])
        self.tls: LoopbackTls = write_loopback_tls(directory / "tls", now=datetime.datetime.now(datetime.UTC))
        self._secret = directory / "keys" / "superexec.secret"
        write_atomic(self._secret, secrets.token_bytes(32), mode=0o600)
        self.address = f"{_HOST}:{free_port()}"

    def superlink(self) -> None:
        """Start the SuperLink."""
        state = self._directory / "state"
        state.mkdir()
        self._start(
            "superlink",
            flower_program("flower-superlink"),
            *("--ssl-ca-certfile", str(self.tls.authority)),
            *("--ssl-certfile", str(self.tls.certificate), "--ssl-keyfile", str(self.tls.key)),
            *("--host", _HOST, "--port", self.address.rpartition(":")[2]),
            *("--database", str(state / "superlink.db"), "--enable-supernode-auth"),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret)),
            "--disable-runtime-dependency-installation",
        )

    def superexec(self) -> None:
        """Start what runs ServerApps; the SuperLink must answer."""
        self._start("superexec", flower_program("flower-superexec"), *self._superexec_arguments(self.address))

    def superexec_of(self, site: str) -> str:
        """Start what runs a site's ClientApps; return the address where it looks for the SuperNode."""
        runtime = f"{_HOST}:{free_port()}"
        program: tuple[str, ...] = (flower_program("flower-superexec"),)
        if self._tuning.fork_client_apps:
            options = ["--poll-s", str(self._tuning.task_poll_s)]
            for module in PRELOAD:
                options += ["--preload", module]
            program = (sys.executable, "-m", "deploy.local.executor", *options)
        self._start(f"superexec-{site}", *program, *self._superexec_arguments(runtime))
        return runtime

    def supernode(self, site: str, agent: str, key: Path, runtime: str) -> None:
        """Start a site's SuperNode, whose key must be registered."""
        self._start(
            f"supernode-{site}",
            sys.executable,
            *("-m", "client.supernode"),
            *("--superlink", self.address, "--root-certificates", str(self.tls.authority)),
            *("--auth-supernode-private-key", str(key)),
            *("--host", _HOST, "--port", runtime.rpartition(":")[2]),
            *("--ssl-ca-certfile", str(self.tls.authority)),
            *("--ssl-certfile", str(self.tls.certificate), "--ssl-keyfile", str(self.tls.key)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret)),
            *("--node-config", f'site="{site}" agent="{agent}"'),
        )

    def _superexec_arguments(self, runtime: str) -> tuple[str, ...]:
        return (
            *("--runtime-api-address", runtime, "--root-certificates", str(self.tls.authority)),
            *("--superexec-auth-secret-file", str(self._secret)),
        )

    def _start(self, name: str, program: str, *arguments: str) -> None:
        home = self._directory / "homes" / name
        home.mkdir(parents=True)
        self._group.start(name, [program, *arguments], environment=self._environment(home))

    def _environment(self, home: Path) -> dict[str, str]:
        return flower_environment(home, self._python_path, self._tuning)


def flower_environment(home: Path, python_path: tuple[Path, ...], tuning: Tuning) -> dict[str, str]:
    """Make the environment of a Flower program: its own home, no telemetry, no proxy, few threads."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") and not name.lower().endswith("_proxy")
    }
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(tuning.task_poll_s),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **CARRIER_MEMORY,
    }


def flower_program(name: str) -> str:
    """Find a Flower program beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise EngineFailed(
            f"expected the program {name} of the package flwr beside {sys.executable}, got none"
        )
    return found


def free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _follow_log(
    control: Control, run_id: int, log: Path, on_log: Progress, finished: threading.Event
) -> None:
    """Copy the ServerApp's output to file and callback; take the stream up again whenever it ends early."""
    after = 0.0
    rest = ""
    failures = 0
    with log.open("a", encoding="utf-8") as file:
        while failures < _LOG_FAILURES:
            run_was_over = finished.is_set()
            try:
                for text, timestamp in control.log_text(run_id, after):
                    after = timestamp
                    file.write(text)
                    file.flush()
                    *lines, rest = (rest + text).split("\n")
                    for line in lines:
                        on_log(line)
                if run_was_over:
                    break
            except (httpx.HTTPError, httpx.StreamError, ValueError, RuntimeError):
                failures += run_was_over
            finished.wait(0.5)
    if rest:
        on_log(rest)
