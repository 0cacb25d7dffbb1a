"""The operator's append-only log: entries on disk, signed checkpoints, the witnesses' cosignatures.

A directory holds `entries.jsonl` (one canonical entry per line) and `checkpoints/<size>.note`.
Guarantees: an entry is durable when `append` returns; the operator signs no checkpoint that does not
extend the last one it signed, also after a crash; a truncated or rewritten file is refused on open.
It does not decide what may be logged, and it cannot show a fork: that is the witnesses' part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import EntryInvalid, FedRadError, LedgerInvalid, LogRewritten, LogTruncated
from common.files import write_atomic
from common.ledger.checkpoint import (
    Checkpoint,
    LedgerProof,
    log_key,
    open_checkpoint,
    parse_checkpoint,
    sign_checkpoint,
    verify_cosignature,
)
from common.ledger.entries import Entry, format_entry, parse_entry
from common.ledger.merkle import Tree, hash_leaf
from common.ledger.note import Note, Signature, VerifierKey, format_note, merge_signatures, parse_note
from common.ledger.storage import LeafFile
from common.ledger.witness import CosignRequest

ENTRIES_NAME = "entries.jsonl"
CHECKPOINTS_NAME = "checkpoints"


class Log:
    """An open log; `close` (or the context) releases its lock."""

    def __init__(self, directory: Path, *, origin: str, private_key: Ed25519PrivateKey) -> None:
        """Open or create a log and check every stored leaf against the last signed checkpoint.

        Raises LogTruncated, LogRewritten, LogInUse, NoteInvalid or NoteSignatureInvalid. Entries after the
        last checkpoint are kept up to the first damaged one; the rest goes to `entries.jsonl.torn`.
        """
        self._directory = directory
        self._origin = origin
        self._private_key = private_key
        self.key = log_key(origin, private_key.public_key().public_bytes_raw())
        self._tree = Tree()
        self._last_time_s = 0
        self._file = LeafFile(directory / ENTRIES_NAME)
        try:
            self._note = self._load_last_note()
            self._rebuild()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        return self._tree.size

    @property
    def last_time_s(self) -> int:
        """The time of the last entry, which no later one may precede."""
        return self._last_time_s

    @property
    def root(self) -> bytes:
        return self._tree.root()

    @property
    def latest(self) -> Note | None:
        """The last signed checkpoint with the cosignatures gathered so far."""
        return self._note

    def append(self, entries: Iterable[Entry]) -> int:
        """Append entries durably (one fsync) and return the index of the first.

        Raises EntryInvalid where time runs backwards.
        """
        entries = list(entries)
        last = self._last_time_s
        for entry in entries:
            if entry.time_s < last:
                raise EntryInvalid(
                    f"expected a time of at least {last}, got {entry.time_s}: back-dated entry"
                )
            last = entry.time_s
        first = self.append_leaves([format_entry(entry) for entry in entries])
        self._last_time_s = last
        return first

    def append_leaves(self, leaves: list[bytes]) -> int:
        """Append encoded entries durably; the caller vouches that each is canonical."""
        first = self.size
        self._file.append(leaves)
        self._tree.extend([hash_leaf(leaf) for leaf in leaves])
        return first

    def checkpoint(self) -> Note:
        """Sign the current head, durably, and return it; the same note again while nothing was added."""
        if self._note is not None and parse_checkpoint(self._note.text).size == self.size:
            return self._note
        head = Checkpoint(self._origin, self.size, self._tree.root())
        note = sign_checkpoint(head, private_key=self._private_key)
        self._store(note)
        return note

    def add_cosignatures(
        self, signatures: Iterable[Signature], *, witnesses: Collection[VerifierKey]
    ) -> Note:
        """Add cosignatures of known witnesses to the latest checkpoint and return the note.

        Each is verified first; raises NoteSignatureInvalid naming the witness, and adds none then.
        """
        if self._note is None:
            raise LedgerInvalid("expected a checkpoint before its cosignatures, got none")
        merged = merge_signatures(self._note, signatures)
        keys = {(key.name, key.key_id): key for key in witnesses}
        for signature in merged.signatures[len(self._note.signatures) :]:
            key = keys.get((signature.name, signature.key_id))
            if key is None:
                raise LedgerInvalid(f"cosignature of {signature.name!r}: not a witness of this study")
            verify_cosignature(merged, key)
        if merged != self._note:
            self._store(merged)
        return merged

    def cosign_request(self, old_size: int) -> CosignRequest:
        """Return the latest checkpoint with the proof that it extends the tree of `old_size`."""
        note = self.checkpoint() if self._note is None else self._note
        size = parse_checkpoint(note.text).size
        return CosignRequest(old_size, self._tree.prove_consistency(old_size, size), note)

    def prove(self, index: int) -> LedgerProof:
        """Return the offline proof of entry `index` under the latest checkpoint."""
        if self._note is None:
            raise LedgerInvalid("expected a checkpoint before a proof, got none")
        size = parse_checkpoint(self._note.text).size
        return LedgerProof(index, self._tree.prove_inclusion(index, size), self._note)

    def read(self, index: int) -> Entry:
        return parse_entry(self._file.read(index))

    def leaf(self, index: int) -> bytes:
        """Return the encoded entry `index`, as it was hashed."""
        return self._file.read(index)

    def entries(self) -> Iterator[Entry]:
        return (parse_entry(leaf) for leaf in self._file.leaves())

    def _store(self, note: Note) -> None:
        size = parse_checkpoint(note.text).size
        write_atomic(self._directory / CHECKPOINTS_NAME / f"{size:012d}.note", format_note(note))
        self._note = note

    def _load_last_note(self) -> Note | None:
        paths = sorted((self._directory / CHECKPOINTS_NAME).glob("*.note"))
        if not paths:
            return None
        note = parse_note(paths[-1].read_bytes())
        open_checkpoint(note, self.key)
        return note

    def _rebuild(self) -> None:
        head = parse_checkpoint(self._note.text) if self._note else Checkpoint(self._origin, 0, b"")
        if self._file.size < head.size:
            raise LogTruncated(f"{self._directory}: signed {head.size} entries, found {self._file.size}")
        self._tree.extend([hash_leaf(leaf) for leaf in self._file.leaves()])
        if head.size and self._tree.root(head.size) != head.root:
            raise LogRewritten(f"{self._directory}: the first {head.size} entries are not those signed")
        if head.size:
            self._last_time_s = self.read(head.size - 1).time_s
        good = head.size
        try:
            for index in range(head.size, self._file.size):
                self._last_time_s = self.read(index).time_s
                good = index + 1
        except FedRadError:
            self._file.cut(good)
            self._tree = Tree()
            self._tree.extend([hash_leaf(leaf) for leaf in self._file.leaves()])
