"""C2SP signed notes and verifier keys: text, a blank line, signature lines.

Guarantees: `format_note(parse_note(x)) == x`; anything else (control characters, non-canonical base64,
over 1 MiB, over 100 signatures, a repeated signature line) is refused. A signature line of an unknown key
is carried along and trusted for nothing; one of a known key that fails condemns the whole note.
It does not read what the text says: see `checkpoint.py`.

Source: c2sp.org/signed-note v1.0.0; cosignatures: c2sp.org/tlog-cosignature (Ed25519 0x04, ML-DSA-44 0x06).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import NoteInvalid, NoteSignatureInvalid

MAX_NOTE_BYTES = 1 << 20
MAX_SIGNATURES = 100
_LINE = re.compile(r"— ([^\s+]{1,255}) ([A-Za-z0-9+/=]{8,8192})")
_VKEY = re.compile(r"([^\s+]{1,255})\+([0-9a-f]{8})\+([A-Za-z0-9+/=]{4,8192})")


class KeyType(IntEnum):
    """What a key signs: plain note text, or a checkpoint with the time (a cosignature)."""

    ED25519 = 0x01
    COSIGNATURE_ED25519 = 0x04
    COSIGNATURE_MLDSA44 = 0x06

    @property
    def key_bytes(self) -> int:
        return 1312 if self is KeyType.COSIGNATURE_MLDSA44 else 32

    @property
    def is_cosignature(self) -> bool:
        return self is not KeyType.ED25519


@dataclass(frozen=True)
class Signature:
    """One signature line: key name, 4-byte key ID and the bytes after it."""

    name: str
    key_id: bytes
    value: bytes


@dataclass(frozen=True)
class Note:
    """Signed text (ends in a newline) and its signature lines, in order."""

    text: str
    signatures: tuple[Signature, ...]


@dataclass(frozen=True)
class VerifierKey:
    """A named public key; `public` is 32 bytes (Ed25519) or 1312 (ML-DSA-44)."""

    name: str
    type: KeyType
    public: bytes

    @property
    def key_id(self) -> bytes:
        data = self.name.encode() + b"\n" + bytes([self.type]) + self.public
        return hashlib.sha256(data).digest()[:4]


def parse_note(data: bytes) -> Note:
    """Parse a signed note; raises NoteInvalid. No signature is verified."""
    if len(data) > MAX_NOTE_BYTES:
        raise NoteInvalid(f"expected a note of at most {MAX_NOTE_BYTES} bytes, got {len(data)}")
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoteInvalid("expected a note in UTF-8") from error
    if any(ord(c) < 0x20 and c != "\n" for c in whole):
        raise NoteInvalid("expected no control characters but newlines in a note")
    text, blank, tail = whole.rpartition("\n\n")
    if not blank or not tail.endswith("\n"):
        raise NoteInvalid("expected text, a blank line and signature lines, each ended by a newline")
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise NoteInvalid(f"expected at most {MAX_SIGNATURES} signatures, got {len(lines)}")
    signatures = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise NoteInvalid(f"expected a signature line '— name base64', got {line[:60]!r}")
        blob = decode_base64(match.group(2))
        if len(blob) < 5:
            raise NoteInvalid("expected a key ID and a signature, got fewer than 5 bytes")
        signatures.append(Signature(match.group(1), blob[:4], blob[4:]))
    if len({(s.name, s.key_id) for s in signatures}) != len(signatures):
        raise NoteInvalid("expected at most one signature of each key")
    return Note(text + "\n", tuple(signatures))


def format_note(note: Note) -> bytes:
    """Encode a note; the inverse of `parse_note`."""
    return (note.text + "\n").encode() + b"".join(map(format_signature_line, note.signatures))


def parse_signature_line(line: bytes) -> Signature:
    """Parse one signature line as a witness returns it; raises NoteInvalid."""
    (signature,) = parse_note(b"line\n\n" + line).signatures[:1]
    if format_signature_line(signature) != line:
        raise NoteInvalid("expected exactly one signature line")
    return signature


def format_signature_line(signature: Signature) -> bytes:
    """Encode one signature line with its newline."""
    blob = base64.b64encode(signature.key_id + signature.value).decode()
    return f"— {signature.name} {blob}\n".encode()


def format_lines(signatures: Sequence[Signature]) -> bytes:
    """Encode signature lines without their note, for who holds its text already."""
    return b"".join(format_signature_line(signature) for signature in signatures)


def parse_lines(data: bytes) -> tuple[Signature, ...]:
    """Parse signature lines without their note; raises NoteInvalid."""
    return parse_note(b"line\n\n" + data).signatures


def parse_verifier_key(text: str) -> VerifierKey:
    """Parse `name+hex key ID+base64(type || key)`; raises NoteInvalid."""
    match = _VKEY.fullmatch(text)
    if match is None:
        raise NoteInvalid("expected a verifier key 'name+keyid+base64'")
    blob = decode_base64(match.group(3))
    if blob[0] not in set(KeyType):
        raise NoteInvalid(f"expected a key type of {[int(t) for t in KeyType]}, got {blob[0]}")
    key = VerifierKey(match.group(1), KeyType(blob[0]), blob[1:])
    if len(key.public) != key.type.key_bytes:
        raise NoteInvalid(f"expected a key of {key.type.key_bytes} bytes, got {len(key.public)}")
    if key.key_id.hex() != match.group(2):
        raise NoteInvalid(
            f"verifier key {key.name}: expected key ID {key.key_id.hex()}, got {match.group(2)}"
        )
    return key


def format_verifier_key(key: VerifierKey) -> str:
    """Encode a verifier key; the inverse of `parse_verifier_key`."""
    return f"{key.name}+{key.key_id.hex()}+{base64.b64encode(bytes([key.type]) + key.public).decode()}"


def sign_note(text: str, *, name: str, private_key: Ed25519PrivateKey) -> Note:
    """Sign text as a note with a plain Ed25519 key (type 0x01)."""
    key = VerifierKey(name, KeyType.ED25519, private_key.public_key().public_bytes_raw())
    return Note(text, (Signature(name, key.key_id, private_key.sign(text.encode())),))


def verify_note(note: Note, key: VerifierKey) -> None:
    """Raise NoteSignatureInvalid unless `key` (type 0x01) has signed the text."""
    if key.type is not KeyType.ED25519:
        raise NoteSignatureInvalid(f"{key.name}: expected a plain note key, got a cosignature key")
    verify_ed25519(key.public, find_signature(note, key).value, note.text.encode(), who=key.name)


def find_signature(note: Note, key: VerifierKey) -> Signature:
    """Return the signature line of `key`; raises NoteSignatureInvalid where there is none."""
    for signature in note.signatures:
        if signature.name == key.name and signature.key_id == key.key_id:
            return signature
    raise NoteSignatureInvalid(f"expected a signature of {key.name} ({key.key_id.hex()}), got none")


def merge_signatures(note: Note, signatures: Iterable[Signature]) -> Note:
    """Add signature lines to a note, skipping keys that it already carries."""
    present = {(s.name, s.key_id) for s in note.signatures}
    added = []
    for signature in signatures:
        if (signature.name, signature.key_id) not in present:
            present.add((signature.name, signature.key_id))
            added.append(signature)
    return Note(note.text, (*note.signatures, *added))


def verify_ed25519(public: bytes, signature: bytes, message: bytes, *, who: str) -> None:
    """Raise NoteSignatureInvalid unless the Ed25519 signature holds."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise NoteSignatureInvalid(f"the signature of {who} does not verify") from error


def decode_base64(text: str) -> bytes:
    """Decode canonical standard base64; raises NoteInvalid."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoteInvalid("expected base64 (RFC 4648 section 4)") from error
    if base64.b64encode(data).decode() != text:
        raise NoteInvalid("expected canonical base64")
    return data
