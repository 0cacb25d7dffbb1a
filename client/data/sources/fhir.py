"""FHIR R4 bulk export: `*.ndjson` with DiagnosticReport, ImagingStudy and Patient, beside DICOM files.

Guarantees: yields report rows for `read_dicom_folder`, in file order; a report meets its images by the DICOM
study UID of its ImagingStudy or by accession number; names, identifiers and birth dates of Patient resources
become known identifiers. Attachments must be inline text; nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.data.sources.paths import walk_files
from client.data.sources.table import open_text
from client.data.store import MAX_TEXT_CHARS
from common.errors import SourceInvalid

MAX_LINE_CHARS = 4 << 20


def read_fhir_rows(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line`, row) for every DiagnosticReport; raises SourceInvalid for a bad line."""
    files = [path for path in walk_files(folder) if path.name.endswith((".ndjson", ".ndjson.gz"))]
    if not files:
        raise SourceInvalid(f"expected .ndjson files in {folder}, found none")
    index = sqlite3.connect("")
    index.execute("CREATE TABLE resource (key TEXT PRIMARY KEY, body TEXT) WITHOUT ROWID")
    try:
        for _, resource in _resources(files):
            if resource.get("resourceType") in ("Patient", "ImagingStudy"):
                key = f"{resource['resourceType']}/{resource.get('id', '')}"
                index.execute("INSERT OR REPLACE INTO resource VALUES (?, ?)", (key, json.dumps(resource)))
        for where, resource in _resources(files):
            if resource.get("resourceType") == "DiagnosticReport":
                yield where, _row(resource, index)
    finally:
        index.close()


def _resources(files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in files:
        with open_text(path) as handle:
            for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE_CHARS), ""), start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise SourceInvalid(f"{path.name}:{number}: expected one JSON object") from error
                if not isinstance(value, dict):
                    raise SourceInvalid(f"{path.name}:{number}: expected one JSON object")
                yield f"{path.name}:{number}", value


def _row(report: dict[str, Any], index: sqlite3.Connection) -> dict[str, str]:
    patient = _look_up(index, _first(report.get("subject")).get("reference", ""))
    study = _look_up(index, _first(report.get("imagingStudy") or report.get("study")).get("reference", ""))
    uid = next(
        (
            str(entry.get("value", "")).removeprefix("urn:oid:")
            for entry in _list(study.get("identifier"))
            if entry.get("system") == "urn:dicom:uid"
        ),
        "",
    )
    accession = next(
        (str(entry.get("value", "")) for entry in _list(report.get("identifier")) if _is_accession(entry)), ""
    )
    names = [
        " ".join([*map(str, name.get("given", [])), str(name.get("family", ""))])
        for name in _list(patient.get("name"))
    ]
    row = {
        "study": uid or accession,
        "name": " ".join(names),
        "birth_date": str(patient.get("birthDate", "")),
        "report": _text(report),
        "phone": " ".join(str(entry.get("value", "")) for entry in _list(patient.get("telecom"))),
        "address": " ".join(
            " ".join(map(str, entry.get("line", []))) for entry in _list(patient.get("address"))
        ),
    }
    return {name: value for name, value in row.items() if value.strip() or name == "study"}


def _text(report: dict[str, Any]) -> str:
    for form in _list(report.get("presentedForm")):
        if str(form.get("contentType", "text/plain")).startswith("text/plain") and form.get("data"):
            try:
                return base64.b64decode(str(form["data"]), validate=True).decode("utf-8")[
                    : 2 * MAX_TEXT_CHARS
                ]
            except (binascii.Error, UnicodeDecodeError):
                return ""
    return str(report.get("conclusion", ""))


def _look_up(index: sqlite3.Connection, reference: str) -> dict[str, Any]:
    found = index.execute("SELECT body FROM resource WHERE key = ?", (reference,)).fetchone()
    return json.loads(found[0]) if found else {}


def _is_accession(entry: dict[str, Any]) -> bool:
    return any(code.get("code") == "ACSN" for code in _list(_first(entry.get("type")).get("coding")))


def _list(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _first(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return next(iter(_list(value)), {})
