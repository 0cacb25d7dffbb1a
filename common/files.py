"""Atomic and durable files: a reader sees the old content or the new, never half of it.

Guarantees: after `write_atomic` returns, the content survives a power cut (file and directory are
fsynced); what `append_durable` adds is there whole or not at all, also where the disk is full. Temporary
files carry the suffix `.partial` and the writer's pid, and are safe to delete.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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


def read_settings(path: Path) -> Any:
    """Read a JSON file that may not be there yet; None where it is not.

    Raises ValueError that names the file, for the caller to name, where it cannot be read or is no JSON: then
    making it anew is not what helps.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{path}: expected a file that this account can read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file; restore it from a backup") from error


def cut_torn_line(path: Path) -> bytes:
    """Cut off a log's torn last line, left by a crash in the middle of an append; returns what stays."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        write_atomic(path, whole, mode=path.stat().st_mode & 0o777)
    return whole


def append_durable(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Append bytes to `path` and fsync before returning; the caller owns record framing.

    Where that fails, the file is as it was. One process at a time appends.
    """
    new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, mode)
    try:
        append_whole(descriptor, data, end=os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    if new:
        sync_directory(path.parent)


def append_whole(descriptor: int, data: bytes, *, end: int) -> None:
    """Write all of `data` at the file's `end` and fsync; where that fails, the file ends at `end` again."""
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], end + written)
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, end)
        raise


def sync_directory(path: Path) -> None:
    """fsync a directory so that renames and creations in it are durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
