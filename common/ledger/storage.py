"""The leaves of a log in one append-only file: one leaf per line.

Canonical JSON holds no newline, so a leaf is a line and the log can be read with any text tool.
Guarantees: one writer at a time (advisory lock); an append is on disk when it returns, none of it where it
fails; bytes after the last newline (a torn write) are moved to `<name>.torn` on open, never silently lost.
It does not notice other damage: the caller compares the Merkle root with its signed checkpoint.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import BodyTooLarge, LedgerInvalid, LogInUse
from common.files import append_durable, append_whole, sync_directory

MAX_LEAF_BYTES = 5 << 20


class LeafFile:
    """An open leaf file; `close` (or the context) releases the lock."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, cut a torn tail and index the leaves."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise LogInUse(f"{path}: another process has this log open") from error
        if new:
            sync_directory(path.parent)
        self._ends = array("Q")
        self._index()

    def __enter__(self) -> LeafFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        return len(self._ends)

    def append(self, leaves: Sequence[bytes]) -> None:
        """Append leaves and fsync; an empty leaf, a newline or more than 5 MiB is refused."""
        start = end = self._ends[-1] if self._ends else 0
        ends = array("Q")
        for leaf in leaves:
            _check_leaf(leaf)
            end += len(leaf) + 1
            ends.append(end)
        append_whole(self._file.fileno(), b"".join([leaf + b"\n" for leaf in leaves]), end=start)
        self._ends.extend(ends)

    def read(self, index: int) -> bytes:
        """Return leaf `index`."""
        if not 0 <= index < self.size:
            raise LedgerInvalid(f"{self._path.name}: leaf {index} is not in a log of {self.size}")
        start = self._ends[index - 1] if index else 0
        self._file.seek(start)
        return self._file.read(self._ends[index] - start - 1)

    def leaves(self) -> Iterator[bytes]:
        """Yield every leaf in order, reading as it goes."""
        with open(self._path, "rb") as reader:
            for _ in range(self.size):
                yield reader.readline()[:-1]

    def cut(self, size: int) -> None:
        """Drop the leaves from `size` on, keeping their bytes in `<name>.torn`.

        For leaves that no signed checkpoint covers; the caller makes sure of that.
        """
        self._cut_bytes(self._ends[size - 1] if size else 0)
        del self._ends[size:]

    def _index(self) -> None:
        end = 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            _check_leaf(line[:-1])
            end += len(line)
            self._ends.append(end)
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() != end:
            self._cut_bytes(end)

    def _cut_bytes(self, end: int) -> None:
        self._file.seek(end)
        append_durable(self._path.with_name(f"{self._path.name}.torn"), self._file.read())
        self._file.truncate(end)
        self._file.flush()
        os.fsync(self._file.fileno())


def _check_leaf(leaf: bytes) -> None:
    if len(leaf) > MAX_LEAF_BYTES:
        raise BodyTooLarge(f"expected a leaf of at most {MAX_LEAF_BYTES} bytes, got {len(leaf)}")
    if not leaf or b"\n" in leaf:
        raise LedgerInvalid("expected a leaf of one non-empty line")
