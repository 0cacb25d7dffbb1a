"""The cases that wait for a reader at this site: picture, header, draft, decision.

    <id>/case.json       what arrived: source, time, indication, what the header says of the patient
    <id>/picture         the file's bytes
    <id>/draft.json      the model's answer, replaced when it is asked again
    <id>/attention.npy   which image tokens each word rests on
    <id>/decision.json   accepted or rejected, by whom, what, why; written once

Guarantees: every file appears whole; the same picture twice is one case; a decided case takes no other draft
and no other decision; a file that cannot be read is a CaseDamaged that names it, and holds up no other case.
The folder is 0700 and identified: `purge` deletes what was decided long ago, and never what it cannot read.
It signs nothing: what a reader accepts goes to the access log and to the reader's own report system.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.canonical import sha256_hex
from common.errors import CaseDamaged, CaseDecided, CaseUnknown, SignOffInvalid
from common.files import sync_directory, write_atomic

MAX_TEXT_CHARS = 32_768
MAX_REASON_CHARS = 2_000
_GONE = ".gone-"
_ID = re.compile(r"[0-9a-f]{32}")
_TODO = {
    "case.json": "restore the file from a backup, or move the folder away and open the picture again",
    "picture": "restore the file from a backup, or move the folder away",
    "draft.json": "delete the file and the case is drafted again",
    "decision.json": "restore the file from a backup; the access log has the decision",
}
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


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge did: old decided cases and a crash's leavings that went, damaged cases that stayed."""

    decided: int = 0
    unfinished: int = 0
    damaged: int = 0


class Worklist:
    """The cases of one folder; one process writes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(
        self, picture: bytes, *, kind: str, source: str, received_s: int, indication: str, patient: Patient
    ) -> Case:
        """Take in a picture; one that is there already is returned as it is. Raises CaseDamaged."""
        digest = sha256_hex(picture)
        folder = self.directory / digest[:32]
        with suppress(CaseUnknown):
            return self.case(digest[:32])
        case = Case(digest[:32], digest, kind, source, received_s, _line(indication, 1000), _clean(patient))
        folder.mkdir(exist_ok=True, mode=0o700)
        write_atomic(folder / "picture", picture, mode=0o600)
        _write(folder / "case.json", asdict(case))
        sync_directory(self.directory)
        return case

    def ids(self) -> list[str]:
        """Every case's id, of the damaged ones too; one may be gone before it is read."""
        return sorted(path.name for path in self.directory.iterdir() if _ID.fullmatch(path.name))

    def cases(self) -> list[Case]:
        """Every case that can be read, the latest first."""
        found = []
        for id in self.ids():
            with suppress(CaseUnknown, CaseDamaged):
                found.append(self.case(id))
        return sorted(found, key=lambda case: (-case.received_s, case.id))

    def damages(self) -> list[str]:
        """Name every damaged case's first damaged file, and what to do."""
        found = []
        for id in self.ids():
            try:
                self.state(id)
            except CaseUnknown:
                continue
            except CaseDamaged as error:
                found.append(str(error))
        return found

    def case(self, id: str) -> Case:
        """Return one case; raises CaseUnknown or CaseDamaged."""
        folder = self._folder(id)
        try:
            value = _read(folder / "case.json")
            if value is not None:
                return _parse_case(value, id)
            if not _is_unfinished(folder):
                raise FileNotFoundError
        except (ValueError, OSError) as error:
            raise _damaged(folder / "case.json", error) from error
        raise CaseUnknown("expected a case of the worklist, got an unknown id")

    def changed_s(self, id: str) -> int:
        """Return when something of a case was written last, in Unix seconds; 0 where that cannot be told."""
        with suppress(OSError):
            return int(self._folder(id).stat().st_mtime)
        return 0

    def picture_path(self, id: str) -> Path:
        """Return where a case's picture lies; raises CaseUnknown or CaseDamaged."""
        path = self._folder(self.case(id).id) / "picture"
        if not path.is_file():
            raise _damaged(path, FileNotFoundError())
        return path

    def draft(self, id: str) -> dict[str, Any] | None:
        """Return the model's answer, None before there is one; raises CaseUnknown or CaseDamaged."""
        path = self._folder(self.case(id).id) / "draft.json"
        try:
            draft = _read(path)
            if draft is not None and not (
                isinstance(draft.get("decision"), dict)
                and type(draft["decision"].get("refused")) is bool
                and type(draft.get("text")) is str
            ):
                raise ValueError
        except (ValueError, OSError) as error:
            raise _damaged(path, error) from error
        return draft

    def decision(self, id: str) -> dict[str, Any] | None:
        """Return the reader's decision, None before there is one; raises CaseUnknown or CaseDamaged."""
        path = self._folder(self.case(id).id) / "decision.json"
        try:
            decision = _read(path)
            if decision is not None and not (
                decision.get("outcome") in (State.ACCEPTED.value, State.REJECTED.value)
                and type(decision.get("time_s", 0)) is int
            ):
                raise ValueError
        except (ValueError, OSError) as error:
            raise _damaged(path, error) from error
        return decision

    def state(self, id: str) -> State:
        """Say where a case stands; raises CaseUnknown or CaseDamaged."""
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
        """Return what `put_attention` stored; None where there is none that can be read: it is made again."""
        path = self._folder(self.case(id).id) / "attention.npy"
        with suppress(OSError, ValueError, EOFError):
            stored: NDArray[np.float32] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            return stored
        return None

    def decide(self, id: str, decision: Mapping[str, Any], *, accepted: bool) -> None:
        """Store a reader's decision, once; raises CaseDecided."""
        folder = self._undecided(id)
        outcome = State.ACCEPTED if accepted else State.REJECTED
        _write(folder / "decision.json", {**decision, "outcome": outcome.value})

    def purge(self, *, before_s: int) -> Purged:
        """Delete cases that were decided before `before_s`, and what a crash left then.

        A case of which a file cannot be read stays and is counted.
        """
        for folder in self.directory.glob(f"{_GONE}*"):  # of a purge that was killed
            shutil.rmtree(folder)
        decided, unfinished, damaged = 0, 0, 0
        for id in self.ids():
            folder = self.directory / id
            try:
                case = self.case(id)
                decision = self.decision(id)
            except CaseUnknown:
                if self.changed_s(id) < before_s and folder.is_dir():
                    self._drop(id)
                    unfinished += 1
            except CaseDamaged:
                damaged += 1
            else:
                if decision is not None and decision.get("time_s", case.received_s) < before_s:
                    self._drop(id)
                    decided += 1
        return Purged(decided, unfinished, damaged)

    def _drop(self, id: str) -> None:
        gone = self.directory / f"{_GONE}{id}"
        os.replace(self.directory / id, gone)
        shutil.rmtree(gone)

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
    """Read a JSON object, None where there is no file; raises ValueError or OSError."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except RecursionError as error:
        raise ValueError from error
    if not isinstance(value, dict):
        raise ValueError
    return value


def _parse_case(value: dict[str, Any], id: str) -> Case:
    """Make a case of what its file holds; raises ValueError."""
    try:
        case = Case(**{**value, "patient": Patient(**value["patient"])})
    except (TypeError, KeyError) as error:
        raise ValueError from error
    texts = (case.kind, case.source, case.indication, case.picture_sha256, *asdict(case.patient).values())
    if case.id != id or type(case.received_s) is not int or any(type(text) is not str for text in texts):
        raise ValueError
    return case


def _is_unfinished(folder: Path) -> bool:
    """Say whether there is no more than a crash leaves of a case that was being taken in."""
    if not folder.is_dir():
        return True
    return all(path.name == "picture" or path.name.endswith(".partial") for path in folder.iterdir())


def _damaged(path: Path, error: Exception) -> CaseDamaged:
    what = "it is missing" if isinstance(error, FileNotFoundError) else "it cannot be read"
    name = f"{path.parent.name}/{path.name}"
    return CaseDamaged(f"expected a whole {name} in the worklist, but {what}: {_TODO[path.name]}")
