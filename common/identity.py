"""Ed25519 identities: one key signs one kind of thing, and every signature names what it signs.

Guarantees: a signature made for one purpose never verifies for another (the purpose is prefixed);
private key files are 0600 PKCS#8 PEM, written atomically, and refused when others can read them.
Keys are separate for messages and witnessing; TLS and Flower node keys live elsewhere (RFC 8032).
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.canonical import sha256_hex
from common.errors import KeyFileInvalid, SignatureInvalid
from common.files import write_atomic

_ACCESS_LIST = "system.posix_acl_access"
_ENTRY = struct.Struct("<HHI")  # tag, permissions, id, after four bytes of version (posix_acl_xattr.h)
_OWNER, _USER, _MASK = 0x01, 0x02, 0x10


class Purpose(StrEnum):
    """What a signature is for; it is part of the signed bytes."""

    ENVELOPE = "fedrad/v1/envelope"
    STUDY = "fedrad/v1/study"
    APPROVAL = "fedrad/v1/approval"
    ROUND_RECORD = "fedrad/v1/round-record"
    RELEASE = "fedrad/v1/release"
    ENTRY = "fedrad/v1/entry"
    CONTRIBUTION = "fedrad/v1/contribution"
    ENROLMENT = "fedrad/v1/enrolment"
    SITE_REQUEST = "fedrad/v1/site-request"


@dataclass(frozen=True)
class SigningKey:
    """A private Ed25519 key; `public` is its 32-byte public half as 64 hex digits."""

    private: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """Make the key of a 32-byte seed (tests and vectors)."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def public(self) -> str:
        return self.private.public_key().public_bytes_raw().hex()

    def sign(self, purpose: Purpose, message: bytes) -> bytes:
        """Return the 64-byte signature of `message` for `purpose`."""
        return self.private.sign(_framed(purpose, message))


def verify_signature(public_hex: str, purpose: Purpose, message: bytes, signature: bytes) -> None:
    """Raise SignatureInvalid unless the key signed this message for this purpose."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        key.verify(signature, _framed(purpose, message))
    except (InvalidSignature, ValueError) as error:
        raise SignatureInvalid(
            f"expected a {purpose.value} signature by key {public_hex[:16]}…, got one that does not verify"
        ) from error


def fingerprint(public_hex: str) -> str:
    """Format a public key for reading out on the telephone: 8 groups of 4 hex digits of its SHA-256."""
    digest = sha256_hex(bytes.fromhex(public_hex))[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def save_key(key: SigningKey, path: Path) -> None:
    """Write a private key as PKCS#8 PEM, mode 0600; an existing file is never replaced."""
    if path.exists():
        raise KeyFileInvalid(f"{path}: expected no key here yet, got one; a key is never overwritten")
    pem = key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(path, pem, mode=0o600)


def load_key(path: Path) -> SigningKey:
    """Read a private key; raises KeyFileInvalid when missing, of another kind or readable by others."""
    try:
        verify_private(path)
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise KeyFileInvalid(f"{path}: expected a private key, got {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise KeyFileInvalid(f"{path}: expected an unencrypted PKCS#8 PEM key, got something else") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise KeyFileInvalid(f"{path}: expected an Ed25519 key, got another kind")
    return SigningKey(private)


def verify_private(path: Path) -> None:
    """Raise KeyFileInvalid where others than its owner and this process's user can read a key file.

    systemd (from 254) gives a service its credentials as root's files of mode 0440: the group's bit is then
    the mask of an access list that names the service's user alone (acl(5)). Raises OSError for no file.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    others = 0o037 if mode & 0o070 == 0o040 and _only_mine(path) else 0o077
    if mode & others:
        raise KeyFileInvalid(f"{path}: expected mode 0600, got {mode:04o}; chmod 600 it")


def _only_mine(path: Path) -> bool:
    """Whether a file's access list lets in, besides its owner, only the user of this process."""
    try:
        data = os.getxattr(path, _ACCESS_LIST)
    except (OSError, AttributeError):
        return False
    entries = [_ENTRY.unpack_from(data, at) for at in range(4, len(data) - _ENTRY.size + 1, _ENTRY.size)]
    let_in = {(tag, who) for tag, may, who in entries if may and tag not in (_OWNER, _MASK)}
    return let_in == {(_USER, os.geteuid())}


def load_or_create_key(path: Path) -> SigningKey:
    """Read the key at `path`, or make and save one where there is none."""
    if not path.exists():
        save_key(SigningKey.generate(), path)
    return load_key(path)


def _framed(purpose: Purpose, message: bytes) -> bytes:
    return purpose.value.encode() + b"\x00" + message
