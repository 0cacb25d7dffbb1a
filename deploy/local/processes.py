"""Processes of one local engine: started, watched and ended together.

Guarantees: a process that ends by itself is a named error with the end of its log; leaving the context (by
return, exception, Ctrl-C or SIGTERM) ends every process and all their children; a kill -9 of this process
does too (`guardian`); a start on the directory of a killed run first ends what that run may have left; two
runs never share a directory.

It does not restart anything: the caller decides, and a local run simply ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from common.errors import EngineBusy, EngineFailed, ProcessDied, ProcessNotReady
from deploy.local.guardian import MARKER, kill_marked, marked_processes
from deploy.local.guardian import __file__ as guardian_script

_LOG_TAIL_LINES = 15
_POLL_S = 0.05


@dataclass(frozen=True)
class _Running:
    name: str
    log: Path
    process: subprocess.Popen[bytes]


class Processes:
    """The processes of one engine; made by `processes`, which also ends them."""

    def __init__(self, directory: Path, token: str) -> None:
        self._directory = directory
        self._logs = directory / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._token = token
        self._running: dict[str, _Running] = {}

    @property
    def directory(self) -> Path:
        """Folder for everything that need not survive the engine; readable by its user only."""
        return self._directory

    @property
    def logs(self) -> Path:
        """Folder with one log file per process."""
        return self._logs

    def start(self, name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> int:
        """Start a command with exactly this environment, its output in `logs/NAME.log`; return its pid."""
        if name in self._running:
            raise EngineFailed(f"a process named {name} runs already")
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, MARKER: self._token},
                start_new_session=True,
            )
        self._running[name] = _Running(name, log, process)
        return process.pid

    def pid(self, name: str) -> int:
        """Return the process id of a running process."""
        return self._running[name].process.pid

    def has(self, program: str) -> bool:
        """Tell whether this program runs among the processes or their children."""
        return any(program in command_line(pid) for pid in marked_processes(self._token))

    def check(self) -> None:
        """Raise ProcessDied if any process has ended by itself."""
        for running in self._running.values():
            code = running.process.poll()
            if code is not None:
                how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
                raise ProcessDied(
                    f"expected {running.name} to run until the end, got {how}; "
                    f"the end of {running.log}:\n{tail(running.log)}"
                )

    def wait_until(self, ready: Callable[[], bool], *, what: str, timeout_s: float) -> None:
        """Poll `ready` while watching all processes; raise ProcessDied or ProcessNotReady(what)."""
        end = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > end:
                raise ProcessNotReady(f"expected {what} within {timeout_s:g} s; logs are in {self._logs}")
            time.sleep(_POLL_S)

    def stop(self, name: str, *, grace_s: float = 3.0) -> None:
        """End one process and its group: SIGTERM, then SIGKILL after `grace_s` seconds."""
        self._end([self._running.pop(name)], grace_s)

    def stop_all(self, *, grace_s: float = 3.0) -> None:
        """End all processes and everything they started; raise EngineFailed if one will not go."""
        ending = list(self._running.values())
        self._running.clear()
        self._end(ending, grace_s)
        left = kill_marked(self._token)
        if left:
            raise EngineFailed(f"expected no process left over, got {left}")

    @staticmethod
    def _end(ending: list[_Running], grace_s: float) -> None:
        for running in ending:
            _signal_group(running.process, signal.SIGTERM)
        end = time.monotonic() + grace_s
        for running in ending:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, end - time.monotonic()))
        for running in ending:
            _signal_group(running.process, signal.SIGKILL)
            running.process.wait()


@contextlib.contextmanager
def processes(directory: Path) -> Iterator[Processes]:
    """Own `directory` (its old content is discarded) and the processes started in it, until the end.

    Raises EngineBusy when a living process owns the directory.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock")):
        _discard(directory)
        directory.mkdir(mode=0o700)
        token = secrets.token_hex(16)
        (directory / "token").write_text(token)
        guardian = _start_guardian(token)
        try:
            with _termination_raises():
                group = Processes(directory, token)
                try:
                    yield group
                finally:
                    group.stop_all()
        finally:
            if guardian.stdin is not None:
                guardian.stdin.close()
            guardian.wait()


def tail(log: Path, lines: int = _LOG_TAIL_LINES) -> str:
    """Return the last lines of a log file, or a note that there are none."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(empty)"


def command_line(pid: int) -> str:
    """Return a process's command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _discard(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        left = kill_marked((directory / "token").read_text())
        if left:
            raise EngineBusy(
                f"expected the processes of an earlier run in {directory} to be gone, got {left}"
            )
    if directory.exists():
        shutil.rmtree(directory)


def _start_guardian(token: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guardian_script, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the group that a process leads; its children may outlive the leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        _lock(handle, path)
        yield


def _lock(handle: IO[str], path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EngineBusy(f"expected no other run on this directory, but {path} is locked") from None


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that `finally` runs; only possible in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
