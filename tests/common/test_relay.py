"""Envelopes in Flower records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import relay
from common.errors import BodyTooLarge, EnvelopeMalformed, FedRadError, RelayInvalid
from common.protocol import Envelope
from common.relay import PART_BYTES, RECORD, body_parts, join_envelope, split_envelope

Records = dict[str, dict[str, object]]
FRAME = b"FRM1" + (2).to_bytes(4, "big") + b"{}" + bytes(64)


@given(stage=st.text(max_size=20), body=st.binary(max_size=100))
def test_a_small_envelope_is_one_record(stage: str, body: bytes) -> None:
    records = split_envelope(stage, Envelope(FRAME, body))
    assert records == {RECORD: {"stage": stage, "envelope": FRAME + body}}
    assert join_envelope(records) == (stage, Envelope(FRAME, body))
    assert not records, "the parts stay in memory twice"


@pytest.mark.parametrize("size", [PART_BYTES - len(FRAME), PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_what_is_split_is_joined(size: int) -> None:
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    records = split_envelope("contribute", Envelope(FRAME, body))
    assert len(records) == (1 if size + len(FRAME) <= PART_BYTES else 1 + -(-size // PART_BYTES))
    assert all(len(fields["envelope"]) <= PART_BYTES for fields in records.values())
    assert join_envelope(dict(reversed(list(records.items())))) == ("contribute", Envelope(FRAME, body))


@pytest.mark.parametrize("own", [(b"north", b"south"), (b"north", b"south-east")])
def test_two_sites_messages_share_the_records_of_what_both_are_sent(own: tuple[bytes, bytes]) -> None:
    adapter = bytes(range(256)) * (2 * PART_BYTES // 256)
    one, two = own[0] + adapter, own[1] + adapter
    parts = body_parts(one)
    first = split_envelope("x", Envelope(FRAME, one), parts)
    salted = split_envelope("x", Envelope(FRAME, one), parts, salt="ab")
    assert [set(fields) - {"stage", "envelope"} for fields in salted.values()] == [set(), *[{"salt"}] * 3]
    assert join_envelope({name: dict(fields) for name, fields in salted.items()})[1].body == one
    second = split_envelope("x", Envelope(FRAME, two), body_parts(two, like=parts))
    assert {name for name in first if first[name] != second[name]} == {"fedrad.1"}
    assert all(first[name]["envelope"] is second[name]["envelope"] for name in ("fedrad.2", "fedrad.3"))
    assert join_envelope(second) == ("x", Envelope(FRAME, two))


def test_bytes_that_no_frame_begins_are_refused() -> None:
    with pytest.raises(EnvelopeMalformed):
        join_envelope({RECORD: {"stage": "x", "envelope": b"junk" * 50}})


@pytest.mark.parametrize("first", [b"", FRAME[:-1], FRAME + b"x", b"junk" * 50])
def test_a_first_record_that_is_no_frame_is_refused(first: bytes) -> None:
    records = three_parts()
    records[RECORD]["envelope"] = first
    with pytest.raises(FedRadError):
        join_envelope(records)


def three_parts() -> Records:
    records = split_envelope("x", Envelope(FRAME, bytes(PART_BYTES + 1)))
    return {name: dict(fields) for name, fields in records.items()}


def without_the_middle(records: Records) -> None:
    del records["fedrad.1"]


def with_a_stranger(records: Records) -> None:
    records["other"] = records.pop("fedrad.2")


def with_an_unknown_field(records: Records) -> None:
    records["fedrad.1"]["note"] = "x"


def with_text_for_bytes(records: Records) -> None:
    records["fedrad.1"]["envelope"] = "x" * PART_BYTES


def with_two_stages(records: Records) -> None:
    records["fedrad.1"]["stage"] = "y"


def with_a_short_part(records: Records) -> None:
    records["fedrad.2"]["envelope"] = b"short"


def with_an_empty_start(records: Records) -> None:
    records["fedrad.1"]["envelope"] = b""


def with_a_long_start(records: Records) -> None:
    records["fedrad.1"]["envelope"] = bytes(PART_BYTES + 1)


@pytest.mark.parametrize(
    "damage",
    [
        dict.clear,
        without_the_middle,
        with_a_stranger,
        with_an_unknown_field,
        with_text_for_bytes,
        with_two_stages,
        with_a_short_part,
        with_an_empty_start,
        with_a_long_start,
    ],
)
def test_records_that_no_split_makes_are_refused(damage: object) -> None:
    records = three_parts()
    damage(records)  # type: ignore[operator]
    with pytest.raises(RelayInvalid):
        join_envelope(records)


def test_an_oversized_envelope_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    records = three_parts()
    monkeypatch.setattr(relay, "MAX_ENVELOPE_BYTES", PART_BYTES)
    with pytest.raises(BodyTooLarge):
        split_envelope("x", Envelope(FRAME, bytes(2 * PART_BYTES + 1)))
    with pytest.raises(BodyTooLarge):
        join_envelope(records)
