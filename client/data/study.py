"""One study on its way through the import: as the source gave it, and what became of it.

Guarantees: a source study ends as exactly one `Prepared` or one `Dropped` with one `Reason`; both go
through JSON and come back equal. `SourceStudy` holds identifiers: it lives in the private work folder
only and never in the prepared data.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why a study was dropped or quarantined; the values are stable and appear in `card.json`."""

    NO_IDENTIFIER = "no-patient-or-study-identifier"
    DUPLICATE_STUDY = "duplicate-study"
    PATIENT_CONFLICT = "study-of-two-patients"
    NO_REPORT = "no-report"
    NO_FINDINGS = "report-without-findings"
    REPORT_UNREADABLE = "report-unreadable"
    REPORT_TOO_LONG = "report-too-long"
    NO_IMAGE = "no-image"
    LATERAL_VIEW = "lateral-view"
    NOT_CHEST = "not-a-chest-radiograph"
    NOT_ORIGINAL = "not-an-image-for-reading"
    IMAGE_MISSING = "image-missing"
    IMAGE_OUTSIDE = "image-outside-folder"
    IMAGE_UNREADABLE = "image-unreadable"
    IMAGE_TOO_LARGE = "image-too-large"
    IMAGE_TOO_SMALL = "image-too-small"
    IMAGE_BLANK = "image-blank"
    IMAGE_CRASHED = "image-crashed-decoder"
    MULTI_FRAME = "image-multi-frame"
    COLOUR = "image-colour"
    UNKNOWN_COMPRESSION = "image-compression-unknown"
    DUPLICATE_IMAGE = "duplicate-image"
    IMAGE_CONFLICT = "image-of-two-patients"
    BURNED_IN_TEXT = "quarantine-burned-in-text"
    UNLIKE_CHEST = "quarantine-unlike-a-chest"
    RECOGNISER_FAILED = "quarantine-recogniser-failed"
    WITHDRAWN = "consent-withdrawn"
    IDENTIFIER_LEFT = "quarantine-identifier-left"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file: path relative to the source folder and the view that the source states, if any."""

    path: str
    view: str = ""


@dataclass(frozen=True, slots=True)
class SourceStudy:
    """A study as read: `where` names file and row; `text` has sections or one `report`; `known` has the
    identifiers that header and table give for this patient (kind, value); `labels` the findings that the
    source states apart from the text (name of `labels.py`, present or not)."""

    where: str
    patient: str
    study: str
    images: tuple[SourceImage, ...]
    text: dict[str, str]
    known: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    labels: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A study that became a pair, before its split is known; `facts` are numbers and flags about it."""

    where: str
    patient: str
    study: str
    images: tuple[str, ...]
    view: str
    indication: str
    findings: str
    impression: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A study that was left out, by pseudonym (empty when the source gave no identifier)."""

    where: str
    study: str
    reason: Reason


def format_source(source: SourceStudy) -> str:
    """Encode for the import journal."""
    return json.dumps(asdict(source), ensure_ascii=False)


def parse_source(text: str) -> SourceStudy:
    """Decode what `format_source` wrote."""
    value = json.loads(text)
    value["images"] = tuple(SourceImage(**image) for image in value["images"])
    value["known"] = tuple((kind, known) for kind, known in value["known"])
    value["labels"] = tuple((name, present) for name, present in value["labels"])
    return SourceStudy(**value)


def format_outcome(outcome: Prepared | Dropped) -> str:
    """Encode for the import journal."""
    return json.dumps(asdict(outcome), ensure_ascii=False)


def parse_outcome(text: str) -> Prepared | Dropped:
    """Decode what `format_outcome` wrote."""
    value = json.loads(text)
    if "reason" in value:
        return Dropped(where=value["where"], study=value["study"], reason=Reason(value["reason"]))
    return Prepared(**{**value, "images": tuple(value["images"])})
