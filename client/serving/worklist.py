"""The cases that wait for a reader at this site: picture, header, draft, decision.

    <id>/case.json       what arrived: source, time, indication, what the header says of the patient
    <id>/picture         the file's bytes
    <id>/draft.json      the model's answer, replaced when it is asked again
    <id>/attention.npy   which image tokens each word rests on
    <id>/decision.json   accepted or rejected, by whom, what, why; written once

Guarantees: every file appears whole; the same picture twice is one case; a decided case takes no other draft
and no other decision. The folder is 0700 and identified: `purge` deletes what was decided long enough ago.
It signs nothing: what a reader accepts goes to the access log and to the reader's own report system.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.canonical import sha256_hex
from common.errors import CaseDecided, CaseUnknown, SignOffInvalid
from common.files import sync_directory, write_atomic

MAX_TEXT_CHARS = 32_768
MAX_REASON_CHARS = 2_000
_GONE = ".gone-"
_LOG = logging.getLogger("fedrad.serving")
_ID = re.compile(r"[0-9a-f]{32}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class State(StrEnum):
    """Where a case stands; it moves forward only."""

    WAITING = "waiting"
    DRAFTED = "drafted"
    REFUSED = "refused"  # by the guard: there is no draft to read
    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Patient:
    """What the header says, for the reader's eyes: one line each, '' where it says nothing."""

    name: str = ""
    id: str = ""
    birth_date: str = ""
    sex: str = ""
    age: str = ""
    accession: str = ""
    study_date: str = ""
    view: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One picture that waits; `id` is the start of its file's SHA-256, `source` upload, pacs or site."""

    id: str
    picture_sha256: str
    kind: str
    source: str
    received_s: int
    indication: str
    patient: Patient


class Worklist:
    """The cases of one folder; one process writes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(
        self, picture: bytes, *, kind: str, source: str, received_s: int, indication: str, patient: Patient
    ) -> Case:
        """Take in a picture; one that is there already is returned as it is."""
        digest = sha256_hex(picture)
        folder = self.directory / digest[:32]
        if (folder / "case.json").is_file():
            return self.case(digest[:32])
        case = Case(digest[:32], digest, kind, source, received_s, _line(indication, 1000), _clean(patient))
        folder.mkdir(exist_ok=True, mode=0o700)
        write_atomic(folder / "picture", picture, mode=0o600)
        _write(folder / "case.json", asdict(case))
        sync_directory(self.directory)
        return case

    def cases(self) -> list[Case]:
        """Every case, the latest first."""
        found = []
        for path in self.directory.glob("*/case.json"):
            with contextlib.suppress(CaseUnknown):  # deleted a moment ago
                found.append(self.case(path.parent.name))
        return sorted(found, key=lambda case: (-case.received_s, case.id))

    def case(self, id: str) -> Case:
        """Return one case; raises CaseUnknown."""
        value = _read(self._folder(id) / "case.json")
        if value is None:
            raise CaseUnknown("expected a case of the worklist, got an unknown id")
        return Case(**{**value, "patient": Patient(**value["patient"])})

    def picture_path(self, id: str) -> Path:
        return self._folder(self.case(id).id) / "picture"

    def draft(self, id: str) -> dict[str, Any] | None:
        return _read(self._folder(self.case(id).id) / "draft.json")

    def decision(self, id: str) -> dict[str, Any] | None:
        return _read(self._folder(self.case(id).id) / "decision.json")

    def state(self, id: str) -> State:
        """Say where a case stands; raises CaseUnknown."""
        decided = self.decision(id)
        if decided is not None:
            return State(decided["outcome"])
        draft = self.draft(id)
        if draft is None:
            return State.WAITING
        return State.REFUSED if draft["decision"]["refused"] else State.DRAFTED

    def put_draft(self, id: str, draft: Mapping[str, Any]) -> None:
        """Store the model's answer; raises CaseDecided once a reader has decided."""
        folder = self._undecided(id)
        (folder / "attention.npy").unlink(missing_ok=True)
        _write(folder / "draft.json", dict(draft))

    def put_attention(self, id: str, attention: NDArray[np.float32]) -> None:
        """Store which image tokens each written token rests on, [tokens, image tokens]."""
        stream = io.BytesIO()
        np.save(stream, attention.astype(np.float32), allow_pickle=False)
        write_atomic(self._folder(self.case(id).id) / "attention.npy", stream.getvalue(), mode=0o600)

    def attention(self, id: str) -> NDArray[np.float32] | None:
        path = self._folder(self.case(id).id) / "attention.npy"
        if not path.is_file():
            return None
        stored: NDArray[np.float32] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        return stored

    def decide(self, id: str, decision: Mapping[str, Any], *, accepted: bool) -> None:
        """Store a reader's decision, once; raises CaseDecided."""
        folder = self._undecided(id)
        outcome = State.ACCEPTED if accepted else State.REJECTED
        _write(folder / "decision.json", {**decision, "outcome": outcome.value})

    def purge(self, *, before_s: int) -> int:
        """Delete cases that were decided before `before_s`, and remains of a crash; returns how many.

        A case whose files are damaged stays; the log says how many such there are.
        """
        gone, damaged = 0, 0
        for path in self.directory.glob("*/case.json"):
            try:
                case = self.case(path.parent.name)
                decision = _read(self._folder(case.id) / "decision.json")
                due = decision is not None and int(decision.get("time_s", case.received_s)) < before_s
            except CaseUnknown:  # not a case, or deleted a moment ago
                continue
            except Exception:  # whatever the file holds: it must not keep the others from being forgotten
                damaged += 1
                continue
            if due:
                os.replace(path.parent, self.directory / f"{_GONE}{path.parent.name}")
                gone += 1
        if damaged:
            _LOG.warning("worklist: %d cases are damaged and are not forgotten", damaged)
        for folder in self.directory.iterdir():
            torn = not (folder / "case.json").is_file() and folder.stat().st_mtime < before_s
            if folder.is_dir() and (folder.name.startswith(_GONE) or torn):
                shutil.rmtree(folder)
        return gone

    def _folder(self, id: str) -> Path:
        if not _ID.fullmatch(id):
            raise CaseUnknown("expected 32 hex digits, got another kind of id")
        return self.directory / id

    def _undecided(self, id: str) -> Path:
        if self.decision(id) is not None:
            raise CaseDecided("expected a case that is still open, got a decided one")
        return self._folder(id)


def verify_sign_off(*, text: str, reason: str, accepted: bool) -> None:
    """Raise SignOffInvalid unless an accepted text or a rejection's reason is there, each of legal length."""
    if accepted and not text.strip():
        raise SignOffInvalid("expected the text that is accepted, got none")
    if not accepted and not reason.strip():
        raise SignOffInvalid("expected a reason for the rejection, got none")
    if len(text) > MAX_TEXT_CHARS or len(reason) > MAX_REASON_CHARS:
        raise SignOffInvalid(f"expected at most {MAX_TEXT_CHARS} and {MAX_REASON_CHARS} characters, got more")


def word_edits(before: str, after: str) -> int:
    """Count the words to insert, delete or replace between two texts (Levenshtein distance over words)."""
    old, new = before.split(), after.split()
    row = list(range(len(new) + 1))
    for number, word in enumerate(old, start=1):
        diagonal, row[0] = row[0], number
        for column, other in enumerate(new, start=1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other)),
            )
    return row[-1]


def patient_of(dataset: Any) -> Patient:
    """Read what a DICOM header says of the patient and the study."""
    from client.data.dicom import text_of, view_of

    return _clean(
        Patient(
            name=_name(text_of(dataset, "PatientName")),
            id=text_of(dataset, "PatientID"),
            birth_date=text_of(dataset, "PatientBirthDate"),
            sex=text_of(dataset, "PatientSex"),
            age=text_of(dataset, "PatientAge"),
            accession=text_of(dataset, "AccessionNumber"),
            study_date=text_of(dataset, "StudyDate"),
            view=view_of(dataset).upper(),
            description=text_of(dataset, "StudyDescription"),
        )
    )


def indication_of(dataset: Any) -> str:
    """Read why a study was made: the first of the header's elements that says so."""
    from client.data.dicom import text_of

    for keyword in ("ReasonForTheRequestedProcedure", "ReasonForStudy", "AdmittingDiagnosesDescription"):
        text = _line(text_of(dataset, keyword), 1000)
        if text:
            return text
    return ""


def _name(text: str) -> str:
    """Write a DICOM name for reading: the ideographic form, where there is one, then the alphabetic."""
    groups = [group.replace("^", " ").strip() for group in text.split("=")]
    ideographic = groups[1].replace(" ", "") if len(groups) > 1 else ""
    return " ".join(part for part in (ideographic, groups[0]) if part)


def _clean(patient: Patient) -> Patient:
    return Patient(**{field.name: _line(getattr(patient, field.name), 128) for field in fields(patient)})


def _line(text: str, most: int) -> str:
    return _CONTROL.sub(" ", text).strip()[:most]


def _write(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, sort_keys=True).encode(), mode=0o600)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return value
