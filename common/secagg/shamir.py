"""Shamir secret sharing of 32-byte secrets over the prime field of 2^256 + 297.

Guarantees: any `threshold` shares give the secret, fewer say nothing about it. Shares carry no proof:
that a share is the dealt one, and a rebuilt secret the advertised one, the caller checks against digests.
Big-integer arithmetic of Python is not constant-time. Source: Shamir 1979.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import MessageMalformed, SecretWrong

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
COEFFICIENT_BYTES = 48


def split(secret: bytes, *, threshold: int, count: int, randomness: bytes) -> list[bytes]:
    """Split a secret into `count` shares of 33 bytes, of which `threshold` rebuild it.

    `randomness`: (threshold − 1) × 48 uniform bytes; 48 bytes modulo the prime are within 2^-127 of uniform.
    The i-th share is the polynomial's value at i + 1.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError("expected 32 secret bytes and 1 ≤ threshold ≤ count")
    if len(randomness) != (threshold - 1) * COEFFICIENT_BYTES:
        raise ValueError(
            f"expected {(threshold - 1) * COEFFICIENT_BYTES} random bytes, got {len(randomness)}"
        )
    step = COEFFICIENT_BYTES
    polynomial = [int.from_bytes(secret, "big")]
    polynomial += [int.from_bytes(randomness[i : i + step], "big") for i in range(0, len(randomness), step)]
    return [_evaluate(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


def lagrange_weights(points: Sequence[int]) -> list[int]:
    """Return the weights that interpolate a polynomial at zero from its values at distinct `points` ≥ 1."""
    weights = []
    for x in points:
        numerator, denominator = 1, 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return weights


def combine(shares: Mapping[int, bytes], weights: Sequence[int] | None = None) -> bytes:
    """Rebuild a secret from exactly `threshold` shares, keyed by their points 1, 2, …

    `weights` of the same points in the same order may be passed when many secrets share them.
    Raises SecretWrong when the result is no 32-byte value, which right shares never give.
    """
    used = lagrange_weights(list(shares)) if weights is None else weights
    total = sum(w * parse_share(share) for w, share in zip(used, shares.values(), strict=True)) % PRIME
    if total >= 2**256:
        raise SecretWrong("expected shares of a 32-byte secret, got some that rebuild another value")
    return total.to_bytes(SECRET_BYTES, "big")


def parse_share(share: bytes) -> int:
    """Read a 33-byte big-endian field element; raises MessageMalformed."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise MessageMalformed("expected a share of 33 bytes below the prime, got another value")
    return value


def _evaluate(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
