"""Round records: the chain that a site follows, and what breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.canonical import canonical_json
from common.errors import (
    EnvelopeMalformed,
    FedRadError,
    PreviousStateMismatch,
    SignatureInvalid,
    WrongRound,
    WrongStudy,
)
from common.identity import SigningKey
from common.records import (
    RoundRecord,
    SignedRecord,
    format_record,
    parse_record,
    sign_record,
    signed_from_json,
    signed_to_json,
    verify_chain,
)

KEY = SigningKey.from_seed(b"o" * 32)
STUDY = "ab" * 32


def record(round: int, previous: str) -> RoundRecord:
    return RoundRecord(
        study=STUDY, round=round, attempt=1, previous=previous, adapter_in=f"{round:064x}",
        adapter_out=f"{round + 1:064x}", cohort=("alpha", "beta"), contributors=("alpha",),
        missing={"beta": "no answer"}, contributions={"alpha": "12" * 32}, groups=("projector",),
        learning_rate=0.001, sampling_rate=0.5, patients=40, mode="consortium", clip_norm=1.0,
        site_share_sigma_units=1.5, server_sigma_units=2.0, time_unix_s=1_800_000_000,
    )  # fmt: skip


def chain(count: int) -> list[SignedRecord]:
    signed: list[SignedRecord] = []
    previous = STUDY
    for round in range(count):
        signed.append(sign_record(KEY, record(round, previous)))
        previous = signed[-1].record.sha256
    return signed


def verify(records: list[SignedRecord], *, after_round: int = -1, previous: str = STUDY) -> None:
    verify_chain(records, study=STUDY, after_round=after_round, previous=previous, operator_key=KEY.public)


def test_a_record_parses_to_what_was_formatted() -> None:
    one = record(3, STUDY)
    assert parse_record(format_record(one)) == one
    signed = sign_record(KEY, one)
    assert signed_from_json(signed_to_json(signed)) == signed


def test_a_chain_verifies_from_the_study_and_from_the_middle() -> None:
    records = chain(4)
    verify(records)
    verify(records[2:], after_round=1, previous=records[1].record.sha256)
    verify([])


def test_a_gap_is_refused() -> None:
    records = chain(3)
    with pytest.raises(WrongRound):
        verify([records[0], records[2]])


def test_a_missing_beginning_is_refused() -> None:
    with pytest.raises(WrongRound):
        verify(chain(3)[1:])


def test_a_repeated_record_is_refused() -> None:
    records = chain(2)
    with pytest.raises(WrongRound):
        verify([records[0], records[0]])


def test_a_fork_is_refused_although_it_is_signed() -> None:
    records = chain(2)
    other = sign_record(KEY, replace(records[0].record, adapter_out="ff" * 32))
    with pytest.raises(PreviousStateMismatch, match="another history"):
        verify([other, records[1]])


def test_a_chain_on_another_start_is_refused() -> None:
    with pytest.raises(PreviousStateMismatch):
        verify(chain(2), previous="cd" * 32)


def test_a_record_of_another_study_is_refused() -> None:
    with pytest.raises(WrongStudy):
        verify([sign_record(KEY, replace(record(0, STUDY), study="cd" * 32))])


def test_a_forged_signature_is_refused() -> None:
    with pytest.raises(SignatureInvalid):
        verify([sign_record(SigningKey.from_seed(b"x" * 32), record(0, STUDY))])


def test_a_record_altered_after_signing_is_refused() -> None:
    (signed,) = chain(1)
    with pytest.raises(SignatureInvalid):
        verify([replace(signed, record=replace(signed.record, clip_norm=9.0))])


@pytest.mark.parametrize("signature", ["", "z" * 128, "AB" * 64, "ab" * 63, 7])
def test_a_signature_of_another_form_is_refused_by_name(signature: Any) -> None:
    value = signed_to_json(chain(1)[0]) | {"signature": signature}
    with pytest.raises(EnvelopeMalformed):
        signed_from_json(value)


@pytest.mark.parametrize("field", sorted(RoundRecord.__dataclass_fields__.keys() - {"rolled_back_to"}))
def test_a_missing_or_mistyped_field_is_refused(field: str) -> None:
    value = signed_to_json(chain(1)[0])["record"]
    without = {name: item for name, item in value.items() if name != field}
    for wrong in (without, value | {field: None}, value | {field: True}):
        with pytest.raises(EnvelopeMalformed):
            parse_record(canonical_json(wrong))


def test_a_rollback_stands_in_the_record_only_where_there_was_one() -> None:
    record = chain(1)[0].record
    assert b"rolled_back_to" not in format_record(record) and record.next_adapter == record.adapter_out
    back = replace(record, rolled_back_to="ab" * 32)
    assert parse_record(format_record(back)) == back and back.next_adapter == "ab" * 32
    value = signed_to_json(chain(1)[0])["record"]
    for wrong in ("", None, 1):
        with pytest.raises(EnvelopeMalformed):
            parse_record(canonical_json(value | {"rolled_back_to": wrong}))


@pytest.mark.parametrize("extra", [{"loss": 0.3}, {"cohort": [1]}, {"missing": {"beta": 1}}])
def test_an_unknown_field_or_item_is_refused(extra: dict[str, Any]) -> None:
    value = signed_to_json(chain(1)[0])["record"] | extra
    with pytest.raises(EnvelopeMalformed):
        parse_record(canonical_json(value))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_end_in_a_named_error(data: bytes) -> None:
    with pytest.raises(FedRadError):
        parse_record(data)
