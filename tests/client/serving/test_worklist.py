"""The worklist: one case per picture, states move forward only, decisions are kept, old ones are deleted."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.serving.worklist import (
    MAX_TEXT_CHARS,
    Case,
    Patient,
    State,
    Worklist,
    indication_of,
    patient_of,
    verify_sign_off,
    word_edits,
)
from common.errors import CaseDecided, CaseUnknown, SignOffInvalid
from tests.client.data.synthetic_dicom import Planted, dataset_for

DRAFT = {"decision": {"refused": False}, "text": "The lungs are clear."}


def add(worklist: Worklist, picture: bytes = b"one", received_s: int = 1000) -> Case:
    return worklist.add(
        picture, kind="png", source="upload", received_s=received_s, indication="Cough.", patient=Patient()
    )


def test_same_picture_twice_is_one_case(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path / "w")
    first, second = add(worklist), add(worklist, received_s=2000)
    assert first == second and worklist.cases() == [first]
    assert worklist.picture_path(first.id).read_bytes() == b"one"
    assert (tmp_path / "w").stat().st_mode & 0o077 == 0
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "w").rglob("*"))


def test_latest_case_comes_first_after_a_restart(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    old, new = add(worklist), add(worklist, b"two", 2000)
    assert Worklist(tmp_path).cases() == [new, old]


def test_case_moves_from_waiting_to_accepted_and_stays(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    assert worklist.state(case.id) is State.WAITING
    worklist.put_draft(case.id, DRAFT)
    assert worklist.state(case.id) is State.DRAFTED
    worklist.decide(case.id, {"text": "Clear."}, accepted=True)
    assert worklist.state(case.id) is State.ACCEPTED
    with pytest.raises(CaseDecided):
        worklist.put_draft(case.id, DRAFT)
    with pytest.raises(CaseDecided):
        worklist.decide(case.id, {}, accepted=False)
    assert Worklist(tmp_path).decision(case.id) == {"text": "Clear.", "outcome": "accepted"}


def test_refused_and_rejected_are_told_apart(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    worklist.put_draft(case.id, {"decision": {"refused": True}, "text": ""})
    assert worklist.state(case.id) is State.REFUSED
    worklist.decide(case.id, {"reason": "not a chest"}, accepted=False)
    assert worklist.state(case.id) is State.REJECTED


def test_attention_goes_with_its_draft(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    worklist.put_draft(case.id, DRAFT)
    assert worklist.attention(case.id) is None
    worklist.put_attention(case.id, np.ones((3, 16), np.float32))
    stored = worklist.attention(case.id)
    assert stored is not None and stored.shape == (3, 16)
    worklist.put_draft(case.id, DRAFT)
    assert worklist.attention(case.id) is None


@pytest.mark.parametrize("id", ["0" * 32, "../../etc", "", "Z" * 32])
def test_unknown_case_is_refused(tmp_path: Path, id: str) -> None:
    with pytest.raises(CaseUnknown):
        Worklist(tmp_path).case(id)


def test_purge_deletes_only_old_decided_cases(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    old, waiting, new = add(worklist), add(worklist, b"two"), add(worklist, b"three", 9000)
    for case in (old, new):
        worklist.decide(case.id, {}, accepted=False)
    assert worklist.purge(before_s=5000) == 1
    assert [case.id for case in worklist.cases()] == [new.id, waiting.id]


@pytest.mark.parametrize(
    ("text", "reason", "accepted"),
    [(" ", "", True), ("", "  ", False), ("x" * (MAX_TEXT_CHARS + 1), "", True), ("", "x" * 2001, False)],
)
def test_empty_or_endless_sign_off_is_refused(text: str, reason: str, accepted: bool) -> None:
    with pytest.raises(SignOffInvalid):
        verify_sign_off(text=text, reason=reason, accepted=accepted)


def test_word_edits_counts_words() -> None:
    assert word_edits("No pneumothorax.", "No pneumothorax.") == 0
    assert word_edits("small left effusion", "large left pleural effusion") == 2
    assert word_edits("", "three new words") == 3
    assert word_edits("a b c", "") == 3


@given(st.text("ab ", max_size=20), st.text("ab ", max_size=20))
def test_word_edits_is_a_distance(one: str, other: str) -> None:
    assert word_edits(one, other) == word_edits(other, one) <= max(len(one.split()), len(other.split()))
    assert (word_edits(one, other) == 0) == (one.split() == other.split())


def test_header_is_read_for_the_reader() -> None:
    planted = Planted("XR1", "445566", "Brandt", "Zofia", "19500102", "20200304", "M", (), (), False, "")
    dataset = dataset_for(planted, np.full((64, 64), 0.5), view="PA", number=1, inverted=False)
    dataset.ReasonForTheRequestedProcedure = "Cough\nfor weeks"
    patient = patient_of(dataset)
    assert (patient.name, patient.id, patient.view) == ("Brandt Zofia", "445566", "PA")
    assert (patient.accession, patient.study_date) == ("XR1", "20200304")
    assert indication_of(dataset) == "Cough for weeks"
