"""MIMIC-CXR-JPG: `mimic-cxr-2.0.0-metadata.csv[.gz]`, JPEG files and report texts below `files/`.

Guarantees: one study per study identifier, in the order of the metadata; views as the metadata states them.
The reports (`files/pNN/pN/sN.txt`) belong to MIMIC-CXR and must be put beside the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from client.data.sources.paths import resolve_inside
from client.data.sources.table import read_columns
from client.data.store import MAX_TEXT_CHARS
from client.data.study import Reason, SourceImage, SourceStudy
from common.errors import SourceInvalid, StudyRejected

_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition")


def read_mimic(folder: Path) -> Iterator[SourceStudy]:
    """Yield one study per group of metadata rows; raises SourceInvalid without metadata."""
    tables = sorted(folder.glob("mimic-cxr-*-metadata.csv*"))
    if len(tables) != 1:
        raise SourceInvalid(f"expected one mimic-cxr-*-metadata.csv[.gz] in {folder}, found {len(tables)}")
    rows = read_columns(tables[0], _COLUMNS)
    for (subject, study), group in groupby(
        rows, key=lambda entry: (entry[1]["subject_id"], entry[1]["study_id"])
    ):
        entries = list(group)
        place = f"files/p{subject[:2]}/p{subject}/s{study}"
        report, reason = read_report(folder, f"{place}.txt")
        yield SourceStudy(
            where=entries[0][0],
            patient=subject,
            study=study,
            images=tuple(
                SourceImage(f"{place}/{row['dicom_id']}.jpg", row["ViewPosition"]) for _, row in entries
            ),
            text={"report": report} if report else {},
            reason=reason if subject and study else Reason.NO_IDENTIFIER,
        )


def label_table(folder: Path) -> Path | None:
    """Return the CheXpert labels that come with the images, where they are there."""
    return next(iter(sorted(folder.glob("mimic-cxr-*-chexpert.csv*"))), None)


def read_report(folder: Path, relative: str) -> tuple[str, str]:
    """Read a report text below a folder; returns text and reason, one of them empty."""
    try:
        path = resolve_inside(folder, relative)
    except StudyRejected:
        return "", Reason.NO_REPORT
    if path.stat().st_size > 4 * MAX_TEXT_CHARS:
        return "", Reason.REPORT_TOO_LONG
    try:
        return path.read_text("utf-8"), ""
    except UnicodeDecodeError:
        return "", Reason.REPORT_UNREADABLE
