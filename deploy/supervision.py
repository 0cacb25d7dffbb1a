"""Long-lived programs that are started again when they end, and all ended with their supervisor.

Guarantees: a program that ends is started again after 1, 2, 4 … 60 s (from 1 s again once it has run for a
minute); SIGTERM ends every program and its children; a kill -9 of the supervisor does too
(`deploy.local.guardian`); a start after that first ends what may be left; one supervisor per directory.
No `*.log` in its folder of logs, a program's or the proxy's, grows beyond 16 MiB and what comes in half a
minute: it is copied to `*.log.1`, over the one of before, and emptied; lines written meanwhile are lost.
It does not judge whether a living program works: `wait_ready` and the programs' own checks do.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import EngineBusy, EngineFailed
from deploy.local.guardian import MARKER, kill_marked
from deploy.local.guardian import __file__ as guardian_script
from deploy.local.processes import tail

log = logging.getLogger("fedrad.up")

FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
RESTLESS_ENDS = 3
_SETTLED_S = 60.0
MAX_LOG_BYTES = 16 << 20
_LOGS_S = 30.0


@dataclass(frozen=True)
class Account:
    """An operating-system account that a program runs as; `groups` are its only supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """What to run; `account` None means this process's own."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    account: Account | None = None


@dataclass
class _Running:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    due: float = 0.0
    ends: int = 0
    last: str = ""
    stopping: bool = field(default=False)


class Bearing:
    """Bears what the machine refuses while it lasts (a full disk, mostly), and says it once in the log."""

    def __init__(self) -> None:
        self.trouble = ""

    @contextlib.contextmanager
    def bear(self) -> Iterator[None]:
        """Let an OSError end this turn, not the program; the next turn tries again."""
        try:
            yield
        except OSError as error:
            text = error.strerror or type(error).__name__
            if text != self.trouble:
                log.warning("this machine refuses something, it is tried again: %s", text)
            self.trouble = text
        else:
            self.trouble = ""


class Supervisor:
    """The programs of one machine's part; made by `supervisor`, which also ends them."""

    def __init__(self, logs: Path, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._logs = logs
        self._token = token
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._capped = -1e9

    def start(self, program: Program) -> None:
        """Start a program and keep it up from now on."""
        if program.name in self._running:
            raise EngineFailed(f"a program named {program.name} runs already")
        running = _Running(program)
        self._running[program.name] = running
        self._launch(running)

    def tick(self) -> list[str]:
        """Start again what has ended and is due; return the names of programs that have just ended."""
        ended = []
        for running in self._running.values():
            process = running.process
            if process is not None and process.poll() is not None:
                ended.append(running.program.name)
                self._note_end(running, process)
            if running.process is None and self._clock() >= running.due:
                self._launch(running)
        if self._clock() - self._capped >= _LOGS_S:
            self._capped = self._clock()
            cap_logs(self._logs)
        return ended

    def pid(self, name: str) -> int | None:
        """Return the process id, None while the program waits to be started again."""
        process = self._running[name].process
        return process.pid if process is not None and process.poll() is None else None

    def state(self) -> dict[str, dict[str, object]]:
        """Say for each program whether it runs, how often it has ended, and how the last time."""
        return {
            name: {"running": self.pid(name) is not None, "ends": running.ends, "last_end": running.last}
            for name, running in self._running.items()
        }

    def signal(self, name: str, number: int) -> None:
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, number)

    def restart(self, name: str, program: Program | None = None, *, grace_s: float = 5.0) -> None:
        """End a program and start it again at once, with another command line where one is given."""
        running = self._running[name]
        self._end([running], grace_s)
        running.program = program or running.program
        running.pause_s = FIRST_PAUSE_S
        self._launch(running)

    def stop(self, name: str, *, grace_s: float = 5.0) -> None:
        if name in self._running:
            self._end([self._running.pop(name)], grace_s)

    def stop_all(self, *, grace_s: float = 10.0) -> None:
        """End all programs, the last started first, and everything they started."""
        ending = list(reversed(self._running.values()))
        self._running.clear()
        self._end(ending, grace_s)
        left = kill_marked(self._token)
        if left:
            raise EngineFailed(f"expected no process left over, got {left}")

    def _launch(self, running: _Running) -> None:
        program = running.program
        path = self._logs / f"{program.name}.log"
        account = program.account
        identity = (
            {"user": account.uid, "group": account.gid, "extra_groups": list(account.groups)}
            if account
            else {}
        )
        with path.open("ab") as output:
            running.process = subprocess.Popen(
                list(program.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**program.environment, MARKER: self._token},
                start_new_session=True,
                cwd="/",
                **identity,  # type: ignore[call-overload]
            )
        running.started = self._clock()
        log.info("started %s, pid %s", program.name, running.process.pid, extra={"reason": program.name})

    def _note_end(self, running: _Running, process: subprocess.Popen[bytes]) -> None:
        _signal_group(process, signal.SIGKILL)
        code = process.returncode
        running.last = f"exit {code}" if code >= 0 else signal.Signals(-code).name
        running.ends += 1
        running.process = None
        if self._clock() - running.started > _SETTLED_S:
            running.pause_s = FIRST_PAUSE_S
        running.due = self._clock() + running.pause_s
        name = running.program.name
        log.warning(
            "%s ended, status %s; it starts again in %s s",
            name,
            code,
            running.pause_s,
            extra={"reason": name},
        )
        if running.ends >= RESTLESS_ENDS:
            path = self._logs / f"{name}.log"
            log.warning("%s does not stay up; the end of %s: %s", name, path, tail(path, 2).strip())
        running.pause_s = min(LAST_PAUSE_S, 2 * running.pause_s)

    @staticmethod
    def _end(ending: list[_Running], grace_s: float) -> None:
        processes = [one.process for one in ending if one.process is not None]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + grace_s
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        for process in processes:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        for one in ending:
            one.process = None


@contextlib.contextmanager
def supervisor(directory: Path, *, logs: Path) -> Iterator[Supervisor]:
    """Own a directory's programs until the end; raises EngineBusy when another supervisor does."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "supervisor.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineBusy(f"{directory}: expected no other `up` on this directory, got one") from None
        token_path = directory / "supervisor.token"
        with contextlib.suppress(FileNotFoundError):
            left = kill_marked(token_path.read_text())
            if left:
                raise EngineBusy(f"{directory}: expected the programs of before to be gone, got {left}")
        token = secrets.token_hex(16)
        token_path.write_text(token)
        guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian_script, token],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        programs = Supervisor(logs, token)
        try:
            yield programs
        finally:
            try:
                programs.stop_all()
            finally:
                if guardian.stdin is not None:
                    guardian.stdin.close()
                guardian.wait()


def cap_logs(folder: Path) -> None:
    """Copy each `*.log` over 16 MiB to `*.log.1` and empty it; whoever writes must have opened it to append.

    One that cannot be copied or emptied stays as it is until the next time.
    """
    for path in folder.glob("*.log"):
        try:
            if path.is_symlink() or path.stat().st_size <= MAX_LOG_BYTES:
                continue
            kept = path.with_suffix(".log.1")
            kept.unlink(missing_ok=True)  # first, so that a full disk has room for the newer one
            shutil.copy(path, kept)
            os.truncate(path, 0)
        except OSError as error:
            log.warning("a log could not be cut: %s", error.strerror or type(error).__name__)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the group that a program led; its children may outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
