"""The Merkle tree of RFC 6962 and RFC 9162 over SHA-256: append, root, proofs and their verifiers.

Guarantees: `Tree` gives the root of every past size and proofs between any two of them; the verifiers
accept exactly one proof per statement (wrong length, wrong order or a trailing hash is refused).
It does not store anything durably, and says nothing about who signed a root.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from common.errors import InclusionInvalid, LogForked, LogShrunk

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()

_sha256 = hashlib.sha256


def hash_leaf(data: bytes) -> bytes:
    """Hash one leaf: SHA-256(0x00 || data), RFC 9162 section 2.1.1."""
    return _sha256(b"\x00" + data).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    """Hash two children: SHA-256(0x01 || left || right), RFC 9162 section 2.1.1."""
    return _sha256(b"\x01" + left + right).digest()


class Tree:
    """An append-only Merkle tree in memory: 64 bytes per leaf, amortised two hashes per append.

    Every complete subtree's hash is kept, level by level, so that a root or proof of any past size
    costs at most O(log^2 n) hashes.
    """

    def __init__(self) -> None:
        self._levels: list[bytearray] = [bytearray()]

    @property
    def size(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def leaf(self, index: int) -> bytes:
        """Return the hash of leaf `index`."""
        if not 0 <= index < self.size:
            raise InclusionInvalid(f"leaf {index} is not in a tree of {self.size}")
        return self._node(0, index)

    def extend(self, leaf_hashes: Iterable[bytes]) -> None:
        """Append leaf hashes in order."""
        self._levels[0] += b"".join(leaf_hashes)
        level = 0
        while True:
            lower = self._levels[level]
            complete = len(lower) // (2 * HASH_BYTES)
            if complete and level + 1 == len(self._levels):
                self._levels.append(bytearray())
            done = len(self._levels[level + 1]) // HASH_BYTES if complete else 0
            if complete == done:
                return
            pairs = bytes(lower[2 * HASH_BYTES * done : 2 * HASH_BYTES * complete])
            self._levels[level + 1] += b"".join(
                [_sha256(b"\x01" + pairs[at : at + 64]).digest() for at in range(0, len(pairs), 64)]
            )
            level += 1

    def root(self, size: int | None = None) -> bytes:
        """Return the root over the first `size` leaves (default: all)."""
        size = self.size if size is None else size
        self._check_size(size)
        return self._range(0, size) if size else EMPTY_ROOT

    def prove_inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Return the audit path of leaf `index` in the first `size` leaves, RFC 9162 section 2.1.3.1."""
        size = self.size if size is None else size
        self._check_size(size)
        if not 0 <= index < size:
            raise InclusionInvalid(f"leaf {index} is not in a tree of {size}")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            split = start + _split(end - start)
            if index < split:
                path.append(self._range(split, end))
                end = split
            else:
                path.append(self._range(start, split))
                start = split
        return tuple(reversed(path))

    def prove_consistency(self, old: int, new: int | None = None) -> tuple[bytes, ...]:
        """Return the proof that the first `old` leaves begin the first `new`, RFC 9162 section 2.1.4.1."""
        new = self.size if new is None else new
        self._check_size(new)
        if not 0 <= old <= new:
            raise LogShrunk(f"expected an old size of at most {new}, got {old}")
        if old in (0, new):
            return ()
        path: list[bytes] = []
        start, end, whole = 0, new, True
        while old != end:
            split = start + _split(end - start)
            if old <= split:
                path.append(self._range(split, end))
                end = split
            else:
                path.append(self._range(start, split))
                start, whole = split, False
        if not whole:
            path.append(self._range(start, end))
        return tuple(reversed(path))

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= self.size:
            raise InclusionInvalid(f"expected a size of at most {self.size}, got {size}")

    def _node(self, level: int, index: int) -> bytes:
        return bytes(self._levels[level][index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def _range(self, start: int, end: int) -> bytes:
        """Hash leaves [start, end), where start is a multiple of the next power of two of the width."""
        hashes: list[bytes] = []
        while start < end:
            level = (end - start).bit_length() - 1
            hashes.append(self._node(level, start >> level))
            start += 1 << level
        result = hashes.pop()
        while hashes:
            result = hash_node(hashes.pop(), result)
        return result


def verify_inclusion(leaf_hash: bytes, *, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Raise InclusionInvalid unless `proof` leads from the leaf to the root, RFC 9162 section 2.1.3.2."""
    _check_hashes(InclusionInvalid, leaf_hash, root, *proof)
    if not 0 <= index < size:
        raise InclusionInvalid(f"expected an index below the size {size}, got {index}")
    node, last, result = index, size - 1, leaf_hash
    for sibling in proof:
        if last == 0:
            raise InclusionInvalid(f"leaf {index} of {size}: the proof has more hashes than the path")
        if node & 1 or node == last:
            result = hash_node(sibling, result)
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            result = hash_node(result, sibling)
        node >>= 1
        last >>= 1
    if last != 0:
        raise InclusionInvalid(f"leaf {index} of {size}: the proof has fewer hashes than the path")
    if not hmac.compare_digest(result, root):
        raise InclusionInvalid(f"leaf {index} of {size}: the proof leads to another root")


def verify_consistency(
    *, old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Raise LogForked (or LogShrunk) unless the old tree is a prefix of the new, RFC 9162 2.1.4.2.

    The empty tree is a prefix of every tree, with an empty proof.
    """
    _check_hashes(LogForked, old_root, new_root, *proof)
    if old_size < 0 or new_size < old_size:
        raise LogShrunk(f"expected a tree of at least {old_size} leaves, got {new_size}")
    where = f"tree of {new_size} does not extend the tree of {old_size}"
    if old_size in (0, new_size):
        if proof:
            raise LogForked(f"{where}: expected an empty proof, got {len(proof)} hashes")
        if old_size == 0 and old_root != EMPTY_ROOT:
            raise LogForked("the root of the empty tree is not SHA-256 of nothing")
        if new_size == old_size and old_root != new_root:
            raise LogForked(f"two roots for the same size {old_size}: {old_root.hex()}, {new_root.hex()}")
        return
    if not proof:
        raise LogForked(f"{where}: expected a proof, got none")
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    node, last = old_size - 1, new_size - 1
    while node & 1:
        node >>= 1
        last >>= 1
    old_result = new_result = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise LogForked(f"{where}: the proof has more hashes than the path")
        if node & 1 or node == last:
            old_result = hash_node(sibling, old_result)
            new_result = hash_node(sibling, new_result)
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            new_result = hash_node(new_result, sibling)
        node >>= 1
        last >>= 1
    if last != 0:
        raise LogForked(f"{where}: the proof has fewer hashes than the path")
    if not hmac.compare_digest(old_result, old_root) or not hmac.compare_digest(new_result, new_root):
        raise LogForked(f"{where}: the proof leads to another root")


def _split(width: int) -> int:
    """The largest power of two below `width` (at least 2)."""
    return 1 << ((width - 1).bit_length() - 1)


def _check_hashes(error: type[InclusionInvalid] | type[LogForked], *hashes: bytes) -> None:
    for value in hashes:
        if len(value) != HASH_BYTES:
            raise error(f"expected hashes of {HASH_BYTES} bytes, got {len(value)}")
