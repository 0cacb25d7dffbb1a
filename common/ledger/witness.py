"""A site as witness: it cosigns a checkpoint only if it extends everything the site has seen of that log.

Guarantees: the new head is on disk before the cosignature leaves the process, so a witness never signs
two heads that cannot belong to one history, also across restarts; a fork or a shrunk log is named and
both signed heads are kept as evidence. A witness does not judge what the entries say.

Source: c2sp.org/tlog-witness (the request's format and the order of the checks).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from common.errors import LogForked, LogShrunk, NoteInvalid, WitnessBehind
from common.files import write_atomic
from common.ledger.checkpoint import (
    MAX_PROOF_HASHES,
    Checkpoint,
    cosign,
    open_checkpoint,
    verify_quorum,
)
from common.ledger.entries import Entry, parse_entry
from common.ledger.merkle import HASH_BYTES, hash_leaf, verify_consistency, verify_inclusion
from common.ledger.note import (
    MAX_NOTE_BYTES,
    Note,
    Signature,
    VerifierKey,
    decode_base64,
    format_note,
    parse_note,
)


@dataclass(frozen=True)
class CosignRequest:
    """A checkpoint to cosign and the proof that it extends the witness's last one (`old_size`)."""

    old_size: int
    proof: tuple[bytes, ...]
    note: Note


def format_cosign_request(request: CosignRequest) -> bytes:
    """Encode a request: `old N`, proof lines, a blank line, the note."""
    lines = [f"old {request.old_size}", *(base64.b64encode(h).decode() for h in request.proof)]
    return ("\n".join(lines) + "\n\n").encode() + format_note(request.note)


def parse_cosign_request(data: bytes) -> CosignRequest:
    """Parse a request; raises NoteInvalid. Nothing is verified."""
    if len(data) > MAX_NOTE_BYTES + 8192:
        raise NoteInvalid("expected a cosign request of at most 1 MiB")
    head, blank, rest = data.partition(b"\n\n")
    lines = head.decode("utf-8", errors="replace").split("\n")
    old = re.fullmatch(r"old (0|[1-9][0-9]{0,18})", lines[0])
    if not blank or old is None or len(lines) > 1 + MAX_PROOF_HASHES:
        raise NoteInvalid(f"expected 'old N', at most {MAX_PROOF_HASHES} hashes and a note")
    proof = tuple(decode_base64(line) for line in lines[1:])
    if any(len(value) != HASH_BYTES for value in proof):
        raise NoteInvalid(f"expected hashes of {HASH_BYTES} bytes in a cosign request")
    return CosignRequest(int(old.group(1)), proof, parse_note(rest))


def verify_logged(leaf: bytes, *, index: int, proof: Sequence[bytes], head: Checkpoint) -> Entry:
    """Return the entry that `leaf` encodes once it is proven to be in the tree of `head`.

    Raises InclusionInvalid or EntryInvalid.
    """
    verify_inclusion(hash_leaf(leaf), index=index, size=head.size, proof=proof, root=head.root)
    return parse_entry(leaf)


def verify_extends(seen: Checkpoint | None, new: Checkpoint, proof: Sequence[bytes]) -> None:
    """Raise LogForked or LogShrunk unless `new` extends what was seen (None: nothing yet)."""
    if seen is None:
        if proof:
            raise LogForked("expected an empty proof at first sight of a log")
        return
    if seen.origin != new.origin:
        raise NoteInvalid(f"expected a checkpoint of {seen.origin!r}, got one of {new.origin!r}")
    if new.size < seen.size:
        raise LogShrunk(f"{new.origin}: saw a tree of {seen.size} leaves, now shown one of {new.size}")
    verify_consistency(
        old_size=seen.size, old_root=seen.root, new_size=new.size, new_root=new.root, proof=proof
    )


class WitnessState:
    """What one site has seen of one log, in one file: the last note that it checked."""

    def __init__(self, path: Path, *, log: VerifierKey) -> None:
        """Load the state; a missing file is a log never seen. Raises NoteInvalid on a damaged file."""
        self._path = path
        self._log = log
        self._note = parse_note(path.read_bytes()) if path.exists() else None
        self._seen = open_checkpoint(self._note, log) if self._note else None

    @property
    def seen(self) -> Checkpoint | None:
        return self._seen

    def cosign(
        self,
        request: CosignRequest,
        *,
        name: str,
        private_key: Ed25519PrivateKey | MLDSA44PrivateKey,
        time_s: int,
    ) -> Signature:
        """Check, remember durably, then cosign.

        Raises NoteSignatureInvalid (not the log's), WitnessBehind (`old_size` is not what was seen: ask
        again with `seen.size`), LogForked or LogShrunk (evidence is kept beside the state).
        """
        self._advance(request)
        return cosign(request.note, name=name, private_key=private_key, time_s=time_s)

    def verify_witnessed(
        self, signatures: Sequence[Signature], *, witnesses: Collection[VerifierKey], quorum: int
    ) -> None:
        """Raise unless a quorum has cosigned the head that this site has just cosigned itself.

        Raises WitnessBehind where it has seen none, QuorumNotReached, or NoteSignatureInvalid for a line that
        is of another head. For the second exchange of a round: what was sent stays masked until this holds.
        """
        if self._note is None:
            raise WitnessBehind("expected a head that this site has cosigned, got cosignatures of none")
        note = Note(self._note.text, (*self._note.signatures[:1], *signatures))
        verify_quorum(note, witnesses, quorum=quorum)

    def accept(
        self, request: CosignRequest, *, witnesses: Collection[VerifierKey], quorum: int
    ) -> Checkpoint:
        """Check a checkpoint that others have cosigned and remember it; raises QuorumNotReached too."""
        open_checkpoint(request.note, self._log)
        verify_quorum(request.note, witnesses, quorum=quorum)
        return self._advance(request)

    def _advance(self, request: CosignRequest) -> Checkpoint:
        new = open_checkpoint(request.note, self._log)
        grows = self._seen is not None and new.size > self._seen.size
        if self._seen and request.old_size != self._seen.size and new.size > self._seen.size:
            raise WitnessBehind(f"expected a proof from size {self._seen.size}, got {request.old_size}")
        try:
            verify_extends(self._seen, new, request.proof if grows else ())
        except (LogForked, LogShrunk) as error:
            raise type(error)(f"{error}; evidence: {self._keep_evidence(request, error).name}") from error
        self._note = request.note
        self._seen = new
        write_atomic(self._path, format_note(self._note), mode=0o600)
        return new

    def _keep_evidence(self, request: CosignRequest, error: LogForked | LogShrunk) -> Path:
        """Write both signed heads; each alone is undeniable, together they show the operator's fault.

        A smaller head may be an old one that was replayed: it goes to a file of its own, `.shrunk`.
        """
        ending = "fork" if isinstance(error, LogForked) else "shrunk"
        path = self._path.with_name(f"{self._path.name}.{ending}")
        if not path.exists() and self._note is not None:
            both = format_note(self._note) + b"\n" + format_cosign_request(request)
            write_atomic(path, both, mode=0o600)
        return path
