"""Masks modulo 2^32: expand a key into a keystream and add it to, or subtract it from, a vector in place.

The keystream is AES-128-CTR, read as uint32 little endian. A vector is worked through in blocks that fit
the processor's cache, all masks on one block before the next, so that memory is the vector plus 0.5 MiB.
Guarantees: adding and then subtracting a mask restores the vector exactly. Each key masks one vector only,
which the state machines see to. Sources: NIST SP 800-38A (CTR), Bonawitz et al. 2017 (CCS) §4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import VectorInvalid
from common.secagg.keys import derive, digest

Vector = npt.NDArray[np.uint32]

MASK_KEY_BYTES = 32
CHUNK_VALUES = 1 << 20
CHUNK_BYTES = 4 * CHUNK_VALUES
MAX_LENGTH = 1 << 28
_BLOCK_VALUES = 1 << 16
_LITTLE = np.dtype("<u4")


@dataclass(frozen=True)
class Mask:
    """A keystream to add or, if `negative`, subtract; `key`: 16 bytes AES key, 16 bytes first counter."""

    key: bytes
    negative: bool

    def opposite(self) -> Mask:
        return Mask(self.key, not self.negative)


def pair_mask(shared: bytes, context: bytes, *, site: str, peer: str) -> Mask:
    """Derive the mask that `site` and `peer` share; the site that sorts first adds, the other subtracts."""
    low, high = sorted((site, peer))
    key = derive(shared, context, "pair-mask", low.encode(), high.encode(), size=MASK_KEY_BYTES)
    return Mask(key, negative=site == high)


def self_mask(seed: bytes, context: bytes, *, site: str) -> Mask:
    """Derive the mask that a site adds alone."""
    return Mask(derive(seed, context, "self-mask", site.encode(), size=MASK_KEY_BYTES), negative=False)


def apply_masks(vector: Vector, masks: Sequence[Mask]) -> None:
    """Add the masks to a vector in place, modulo 2^32."""
    verify_vector(vector, length=vector.size)
    streams = [
        (Cipher(algorithms.AES(m.key[:16]), modes.CTR(m.key[16:])).encryptor(), m.negative) for m in masks
    ]
    zeros = memoryview(bytes(4 * _BLOCK_VALUES))
    stream = bytearray(4 * _BLOCK_VALUES)
    words = np.frombuffer(stream, _LITTLE)
    for start in range(0, vector.size, _BLOCK_VALUES):
        block = vector[start : start + _BLOCK_VALUES]
        zero, word = zeros[: 4 * block.size], words[: block.size]
        for cipher, negative in streams:
            cipher.update_into(zero, stream)
            if negative:
                np.subtract(block, word, out=block)
            else:
                np.add(block, word, out=block)


def verify_vector(vector: npt.NDArray[Any], *, length: int) -> None:
    """Raise VectorInvalid unless this is a writable contiguous uint32 array of `length` values."""
    if not isinstance(vector, np.ndarray) or vector.dtype != _LITTLE or vector.shape != (length,):
        raise VectorInvalid(f"expected a uint32 array of {length} values, got another type or shape")
    if not (vector.flags.c_contiguous and vector.flags.writeable):
        raise VectorInvalid("expected a contiguous, writable array, got a view that is not")


def chunks(vector: Vector) -> Iterator[Vector]:
    """Yield views of 2^20 values, the last one shorter: the pieces in which uploads are hashed and sent."""
    for start in range(0, vector.size, CHUNK_VALUES):
        yield vector[start : start + CHUNK_VALUES]


def chunk_count(length: int) -> int:
    """Return how many chunks a vector of `length` values has."""
    return -(-length // CHUNK_VALUES)


def chunk_digest(chunk: Vector | memoryview | bytes) -> bytes:
    """Hash one chunk's little-endian bytes with SHA-256."""
    return hashlib.sha256(cast(memoryview, chunk)).digest()


def add_chunk(chunk: Vector, target: Vector) -> bytes:
    """Add a chunk to `target` in place, modulo 2^32, and return the chunk's digest: one pass for both."""
    running = hashlib.sha256()
    for start in range(0, chunk.size, _BLOCK_VALUES):
        block, sums = chunk[start : start + _BLOCK_VALUES], target[start : start + _BLOCK_VALUES]
        running.update(cast(memoryview, block))
        np.add(sums, block, out=sums)
    return running.digest()


def upload_digest(length: int, chunk_digests: Sequence[bytes]) -> bytes:
    """Hash a vector's length and chunk digests to what its receipt signs."""
    return digest("upload", length.to_bytes(4, "big"), b"".join(chunk_digests))
