"""DICOM files with a table of reports: images and reports meet by accession number, study UID or file name.

Guarantees: every DICOM file below the folder is read once (header only) into a temporary SQLite file, so
memory does not grow; every study that has images or a report is yielded once, in the order of the table
and then of the files; files that are no DICOM are skipped. A file is named by its place in the sorted walk,
because file names often hold a patient's name. It does not decode pixels.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from client.data.dicom import is_dicom, read_dicom, text_of, view_of
from client.data.labels import parse_list
from client.data.sources.paths import resolve_inside, walk_files
from client.data.sources.table import IDENTIFIERS, SECTIONS, find_table, read_rows
from client.data.study import Reason, SourceImage, SourceStudy
from common.errors import SourceInvalid, StudyRejected

Progress = Callable[[str, int, int], None]
_SCHEMA = """
CREATE TABLE image (
  number INTEGER, path TEXT PRIMARY KEY, uid TEXT, accession TEXT, patient TEXT, view TEXT, reason TEXT
);
CREATE TABLE used (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE INDEX by_uid ON image (uid);
CREATE INDEX by_accession ON image (accession);
"""


def read_dicom_folder(
    folder: Path,
    *,
    rows: Iterator[tuple[str, dict[str, str]]],
    files: Iterator[Path] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[SourceStudy]:
    """Yield one study per row (`file:line`, columns as `read_rows` names them), then those with images only.

    `files` defaults to every file below the folder.
    """
    index = sqlite3.connect("")
    index.executescript(_SCHEMA)
    try:
        for number, path in enumerate(files or walk_files(folder), start=1):
            _store(index, folder, path, number)
            progress("gather", number, 0)
        if not index.execute("SELECT 1 FROM image LIMIT 1").fetchone():
            raise SourceInvalid(f"expected DICOM files below {folder}, found none")
        yield from _joined(index, rows)
        yield from _without_report(index)
    finally:
        index.close()


def _store(index: sqlite3.Connection, folder: Path, path: Path, number: int) -> None:
    relative = path.relative_to(folder).as_posix()
    if (path.name.startswith(".") and path.suffix == ".partial") or not is_dicom(path):
        return
    try:
        header = read_dicom(path, pixels=False)
    except StudyRejected as error:
        index.execute("INSERT INTO image VALUES (?, ?, '', '', '', '', ?)", (number, relative, error.reason))
        return
    values = (text_of(header, name) for name in ("StudyInstanceUID", "AccessionNumber", "PatientID"))
    index.execute(
        "INSERT INTO image VALUES (?, ?, ?, ?, ?, ?, '')", (number, relative, *values, view_of(header))
    )


def report_rows(
    folder: Path, *, table: Path | None = None, mapping: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of the report table, by default the one in the folder."""
    return read_rows(table or find_table(folder), required=("study",), mapping=mapping)


def dicomdir_files(folder: Path) -> Iterator[Path]:
    """Yield the image files that the DICOMDIR of a medium lists; raises SourceInvalid without one."""
    path = folder / "DICOMDIR"
    if not path.is_file():
        raise SourceInvalid(f"expected a DICOMDIR in {folder}, found none")
    try:
        records = read_dicom(path, pixels=False).get("DirectoryRecordSequence") or []
    except StudyRejected as error:
        raise SourceInvalid(f"cannot read {path}: {error.reason}") from error
    for record in records:
        if text_of(record, "DirectoryRecordType").upper() == "IMAGE":
            try:
                yield resolve_inside(folder, text_of(record, "ReferencedFileID").replace("\\", "/"))
            except StudyRejected as error:
                raise SourceInvalid(f"{path} lists a file that is {error.reason}") from error


def _joined(index: sqlite3.Connection, rows: Iterator[tuple[str, dict[str, str]]]) -> Iterator[SourceStudy]:
    for where, row in rows:
        names = json.dumps([name.strip() for name in row.get("image", "").split(";") if name.strip()])
        found = (
            index.execute(
                "SELECT path, patient, view, accession FROM image WHERE accession = :study OR uid = :study "
                "OR path IN (SELECT value FROM json_each(:names)) ORDER BY path",
                {"study": row["study"], "names": names},
            ).fetchall()
            if row["study"]
            else []
        )
        index.executemany("INSERT OR IGNORE INTO used VALUES (?)", [(path,) for path, *_ in found])
        patients = {patient for _, patient, _, _ in found} | (
            {row["patient"]} if row.get("patient") else set()
        )
        patient = row.get("patient") or (found[0][1] if found else "")
        reason = ""
        if not row["study"] or (found and not patient):
            reason = Reason.NO_IDENTIFIER
        elif len(patients - {""}) > 1:
            reason = Reason.PATIENT_CONFLICT
        yield SourceStudy(
            where=where,
            patient=patient,
            study=row["study"],
            images=tuple(SourceImage(path, view) for path, _, view, _ in found),
            text={name: row[name] for name in (*SECTIONS, "report") if row.get(name)},
            known=tuple((name, row[name]) for name in IDENTIFIERS if row.get(name)),
            reason=reason or row.get("reason", ""),
            labels=parse_list(row.get("labels", "")),
        )


def _without_report(index: sqlite3.Connection) -> Iterator[SourceStudy]:
    rows = index.execute(
        "SELECT MIN(number), uid, accession, patient, MAX(reason) FROM image "
        "WHERE path NOT IN (SELECT path FROM used) "
        "GROUP BY CASE WHEN uid = '' THEN path ELSE uid END ORDER BY MIN(number)"
    )
    for number, uid, accession, patient, reason in rows:
        yield SourceStudy(
            where=f"file {number}",
            patient=patient,
            study=accession or uid,
            images=(),
            text={},
            reason=reason or (Reason.NO_REPORT if accession or uid else Reason.NO_IDENTIFIER),
        )
