"""Secret sharing: any threshold of shares rebuilds, fewer say nothing, nonsense is refused."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import MessageMalformed, SecretWrong
from common.secagg.shamir import (
    COEFFICIENT_BYTES,
    PRIME,
    SHARE_BYTES,
    combine,
    lagrange_weights,
    parse_share,
    split,
)


def randomness(threshold: int, fill: int = 5) -> bytes:
    return bytes((fill + i * i) % 251 for i in range((threshold - 1) * COEFFICIENT_BYTES))


def test_the_modulus_is_prime() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd, PRIME)
        chain = [x] + [x := x * x % PRIME for _ in range(twos - 1)]
        assert chain[0] == 1 or PRIME - 1 in chain


@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 4), st.randoms())
def test_any_threshold_of_shares_rebuilds_the_secret(
    secret: bytes, threshold: int, spare: int, random: Random
) -> None:
    count = threshold + spare
    coins = random.randbytes((threshold - 1) * COEFFICIENT_BYTES)
    shares = split(secret, threshold=threshold, count=count, randomness=coins)
    points = random.sample(range(1, count + 1), threshold)
    assert combine({x: shares[x - 1] for x in points}) == secret
    assert combine({x: shares[x - 1] for x in points}, lagrange_weights(points)) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_extreme_secrets_are_rebuilt(secret: bytes) -> None:
    shares = split(secret, threshold=34, count=50, randomness=randomness(34))
    assert combine({x: shares[x - 1] for x in range(17, 51)}) == secret


def test_every_secret_is_equally_possible_below_the_threshold() -> None:
    shares = split(b"\x2a" * 32, threshold=3, count=4, randomness=randomness(3))
    seen = {1: shares[0], 2: shares[1]}
    for guess in (bytes(32), b"\x17" * 32, b"\xff" * 32):
        # For each guess there is exactly one third share that makes it true, so two shares rule out none.
        weights = lagrange_weights([1, 2, 3])
        partial = sum(w * parse_share(s) for w, s in zip(weights, seen.values(), strict=False))
        third = (int.from_bytes(guess, "big") - partial) * pow(weights[2], -1, PRIME) % PRIME
        assert combine(seen | {3: third.to_bytes(SHARE_BYTES, "big")}) == guess


def test_fewer_shares_do_not_rebuild_the_secret() -> None:
    secret = b"\x2a" * 32
    shares = split(secret, threshold=4, count=5, randomness=randomness(4))
    for points in combinations(range(1, 6), 3):
        weights = lagrange_weights(points)
        value = sum(w * parse_share(shares[x - 1]) for w, x in zip(weights, points, strict=True)) % PRIME
        assert value != int.from_bytes(secret, "big")


def test_shares_that_rebuild_no_secret_are_refused() -> None:
    with pytest.raises(SecretWrong):
        combine({1: (PRIME - 1).to_bytes(SHARE_BYTES, "big")})


@pytest.mark.parametrize("share", [PRIME.to_bytes(SHARE_BYTES, "big"), bytes(32), bytes(34)])
def test_share_outside_the_field_is_refused(share: bytes) -> None:
    with pytest.raises(MessageMalformed):
        parse_share(share)


def test_splitting_refuses_impossible_thresholds_and_short_randomness() -> None:
    for secret, threshold, count, coins in (
        (bytes(31), 2, 3, randomness(2)),
        (bytes(32), 0, 3, b""),
        (bytes(32), 4, 3, randomness(4)),
        (bytes(32), 3, 4, randomness(2)),
    ):
        with pytest.raises(ValueError):
            split(secret, threshold=threshold, count=count, randomness=coins)
