"""Deflated parts of messages."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.deflate import deflate, inflate
from common.errors import BodyTooLarge, EnvelopeMalformed, FedRadError


@given(st.binary(max_size=5000))
def test_what_was_deflated_inflates_to_itself(data: bytes) -> None:
    assert inflate(deflate(data), max_bytes=5000) == data


@given(st.binary(max_size=300))
def test_other_bytes_end_in_a_named_error_or_within_the_limit(data: bytes) -> None:
    with contextlib.suppress(FedRadError):
        assert len(inflate(data, max_bytes=1000)) <= 1000


def test_a_short_part_does_not_become_a_long_one() -> None:
    bomb = deflate(bytes(1 << 26))
    assert len(bomb) < 1 << 17
    with pytest.raises(BodyTooLarge):
        inflate(bomb, max_bytes=1 << 20)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_a_part_of_another_length_is_refused(change: object) -> None:
    with pytest.raises(EnvelopeMalformed):
        inflate(change(deflate(b"some text")), max_bytes=100)  # type: ignore[operator]
