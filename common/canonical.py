"""Canonical JSON (RFC 8785) and SHA-256: the one encoding that FedRad hashes and signs.

Guarantees: `parse_canonical(canonical_json(x)) == x`, and any other byte sequence is refused, so two
parties that hold the same hash hold the same value. It does not validate what the value means.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import rfc8785

from common.errors import BodyTooLarge, NotCanonical


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value (dict, list, str, int, float, bool, None) as RFC 8785 bytes.

    Raises NotCanonical for values outside the I-JSON range (NaN, infinities, integers beyond 2^53).
    """
    try:
        encoded: bytes = rfc8785.dumps(value)
        return encoded
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise NotCanonical(f"value cannot be encoded as canonical JSON: {error}") from error


def parse_canonical(data: bytes, *, max_bytes: int) -> Any:
    """Decode canonical JSON; raises BodyTooLarge or NotCanonical."""
    if len(data) > max_bytes:
        raise BodyTooLarge(f"expected at most {max_bytes} bytes of JSON, got {len(data)}")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UTF-8, syntax, whole numbers over 4,300 digits, depth
        raise NotCanonical(f"expected canonical JSON, got {type(error).__name__}") from error
    if canonical_json(value) != data:
        raise NotCanonical("expected canonical JSON (RFC 8785), got another encoding of the same value")
    return value


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of bytes as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()
