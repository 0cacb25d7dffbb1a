"""Checkpoints, cosignatures, quorum and the offline ledger proof, in the C2SP formats.

Guarantees: a checkpoint has exactly three lines (origin, size, root) and one encoding; a quorum counts
each witness once, by key; an Ed25519 cosignature binds the time at which the witness saw the tree.
A quorum of witnesses makes a split view as hard as corrupting that many of them, and no harder.

Source: c2sp.org/tlog-checkpoint, /tlog-cosignature, /tlog-proof v1.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey, MLDSA44PublicKey

from common.errors import NoteInvalid, NoteSignatureInvalid, QuorumNotReached
from common.ledger.merkle import HASH_BYTES, hash_leaf, verify_inclusion
from common.ledger.note import (
    MAX_NOTE_BYTES,
    KeyType,
    Note,
    Signature,
    VerifierKey,
    decode_base64,
    find_signature,
    format_note,
    parse_note,
    sign_note,
    verify_ed25519,
    verify_note,
)

_CHECKPOINT = re.compile(r"([^\x00-\x1f]{1,255})\n(0|[1-9][0-9]{0,18})\n([A-Za-z0-9+/]{43}=)\n")
_PROOF_HEADER = "c2sp.org/tlog-proof@v1"
MAX_PROOF_HASHES = 63


@dataclass(frozen=True)
class Checkpoint:
    """The head of a log: its origin, number of leaves and Merkle root (32 bytes)."""

    origin: str
    size: int
    root: bytes


@dataclass(frozen=True)
class LedgerProof:
    """An offline proof that a leaf is in a signed tree; the leaf itself travels beside it."""

    index: int
    hashes: tuple[bytes, ...]
    note: Note


def format_checkpoint(checkpoint: Checkpoint) -> str:
    """Encode a checkpoint as note text."""
    root = base64.b64encode(checkpoint.root).decode()
    return f"{checkpoint.origin}\n{checkpoint.size}\n{root}\n"


def parse_checkpoint(text: str) -> Checkpoint:
    """Parse note text as a checkpoint without extension lines; raises NoteInvalid."""
    match = _CHECKPOINT.fullmatch(text)
    if match is None:
        raise NoteInvalid("expected a checkpoint of three lines: origin, size, base64 root")
    return Checkpoint(match.group(1), int(match.group(2)), decode_base64(match.group(3)))


def sign_checkpoint(checkpoint: Checkpoint, *, private_key: Ed25519PrivateKey) -> Note:
    """Sign a checkpoint as its log: type 0x01, the key named after the origin."""
    return sign_note(format_checkpoint(checkpoint), name=checkpoint.origin, private_key=private_key)


def log_key(origin: str, public: bytes) -> VerifierKey:
    """Return the verifier key of a log whose operator holds the Ed25519 key `public` (32 bytes)."""
    return VerifierKey(origin, KeyType.ED25519, public)


def witness_key(name: str, public: bytes) -> VerifierKey:
    """Return the verifier key of a witness: Ed25519 for 32 bytes, ML-DSA-44 for 1312."""
    for key_type in (KeyType.COSIGNATURE_ED25519, KeyType.COSIGNATURE_MLDSA44):
        if len(public) == key_type.key_bytes:
            return VerifierKey(name, key_type, public)
    raise NoteInvalid(f"witness {name}: expected a key of 32 or 1312 bytes, got {len(public)}")


def open_checkpoint(note: Note, key: VerifierKey) -> Checkpoint:
    """Verify the log's own signature and return the checkpoint; the origin must be the key's name."""
    verify_note(note, key)
    checkpoint = parse_checkpoint(note.text)
    if checkpoint.origin != key.name:
        raise NoteInvalid(f"expected a checkpoint of {key.name!r}, got one of {checkpoint.origin!r}")
    return checkpoint


# --- cosignatures -----------------------------------------------------------------------------------------


def cosign(
    note: Note, *, name: str, private_key: Ed25519PrivateKey | MLDSA44PrivateKey, time_s: int
) -> Signature:
    """Cosign a checkpoint at POSIX time `time_s`. Only a witness that has checked it may call this."""
    key = witness_key(name, private_key.public_key().public_bytes_raw())
    signature = private_key.sign(_cosigned_message(note, key, time_s))
    return Signature(name, key.key_id, struct.pack(">Q", time_s) + signature)


def verify_cosignature(note: Note, key: VerifierKey) -> None:
    """Raise NoteSignatureInvalid unless `key` has cosigned the note."""
    if not key.type.is_cosignature:
        raise NoteSignatureInvalid(f"{key.name}: expected a cosignature key, got a plain note key")
    signature = find_signature(note, key)
    if len(signature.value) < 8:
        raise NoteSignatureInvalid(f"cosignature of {key.name}: expected a time and a signature")
    message = _cosigned_message(note, key, cosigned_at(signature))
    if key.type is KeyType.COSIGNATURE_ED25519:
        verify_ed25519(key.public, signature.value[8:], message, who=key.name)
        return
    try:
        MLDSA44PublicKey.from_public_bytes(key.public).verify(signature.value[8:], message)
    except (InvalidSignature, ValueError) as error:
        raise NoteSignatureInvalid(f"the signature of {key.name} does not verify") from error


def cosigned_at(signature: Signature) -> int:
    """Return the POSIX time that a cosignature states."""
    return int(struct.unpack(">Q", signature.value[:8])[0])


def verify_quorum(note: Note, witnesses: Collection[VerifierKey], *, quorum: int) -> None:
    """Raise QuorumNotReached unless at least `quorum` of the witnesses have cosigned.

    A line of a known witness that fails to verify condemns the note (NoteSignatureInvalid). Each public
    key counts once, however many names it is listed under.
    """
    lines = {(s.name, s.key_id) for s in note.signatures}
    valid = set()
    for key in witnesses:
        if (key.name, key.key_id) in lines:
            verify_cosignature(note, key)
            valid.add(key.public)
    if len(valid) < quorum:
        raise QuorumNotReached(
            f"expected cosignatures of {quorum} of {len(witnesses)} witnesses, got {len(valid)}"
        )


def _cosigned_message(note: Note, key: VerifierKey, time_s: int) -> bytes:
    if not 0 <= time_s < 1 << 63:
        raise NoteSignatureInvalid(f"cosignature of {key.name}: expected a time below 2^63, got {time_s}")
    if key.type is KeyType.COSIGNATURE_ED25519:
        return f"cosignature/v1\ntime {time_s}\n{note.text}".encode()
    head = parse_checkpoint(note.text)
    name, origin = key.name.encode(), head.origin.encode()
    return (
        b"subtree/v1\n\0"
        + bytes([len(name)])
        + name
        + struct.pack(">Q", time_s)
        + bytes([len(origin)])
        + origin
        + struct.pack(">QQ", 0, head.size)
        + head.root
    )


# --- offline ledger proofs --------------------------------------------------------------------------------


def format_ledger_proof(proof: LedgerProof) -> bytes:
    """Encode an offline proof (c2sp.org/tlog-proof@v1, without extra data)."""
    lines = [_PROOF_HEADER, f"index {proof.index}"]
    lines += [base64.b64encode(value).decode() for value in proof.hashes]
    return ("\n".join(lines) + "\n\n").encode() + format_note(proof.note)


def parse_ledger_proof(data: bytes) -> LedgerProof:
    """Parse an offline proof; raises NoteInvalid. Nothing is verified."""
    if len(data) > MAX_NOTE_BYTES + 8192:
        raise NoteInvalid("expected a ledger proof of at most 1 MiB")
    head, blank, rest = data.partition(b"\n\n")
    lines = head.decode("utf-8", errors="replace").split("\n")
    index = re.fullmatch(r"index (0|[1-9][0-9]{0,18})", lines[1]) if len(lines) > 1 else None
    if not blank or lines[0] != _PROOF_HEADER or index is None or len(lines) > 2 + MAX_PROOF_HASHES:
        raise NoteInvalid(f"expected {_PROOF_HEADER}, an index, at most {MAX_PROOF_HASHES} hashes and a note")
    hashes = tuple(decode_base64(line) for line in lines[2:])
    if any(len(value) != HASH_BYTES for value in hashes):
        raise NoteInvalid(f"expected hashes of {HASH_BYTES} bytes in a ledger proof")
    return LedgerProof(int(index.group(1)), hashes, parse_note(rest))


def verify_ledger_proof(
    leaf: bytes, proof: LedgerProof, *, log: VerifierKey, witnesses: Sequence[VerifierKey], quorum: int
) -> Checkpoint:
    """Verify offline that `leaf` is in the log, witnessed by a quorum; returns the checkpoint.

    Raises NoteInvalid, NoteSignatureInvalid, QuorumNotReached or InclusionInvalid.
    """
    checkpoint = open_checkpoint(proof.note, log)
    verify_quorum(proof.note, witnesses, quorum=quorum)
    verify_inclusion(
        hash_leaf(leaf), index=proof.index, size=checkpoint.size, proof=proof.hashes, root=checkpoint.root
    )
    return checkpoint
