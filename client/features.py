"""Features of the frozen vision tower for a site's images, computed once per base and data.

Guarantees: features are keyed by the base's pinned files and the images' own SHA-256, so they are never
used across a change of either; the cache file appears whole or not at all. Features stay at the site: they
are as private as the images. Above `max_cache_bytes` nothing is stored and features are computed on demand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.canonical import canonical_json, sha256_hex
from common.config import FileHash

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
_BATCH = 64


class Features:
    """Vision features by image index: `rows([i, …])` gives float32 [len, N, D]."""

    def __init__(self, array: Any, compute: Callable[[Sequence[int]], torch.Tensor] | None) -> None:
        self._array = array
        self._compute = compute

    def rows(self, indices: Sequence[int]) -> torch.Tensor:
        import torch

        if self._array is not None:
            return torch.from_numpy(np.array(self._array[list(indices)], dtype=np.float32))
        if self._compute is None:
            raise IndexError("expected stored features or a way to compute them, got neither")
        return self._compute(indices)


def load_features(
    model: Any,
    images: Sequence[Path],
    *,
    base: Path,
    base_files: tuple[FileHash, ...],
    cache: Path,
    progress: Progress,
    max_cache_bytes: int = 8 << 30,
) -> Features:
    """Read or compute the features of `images`; raises ImageUnreadable naming the file.

    Every image is decoded on the first pass, so a damaged file is found before a round starts.
    """
    from common.model.images import load_pixels
    from common.model.llava import vision_features

    def compute(indices: Sequence[int]) -> torch.Tensor:
        import torch

        pixels = torch.from_numpy(np.stack([load_pixels(images[i], base) for i in indices]))
        return vision_features(model, pixels).float().cpu()

    key = _cache_key(images, base_files)
    path = cache / f"features-{key}.npy"
    if path.is_file():
        return Features(np.load(path, mmap_mode="r", allow_pickle=False), None)
    if not images:
        return Features(np.zeros((0, 0, 0), np.float32), None)
    first = compute([0]).numpy()
    if first.nbytes * len(images) > max_cache_bytes:
        return Features(None, compute)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f".{path.name}.{os.getpid()}.partial"
    try:
        store = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.float32, shape=(len(images), *first.shape[1:])
        )
        for start in range(0, len(images), _BATCH):
            stop = min(start + _BATCH, len(images))
            store[start:stop] = compute(range(start, stop)).numpy()
            progress("vision features", stop, len(images))
        store.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Features(np.load(path, mmap_mode="r", allow_pickle=False), None)


def _cache_key(images: Sequence[Path], base_files: tuple[FileHash, ...]) -> str:
    hashes = []
    for path in images:
        with path.open("rb") as handle:
            hashes.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return sha256_hex(canonical_json([[file.path, file.sha256] for file in base_files] + hashes))[:32]
