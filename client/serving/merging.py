"""A release merged into its base: one checkpoint of plain weights, made once, kept in the site's cache.

Guarantees: base and release are only read; copies are whole or not there (`copies`). One costs 4 bytes of
disk per weight, and about as much memory while it is made (`merge_bytes`).
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from client.serving.copies import kept_copy
from common.canonical import sha256_hex
from common.model.manifest import tensor_shapes
from common.model.release import Release

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def merge_release(release: Release, *, base: Path, into: Path) -> Path:
    """Write base and adapter as one checkpoint into a fresh directory, or find it there; returns it.

    The sum is taken once, in float32, from the base's own files: repeated merging in place drifts. Raises
    ServingRefused where the disk has no room.
    """
    name = merged_name(release)
    return kept_copy(
        into, name, needed_bytes=merge_bytes(base), make=lambda folder: _write(release, base, folder)
    )


def merged_name(release: Release) -> str:
    """Name the copy of a release and its pinned base."""
    pinned = sha256_hex(repr(release.study.base.files).encode())[:12]
    return f"{release.note.adapter_sha256[:24]}-{pinned}"


def merge_bytes(base: Path) -> int:
    """Count what a merged copy takes on disk, and about what making it takes in memory: float32."""
    return 4 * sum(math.prod(shape) for shape in tensor_shapes(base).values())


def _write(release: Release, base: Path, folder: Path) -> None:
    import torch

    from common.model.loading import load_adapted

    adapted = load_adapted(base, release.study.adapter)
    adapted.write_vector(release.adapter)
    with torch.no_grad():
        adapted.model.merge_and_unload().save_pretrained(folder)
    for path in base.iterdir():
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
