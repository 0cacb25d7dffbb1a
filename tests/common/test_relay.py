"""Envelopes in Flower records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import relay
from common.errors import BodyTooLarge, RelayInvalid
from common.relay import PART_BYTES, RECORD, join_envelope, split_envelope

Records = dict[str, dict[str, object]]


@given(stage=st.text(max_size=20), envelope=st.binary(max_size=100))
def test_a_small_envelope_is_one_record(stage: str, envelope: bytes) -> None:
    records = split_envelope(stage, envelope)
    assert records == {RECORD: {"stage": stage, "envelope": envelope}}
    joined = join_envelope(records)
    assert (joined[0], bytes(joined[1])) == (stage, envelope)
    assert not records, "the parts stay in memory twice"


@pytest.mark.parametrize("size", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_what_is_split_is_joined(size: int) -> None:
    envelope = bytes(range(251)) * (size // 251 + 1)
    records = split_envelope("contribute", envelope[:size])
    assert len(records) == -(-size // PART_BYTES)
    assert all(len(fields["envelope"]) <= PART_BYTES for fields in records.values())
    stage, joined = join_envelope(dict(reversed(list(records.items()))))
    assert stage == "contribute" and bytes(joined) == envelope[:size]


def three_parts() -> Records:
    return {name: dict(fields) for name, fields in split_envelope("x", bytes(2 * PART_BYTES + 1)).items()}


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
    records["fedrad.1"]["envelope"] = b"short"


def with_an_empty_end(records: Records) -> None:
    records["fedrad.2"]["envelope"] = b""


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
        with_an_empty_end,
    ],
)
def test_records_that_no_split_makes_are_refused(damage: object) -> None:
    records = three_parts()
    damage(records)  # type: ignore[operator]
    with pytest.raises(RelayInvalid):
        join_envelope(records)


def test_an_oversized_envelope_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    records = three_parts()
    monkeypatch.setattr(relay, "MAX_ENVELOPE_BYTES", 2 * PART_BYTES)
    with pytest.raises(BodyTooLarge):
        split_envelope("x", bytes(2 * PART_BYTES + 1))
    with pytest.raises(BodyTooLarge):
        join_envelope(records)
