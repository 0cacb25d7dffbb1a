"""The worklist: one case per picture, states move forward only, decisions are kept, old ones are deleted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.serving.worklist import (
    MAX_TEXT_CHARS,
    Case,
    Patient,
    Purged,
    State,
    Worklist,
    indication_of,
    patient_of,
    verify_sign_off,
    word_edits,
)
from common.errors import CaseDamaged, CaseDecided, CaseUnknown, SignOffInvalid
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
    assert worklist.purge(before_s=5000) == Purged(decided=1)
    assert [case.id for case in worklist.cases()] == [new.id, waiting.id]


SPOILT = [b"", b"{", b"[]", b"null", b"\xff", b'{"time_s": "soon"}', b"[" * 100_000, None]


@pytest.mark.parametrize("held", SPOILT)
@pytest.mark.parametrize("name", ["case.json", "draft.json", "decision.json"])
def test_a_damaged_case_names_its_file_and_keeps_its_damage_to_itself(
    tmp_path: Path, name: str, held: bytes | None
) -> None:
    """`None`: where the file should be lies a folder."""
    worklist = Worklist(tmp_path)
    good, bad = add(worklist), add(worklist, b"two")
    worklist.put_draft(bad.id, DRAFT)
    path = tmp_path / bad.id / name
    if held is None:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(held)
    with pytest.raises(CaseDamaged, match=f"a whole {bad.id}/{name}"):
        worklist.state(bad.id)
    if name != "draft.json":
        with pytest.raises(CaseDamaged):
            worklist.decide(bad.id, {"text": "Clear."}, accepted=True)
    assert good in worklist.cases() and worklist.state(good.id) is State.WAITING
    (problem,) = worklist.damages()
    assert name in problem
    assert worklist.purge(before_s=1 << 40).decided == 0 and (tmp_path / bad.id / "picture").exists()


@pytest.mark.parametrize(
    "change",
    [{"received_s": "1"}, {"received_s": True}, {"id": "0" * 32}, {"kind": None}, {"more": 1},
     {"patient": {"name": 5}}, {"patient": []}],
)  # fmt: skip
def test_a_case_of_another_shape_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    path = tmp_path / case.id / "case.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(CaseDamaged):
        worklist.case(case.id)
    with pytest.raises(CaseDamaged):
        add(worklist)
    assert worklist.cases() == []


def test_a_case_without_its_case_file_is_damaged_where_more_than_a_crash_leaves_is_there(
    tmp_path: Path,
) -> None:
    worklist = Worklist(tmp_path)
    read, half = add(worklist), add(worklist, b"two")
    worklist.decide(read.id, {"text": "Clear."}, accepted=True)
    for case in (read, half):
        (tmp_path / case.id / "case.json").unlink()
    assert [problem.split()[3] for problem in worklist.damages()] == [f"{read.id}/case.json"]
    with pytest.raises(CaseUnknown):
        worklist.case(half.id)
    assert worklist.purge(before_s=1 << 40) == Purged(unfinished=1, damaged=1)
    assert [path.name for path in tmp_path.iterdir()] == [read.id]
    assert add(worklist, b"two") in worklist.cases()


def test_what_is_no_case_is_neither_listed_nor_deleted(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    shutil.copytree(tmp_path / case.id, tmp_path / f"aside-{case.id}")
    (tmp_path / ("0" * 32)).write_bytes(b"a file")
    assert worklist.cases() == [case] and worklist.damages() == []
    assert worklist.purge(before_s=1 << 40) == Purged()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    (tmp_path / case.id / "picture").unlink()
    with pytest.raises(CaseDamaged, match="picture in the worklist, but it is missing"):
        worklist.picture_path(case.id)


def test_damaged_regions_are_made_again(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    for held in (b"", b"\x93NUMPY", b"not numpy"):
        (tmp_path / case.id / "attention.npy").write_bytes(held)
        assert worklist.attention(case.id) is None


def test_a_purge_after_a_killed_one_of_the_same_picture_succeeds(tmp_path: Path) -> None:
    worklist = Worklist(tmp_path)
    case = add(worklist)
    shutil.copytree(tmp_path / case.id, tmp_path / f".gone-{case.id}")
    worklist.decide(case.id, {}, accepted=False)
    assert worklist.purge(before_s=1 << 40) == Purged(decided=1)
    assert list(tmp_path.iterdir()) == []


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
