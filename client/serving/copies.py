"""Large files made from a release and kept in the site's cache: whole, checked, a few of them.

Guarantees: a copy is returned only whole, checked by hash, and a damaged one is made again; a process that is
killed leaves nothing that is taken for a copy; one process makes copies of a folder at a time, others wait;
a disk without room is named before anything is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import ServingRefused
from common.files import sync_directory, write_atomic

KEPT = 2
_LIST = "copy.json"


def kept_copy(into: Path, name: str, *, needed_bytes: int, make: Callable[[Path], None]) -> Path:
    """Find the directory `name`, or have `make` fill an empty one; the copies used last are kept.

    Raises ServingRefused where the disk has no room, and what `make` raises.
    """
    into.mkdir(parents=True, exist_ok=True)
    with (into / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        final, staging = into / name, into / f".{name}.partial"
        if final.is_dir():
            if _is_whole(final):
                os.utime(final)
                return final
            shutil.rmtree(final)
        for left in into.glob(".*.partial"):
            shutil.rmtree(left)
        copies = [path for path in into.iterdir() if path.is_dir()]
        for old in sorted(copies, key=lambda path: path.stat().st_mtime)[: 1 - KEPT]:
            shutil.rmtree(old)
        _verify_room(into, needed_bytes)
        staging.mkdir()
        try:
            make(staging)
            hashes = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
            write_atomic(staging / _LIST, json.dumps(hashes, indent=1).encode())
            os.replace(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        sync_directory(into)
        return final


def _verify_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ServingRefused(
            f"{folder}: expected {needed / 1e9:.1f} GB free for a copy of the model, got {free / 1e9:.1f} GB"
        )


def _is_whole(directory: Path) -> bool:
    try:
        hashes = json.loads((directory / _LIST).read_text())
        return all(_sha256(directory / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
