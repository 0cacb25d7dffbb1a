"""The primitives of secure aggregation, each wrapped once: X25519, HKDF, ChaCha20-Poly1305, Ed25519.

Guarantees: public keys are canonical encodings of points outside the small subgroups; every derived key
names its use and its context; one key seals one message. It holds no state and draws no randomness. It
gives no protection against an attacker with a quantum computer.
Sources: RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20-Poly1305), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import PublicKeyInvalid, SecureAggregationError, ShareUnreadable

DOMAIN = b"fedrad/v1/secagg/"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
_FIELD_PRIME = 2**255 - 19
_NONCE = bytes(12)
# The canonical u-coordinates of order 1, 2, 4 and 8, on the curve or its twist (https://cr.yp.to/ecdh.html).
_LOW_ORDER = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
    )
)

Sign = Callable[[bytes], bytes]
"""Makes a 64-byte Ed25519 signature of a message with a site's identity key."""


def framed(label: str, *fields: bytes) -> bytes:
    """Encode a label and fields injectively: the domain, then each with its length as u32 big-endian."""
    parts = (DOMAIN + label.encode("ascii"), *fields)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def digest(label: str, *fields: bytes) -> bytes:
    """Hash labelled fields to 32 bytes with SHA-256."""
    return hashlib.sha256(framed(label, *fields)).digest()


def derive(secret: bytes, context: bytes, label: str, *fields: bytes, size: int = KEY_BYTES) -> bytes:
    """Derive `size` bytes by HKDF-SHA256, salted by the context, with the labelled fields as info."""
    return hkdf(secret, salt=context, info=framed(label, *fields), size=size)


def hkdf(secret: bytes, *, salt: bytes, info: bytes, size: int) -> bytes:
    """Derive `size` ≤ 8160 bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), size, salt, info).derive(secret)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def verify_public_key(public: bytes) -> None:
    """Raise PublicKeyInvalid unless the bytes encode, canonically, a point of high order."""
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD_PRIME:
        raise PublicKeyInvalid("expected a canonical 32-byte X25519 public key, got another encoding")
    if public in _LOW_ORDER:
        raise PublicKeyInvalid("expected an X25519 point of high order, got one of low order")


def exchange(private: bytes, public: bytes) -> bytes:
    """Return the 32-byte X25519 shared secret; raises PublicKeyInvalid for a low-order or odd encoding."""
    verify_public_key(public)
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise PublicKeyInvalid("expected a shared secret that is not zero, got zero") from error


def seal(key: bytes, plaintext: bytes, bound_to: bytes) -> bytes:
    """Encrypt with ChaCha20-Poly1305 under a key that is used once, hence the zero nonce; adds 16 bytes."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, bound_to)


def unseal(key: bytes, sealed: bytes, bound_to: bytes) -> bytes:
    """Decrypt what `seal` made; raises ShareUnreadable."""
    return decrypt(key, nonce=_NONCE, sealed=sealed, bound_to=bound_to)


def decrypt(key: bytes, *, nonce: bytes, sealed: bytes, bound_to: bytes) -> bytes:
    """Decrypt ChaCha20-Poly1305; raises ShareUnreadable unless the tag is right."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, bound_to)
    except (InvalidTag, ValueError) as error:
        raise ShareUnreadable("expected a box sealed for this place, got one that does not open") from error


def verify_signature(
    public_hex: str, signature: bytes, message: bytes, *, error: type[SecureAggregationError], what: str
) -> None:
    """Raise `error` unless the Ed25519 key (64 hex digits) signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(signature, message)
    except (InvalidSignature, ValueError) as cause:
        raise error(f"{what}: expected a signature by the pinned identity, got one that fails") from cause
