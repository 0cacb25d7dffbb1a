"""Entries: one encoding each, strict fields, signatures that bind, nothing that could identify a patient."""

import dataclasses
import json
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.canonical import canonical_json
from common.errors import EntryInvalid, FedRadError, SignatureInvalid
from common.ledger.entries import (
    BUCKETS,
    KINDS,
    OPERATOR,
    Acceptance,
    AdapterDecision,
    Approval,
    Body,
    DataUse,
    Decision,
    EndReason,
    Enrolment,
    Entry,
    EntrySignature,
    Evaluation,
    Incident,
    KeyCompromise,
    KeyUse,
    Release,
    ReleasedFile,
    ReleaseRollback,
    Revocation,
    RevocationReason,
    Rotation,
    StudyEnd,
    StudyOpened,
    format_entry,
    parse_entry,
)
from common.ledger.statements import (
    bucket,
    commit,
    sign_entry,
    verify_contribution,
    verify_entry_signature,
    verify_signed_by,
)
from tests.common.ledger.consortium import CODE, LOCKFILE, START_S, key_of, round_record, study

STUDY = study()
H = "ab" * 32
BODIES: list[Body] = [
    StudyOpened(manifest=STUDY, code=CODE, lockfile=LOCKFILE, software="fedrad 0.1.0"),
    Approval(site="amber", decision=Decision.APPROVE, policy="", signature="ab" * 64),
    DataUse(site="amber", commitment=H, patients="100-199", studies="200-499", dropped={"lateral": "20-49"},
            tools={"fedrad": "0.1.0"}),
    Enrolment(site="amber", message_key=H, witness_key="cd" * 32, tls_fingerprint="", node_fingerprint=H),
    Rotation(holder="amber", use=KeyUse.WITNESS, old=H, new="cd" * 32),
    Revocation(holder="amber", use=KeyUse.MESSAGE, key=H, reason=RevocationReason.LEFT),
    KeyCompromise(holder="amber", use=KeyUse.MESSAGE, key=H, since_s=START_S),
    round_record(STUDY, 0, epsilon=1.25, release_epsilon=0.5, dropouts=("cedar",)),
    Evaluation(number=1, adapter=H, site="all", subgroup="all", studies="100-199",
               metrics={"finding_f1": 0.5}),
    AdapterDecision(number=1, decision=Acceptance.ROLLBACK, adapter=H, rejected="cd" * 32),
    Release(version=1, adapter=H, number=2, base="tiny", site_epsilon=2.0, release_epsilon=1.0, delta=1e-5,
            files=(ReleasedFile(path="adapter.safetensors", bytes=10, sha256=H),)),
    ReleaseRollback(frm=2, to=1, code="worse-at-a-site"),
    Incident(code="site-dropped", site="cedar", number=3, detail=""),
    StudyEnd(reason=EndReason.COMPLETED, number=3, adapter=H, release_epsilon=1.5),
]  # fmt: skip


def entry(body: Body) -> Entry:
    return sign_entry(Entry(START_S, STUDY.sha256, body), signer=OPERATOR, key=key_of(OPERATOR))


def test_every_kind_of_entry_is_covered_here() -> None:
    assert [type(body) for body in BODIES] == list(KINDS.values())


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_entries_survive_the_round_trip_as_one_line(body: Body) -> None:
    data = format_entry(entry(body))
    assert b"\n" not in data
    assert parse_entry(data) == entry(body)
    assert format_entry(parse_entry(data)) == data


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_unknown_missing_and_mistyped_fields_are_refused(body: Body) -> None:
    value = json.loads(format_entry(entry(body)))

    def refused(changed: Any) -> None:
        with pytest.raises(FedRadError):
            parse_entry(canonical_json(changed))

    for where in ([], ["body"], ["signatures", 0]):
        target = value
        for step in where:
            target = target[step]
        for name in list(target):
            kept = target.pop(name)
            refused(value)
            wrongs: list[Any] = [None, [None], {"x": {}}, "\x00", -1.5]
            for wrong in wrongs:
                target[name] = wrong
                refused(value)
            target[name] = kept
        target["patient"] = "x"
        refused(value)
        del target["patient"]
    parse_entry(canonical_json(value))


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_a_signature_does_not_survive_any_change_of_body_or_study(body: Body) -> None:
    signed = entry(body)
    verify_signed_by(signed, signer=OPERATOR, public_hex=key_of(OPERATOR).public)
    others = [b for b in BODIES if b is not body]
    for changed in [dataclasses.replace(signed, body=b) for b in others]:
        with pytest.raises(SignatureInvalid):
            verify_entry_signature(changed, signed.signatures[0])
    with pytest.raises(SignatureInvalid):
        verify_entry_signature(dataclasses.replace(signed, study="00" * 32), signed.signatures[0])
    with pytest.raises(SignatureInvalid, match="expected a signature of operator"):
        verify_signed_by(signed, signer=OPERATOR, public_hex=key_of("amber").public)


def test_no_body_has_a_free_text_field() -> None:
    """Every text in a body is a hash, key, site id, code, path, version, bucket or choice."""
    for cls in KINDS.values():
        for name, hint in cls.__annotations__.items():
            if hint in ("str", "tuple[str, ...]", "dict[str, str]"):
                field = cls.__dataclass_fields__[name]
                assert isinstance(field.metadata, types.MappingProxyType) and "pattern" in field.metadata, (
                    name
                )
                for words in ("Jane Doe", "Jane Doe, 93 years: mass, see 2019-03-04"):
                    assert not field.metadata["pattern"].fullmatch(words), (cls, name)


@pytest.mark.parametrize("studies", ["7", "12-13", "<3", "100-200"])
def test_exact_or_small_counts_are_refused(studies: str) -> None:
    evaluation = BODIES[8]
    assert isinstance(evaluation, Evaluation)
    body = dataclasses.replace(evaluation, studies=studies)
    with pytest.raises(EntryInvalid):
        format_entry(Entry(START_S, STUDY.sha256, body))


@given(st.integers(0, 10**7))
def test_a_bucket_holds_its_count(count: int) -> None:
    name = bucket(count)
    assert name in BUCKETS
    if name.endswith("+"):
        assert count >= int(name[:-1])
    elif name.startswith("<"):
        assert count < int(name[1:])
    else:
        low, high = map(int, name.split("-"))
        assert low <= count <= high


def test_a_commitment_is_keyed() -> None:
    assert commit(b"k" * 32, b"data") != commit(b"l" * 32, b"data")
    with pytest.raises(EntryInvalid, match="32 bytes"):
        commit(b"short", b"data")


def test_a_site_signs_its_own_numbers_in_a_round_record() -> None:
    record = round_record(STUDY, 0, epsilon=1.25, release_epsilon=0.5)
    part = record.participations[0]
    verify_contribution(STUDY.sha256, record, part, key_of("amber").public)
    for bad_record, bad_part in [
        (record, dataclasses.replace(part, epsilon=1.0)),
        (record, dataclasses.replace(part, sigma_units=9.0)),
        (record, dataclasses.replace(part, commitment="00" * 32)),
        (dataclasses.replace(record, clip_norm=2.0), part),
        (dataclasses.replace(record, sampling_rate=0.01), part),
        (dataclasses.replace(record, adapter_in="00" * 32), part),
        (dataclasses.replace(record, attempt=2), part),
    ]:
        with pytest.raises(SignatureInvalid):
            verify_contribution(STUDY.sha256, bad_record, bad_part, key_of("amber").public)


@pytest.mark.parametrize(
    "change",
    [
        {"adapter_out": ""},
        {"dropouts": ("amber",)},
        {"cohort": ("amber", "birch")},
        {"cohort": ("amber", "amber", "birch", "cedar")},
        {"clip_norm": float("nan")},
        {"sampling_rate": 1.5},
        {"number": -1},
    ],
)
def test_an_impossible_round_record_is_refused(change: dict[str, Any]) -> None:
    body = dataclasses.replace(round_record(STUDY, 0, epsilon=1.0, release_epsilon=1.0), **change)
    with pytest.raises(FedRadError):
        format_entry(Entry(START_S, STUDY.sha256, body))


def test_a_study_entry_under_another_hash_or_a_rotation_to_the_same_key_is_refused() -> None:
    with pytest.raises(EntryInvalid, match="manifest's own hash"):
        format_entry(Entry(START_S, "00" * 32, BODIES[0]))
    with pytest.raises(EntryInvalid, match="new key"):
        format_entry(Entry(START_S, STUDY.sha256, Rotation(holder="amber", use=KeyUse.TLS, old=H, new=H)))


def test_signatures_gathered_elsewhere_can_be_joined() -> None:
    from common.ledger.statements import add_signatures

    plain = Entry(START_S, STUDY.sha256, BODIES[10])
    site_part = sign_entry(plain, signer="amber", key=key_of("amber")).signatures
    joined = add_signatures(sign_entry(plain, signer=OPERATOR, key=key_of(OPERATOR)), site_part)
    for signature in joined.signatures:
        verify_entry_signature(joined, signature)
    assert all(isinstance(s, EntrySignature) for s in parse_entry(format_entry(joined)).signatures)
