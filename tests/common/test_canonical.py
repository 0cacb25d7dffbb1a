"""Canonical JSON against bytes that a peer may send: one encoding, named errors only."""

from __future__ import annotations

import pytest

from common.canonical import canonical_json, parse_canonical
from common.errors import BodyTooLarge, NotCanonical

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"1" * 5000, b'{"\\ud800":1}', b'"\\ud800"', b"NaN", b"1e999", b"-0", b"1.0",
     b'{"b":1,"a":1}', b'{"a":1,"a":1}', b"[1, 2]", b"9007199254740993", DEEP],
)  # fmt: skip
def test_anything_but_the_one_encoding_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(NotCanonical):
        parse_canonical(data, max_bytes=1 << 20)


def test_bytes_over_the_cap_are_not_parsed() -> None:
    with pytest.raises(BodyTooLarge):
        parse_canonical(b"[1,2]", max_bytes=4)


def test_what_is_canonical_comes_back() -> None:
    value = {"a": [1, 2.5, "é", None, True], "b": {"": []}}
    assert parse_canonical(canonical_json(value), max_bytes=100) == value
