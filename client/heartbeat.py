"""A long-lived program's sign of life: a small file that it writes again and again, and how it is read.

Guarantees: the file is gone after a clean end, and old or of a process that is gone after any other. A
process is looked for by its number only where writer and reader see the same processes: in containers the
file's age alone speaks. It does not say that the program works, only that it lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomic

AGENT_NAME = "agent.json"
LINK_NAME = "link.json"
BEAT_S = 30.0
STALE_S = 90.0
_TICK_S = 1.0


def whoami() -> dict[str, Any]:
    """Return what a program says of itself in its file: its process and the namespace of that number."""
    return {"pid": os.getpid(), "pid_namespace": _namespace()}


def heard(path: Path, *, now: float) -> dict[str, Any] | None:
    """Read a sign of life; None where there is none, it is old, or its process is known to be gone.

    `now` is Unix seconds.
    """
    try:
        value = json.loads(path.read_text())
        age_s = now - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and age_s < STALE_S and _may_live(value) else None


def beat_until(
    stop: threading.Event,
    *,
    path: Path,
    keys: Sequence[Path],
    tick_s: float = _TICK_S,
    beat_s: float = BEAT_S,
) -> bool:
    """Give signs of life until `stop` is set, or until one of `keys`, read once, has changed; tell whether.

    What cannot be written (a full disk) is left out: the file then grows old. A key that is missing is one
    that is being changed.
    """
    known = _digest(keys)
    due = 0.0
    try:
        while not stop.is_set():
            now = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps
            if now >= due:
                with contextlib.suppress(OSError):
                    write_atomic(path, json.dumps(whoami()).encode())
                due = now + beat_s
            stop.wait(tick_s)
            with contextlib.suppress(OSError):
                if _digest(keys) != known:
                    return True
        return False
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _digest(paths: Sequence[Path]) -> list[bytes]:
    return [hashlib.sha256(path.read_bytes()).digest() for path in paths]


def _may_live(value: dict[str, Any]) -> bool:
    """Whether the writer may be there: a number of another PID namespace says nothing."""
    if value.get("pid_namespace") != _namespace():
        return True
    return Path(f"/proc/{value.get('pid')}").exists()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
