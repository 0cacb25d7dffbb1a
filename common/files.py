"""Atomic and durable files: a reader sees the old content or the new, never half of it.

Guarantees: after `write_atomic` returns, the content survives a power cut (file and directory are
fsynced). Temporary files carry the suffix `.partial` and the writer's pid, and are safe to delete.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, *pieces: bytes | bytearray | memoryview, mode: int = 0o644) -> None:
    """Write bytes, in one or several pieces, to `path` by temp file, fsync, rename and directory fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.writelines(pieces)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def cut_torn_line(path: Path) -> bytes:
    """Cut off a log's torn last line, left by a crash in the middle of an append; returns what stays."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        write_atomic(path, whole, mode=path.stat().st_mode & 0o777)
    return whole


def append_durable(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Append bytes to `path` and fsync before returning; the caller owns record framing."""
    new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
    with os.fdopen(descriptor, "ab") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    if new:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """fsync a directory so that renames and creations in it are durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
