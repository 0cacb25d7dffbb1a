"""A release merged into its base: one checkpoint of plain weights, made once, kept in the site's cache.

Guarantees: base and release are only read; a copy is used only whole, checked by hash, and a damaged one is
made again; a process that is killed leaves nothing that is taken for a copy; the two used last are kept.
It costs 4 bytes of disk per weight and copy, and about as much memory while one is made (`merge_bytes`).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from pathlib import Path

from common.canonical import sha256_hex
from common.errors import ServingRefused
from common.files import sync_directory, write_atomic
from common.model.manifest import tensor_shapes
from common.model.release import Release

_KEPT = 2
_LIST = "merged.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def merge_release(release: Release, *, base: Path, into: Path) -> Path:
    """Write base and adapter as one checkpoint into a fresh directory, or find it there; returns it.

    The sum is taken once, in float32, from the base's own files: repeated merging in place drifts. One
    process merges at a time, others wait. Raises ServingRefused where the disk has no room.
    """
    into.mkdir(parents=True, exist_ok=True)
    with (into / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        final = merged_directory(release, into=into)
        if final.is_dir():
            if _is_whole(final):
                os.utime(final)
                return final
            shutil.rmtree(final)
        for left in into.glob(".*.partial"):
            shutil.rmtree(left)
        copies = [path for path in into.iterdir() if path.is_dir()]
        for old in sorted(copies, key=lambda path: path.stat().st_mtime)[: 1 - _KEPT]:
            shutil.rmtree(old)
        _verify_room(into, merge_bytes(base))
        staging = into / f".{final.name}.partial"
        staging.mkdir()
        _write(release, base, staging)
        os.replace(staging, final)
        sync_directory(into)
        return final


def merged_directory(release: Release, *, into: Path) -> Path:
    """Name the copy of a release and its pinned base."""
    pinned = sha256_hex(repr(release.study.base.files).encode())[:12]
    return into / f"{release.note.adapter_sha256[:24]}-{pinned}"


def merge_bytes(base: Path) -> int:
    """Count what a merged copy takes on disk, and about what making it takes in memory: float32."""
    return 4 * sum(math.prod(shape) for shape in tensor_shapes(base).values())


def _write(release: Release, base: Path, staging: Path) -> None:
    import torch

    from common.model.loading import load_adapted

    adapted = load_adapted(base, release.study.adapter)
    adapted.write_vector(release.adapter)
    with torch.no_grad():
        adapted.model.merge_and_unload().save_pretrained(staging)
    for path in base.iterdir():
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (staging / path.name).exists():
            shutil.copyfile(path, staging / path.name)
    hashes = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
    write_atomic(staging / _LIST, json.dumps(hashes, indent=1).encode())


def _verify_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ServingRefused(
            f"{folder}: expected {needed / 1e9:.1f} GB free for the merged copy, got {free / 1e9:.1f} GB; "
            "without --merge none is needed"
        )


def _is_whole(directory: Path) -> bool:
    try:
        hashes = json.loads((directory / _LIST).read_text())
        return all(_sha256(directory / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
