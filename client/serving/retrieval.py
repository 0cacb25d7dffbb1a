"""Prior cases of this site that look like a picture, and whose reports speak of the same findings.

A case is a pair of the site's prepared data; its vector is the mean of the frozen vision tower's features of
its first image. Nearness is the cosine of the vectors around the site's mean, plus a quarter of the overlap
(Jaccard) between the findings that the draft and the case's report state (`common/labeller.py`, English).

Guarantees: vectors are cached under the image's own SHA-256 and the base's name, so that neither can change
unseen; the cache appears whole; everything stays in this site's directory. What looks alike need not be
alike: cases are shown to read, nothing is concluded from them.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.store import Pair
from common.canonical import sha256_hex
from common.errors import DatasetInvalid, ImageUnreadable
from common.files import write_atomic
from common.labeller import present_findings

Vectors = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
VectorOf = Callable[[bytes], Awaitable[Vectors]]

FINDINGS_WEIGHT = 0.25
MAX_CASES = 100_000
_SAVE_EVERY = 500


@dataclass(frozen=True, slots=True)
class PriorCase:
    """A case that was found: `cosine` is of the pictures, -1 to 1; `shared` what both reports state."""

    number: int
    pair: Pair
    cosine: float
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CaseIndex:
    """The site's cases in memory: pairs, their vectors [M, D] around `mean` with length 1, their findings."""

    directory: Path
    pairs: tuple[Pair, ...]
    image_sha256: tuple[str, ...]
    mean: Vectors
    vectors: Vectors
    findings: tuple[frozenset[str], ...]

    def nearest(
        self, features: Vectors, *, draft: str = "", count: int = 5, except_image: str = ""
    ) -> tuple[PriorCase, ...]:
        """Find the `count` cases nearest to features [N, D], without the picture `except_image` (SHA-256)."""
        if not self.pairs:
            return ()
        asked = _unit(features.mean(0)[None] - self.mean)[0]
        cosine = self.vectors @ asked
        stated = present_findings(draft) - {"No Finding"} if draft else None
        overlap = np.array([0.0 if stated is None else _jaccard(stated, had) for had in self.findings])
        order = np.argsort(-(cosine + FINDINGS_WEIGHT * overlap), kind="stable")
        kept = [int(i) for i in order if self.image_sha256[i] != except_image][:count]
        return tuple(
            PriorCase(i, self.pairs[i], float(cosine[i]), tuple(sorted((stated or set()) & self.findings[i])))
            for i in kept
        )


async def build_index(
    directory: Path,
    pairs: Sequence[Pair],
    *,
    vector_of: VectorOf,
    base: str,
    cache: Path,
    progress: Progress = lambda what, done, total: None,
) -> CaseIndex:
    """Index a site's pairs: known vectors from `cache`, new ones by `vector_of` (file bytes → [N, D]).

    `base` names the vision tower for good, as a study's hash that pins it does; an image that cannot be
    read is left out. Raises DatasetInvalid for more than MAX_CASES pairs.
    """
    if len(pairs) > MAX_CASES:
        raise DatasetInvalid(f"expected at most {MAX_CASES} cases to index, got {len(pairs)}")
    path = cache / f"cases-{sha256_hex(base.encode())[:32]}.npz"
    known = _read_cache(path)
    kept: list[Pair] = []
    hashes: list[str] = []
    computed = 0
    for number, pair in enumerate(pairs):
        try:
            data = (directory / pair.images[0]).read_bytes()
        except OSError:
            continue
        digest = hashlib.sha256(data).hexdigest()
        if digest not in known:
            try:
                features = await vector_of(data)
            except ImageUnreadable:
                continue
            known[digest] = np.asarray(features, np.float32).mean(0)
            computed += 1
            if computed % _SAVE_EVERY == 0:
                _write_cache(path, known)
        kept.append(pair)
        hashes.append(digest)
        progress("similar cases", number + 1, len(pairs))
    if computed:
        _write_cache(path, {digest: known[digest] for digest in dict.fromkeys(hashes)})
    matrix = np.stack([known[digest] for digest in hashes]) if hashes else np.zeros((0, 1), np.float32)
    mean = matrix.mean(0) if hashes else np.zeros(1, np.float32)
    return CaseIndex(
        directory=directory,
        pairs=tuple(kept),
        image_sha256=tuple(hashes),
        mean=mean.astype(np.float32),
        vectors=_unit(matrix - mean),
        findings=tuple(present_findings(f"{p.findings} {p.impression}") - {"No Finding"} for p in kept),
    )


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Overlap of two sets of findings; two reports without findings agree."""
    return len(one & other) / len(one | other) if one | other else 1.0


def _unit(rows: Vectors) -> Vectors:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12), dtype=np.float32)


def _read_cache(path: Path) -> dict[str, Vectors]:
    """Read cached vectors; a cache that is damaged is made again."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            names, vectors = stored["sha256"], stored["vectors"].astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.isfinite(vectors).all():
        return {}
    return {str(name): vector for name, vector in zip(names, vectors, strict=True)}


def _write_cache(path: Path, known: dict[str, Vectors]) -> None:
    stream = io.BytesIO()
    np.savez(stream, sha256=np.array(list(known)), vectors=np.stack(list(known.values())))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, stream.getvalue(), mode=0o600)
