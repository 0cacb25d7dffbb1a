"""Kills what an engine started, when the engine's own process is gone (even by kill -9).

Every process of an engine carries a random marker in its environment, and so do its children. The guardian
holds the reading end of a pipe; when the pipe closes it sends SIGKILL to every process with the marker
until none is left. It runs as a script with the standard library alone, so that it starts in milliseconds.

It does not survive its own kill -9, and sees only processes of the same user (Linux: /proc/PID/environ).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

MARKER = "FEDRAD_ENGINE"


def marked_processes(token: str) -> list[int]:
    """Return the pids, this process excepted, whose environment carries the engine's token."""
    wanted = f"{MARKER}={token}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as handle:
            if wanted in handle.read().split(b"\0"):
                found.append(int(name))
    return found


def kill_marked(token: str, *, timeout_s: float = 10.0) -> list[int]:
    """Send SIGKILL to every marked process until none is left; return those that would not go."""
    end = time.monotonic() + timeout_s
    while True:
        pids = marked_processes(token)
        if not pids or time.monotonic() > end:
            return pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def main() -> None:
    """Wait until stdin closes, then kill the marked processes, twice: one may have been about to start."""
    sys.stdin.buffer.read()
    if marked_processes(sys.argv[1]):
        kill_marked(sys.argv[1])
        time.sleep(0.5)
        kill_marked(sys.argv[1])


if __name__ == "__main__":
    main()
