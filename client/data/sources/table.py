"""A folder with a table of reports and image files: one row is one study.

Columns are found by their usual names or by a mapping file (`[columns]` in TOML, our name = theirs).
Several images of a study are separated by `;`. Guarantees: rows come in file order, a row that cannot be
used is yielded with its reason, and no other file is read. It does not judge the text.
"""

from __future__ import annotations

import csv
import gzip
import io
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from client.data.study import Reason, SourceImage, SourceStudy
from common.errors import SourceInvalid

MAX_FIELD_CHARS = 1 << 20
MAX_INFLATED_BYTES = 4 << 30
SECTIONS = ("indication", "findings", "impression")
ALIASES: Mapping[str, tuple[str, ...]] = {
    "patient": ("patient", "patient_id", "patientid", "subject_id", "mrn"),
    "study": (
        "accession",
        "accession_number",
        "accessionnumber",
        "study",
        "study_id",
        "studyinstanceuid",
        "study_uid",
    ),
    "image": ("image", "images", "image_path", "path", "filename", "file"),
    "view": ("view", "view_position", "viewposition", "projection"),
    "indication": ("indication", "clinical_history", "history", "reason"),
    "findings": ("findings",),
    "impression": ("impression", "conclusion"),
    "report": ("report", "report_text", "text"),
    "name": ("name", "patient_name", "patientname"),
    "birth_date": ("birth_date", "birthdate", "dob", "patientbirthdate"),
    "study_date": ("study_date", "studydate", "date"),
    "physician": ("physician", "referring_physician", "referringphysicianname", "radiologist"),
    "address": ("address", "patient_address"),
    "phone": ("phone", "telephone"),
    "labels": ("labels", "finding_labels"),
}
IDENTIFIERS = ("name", "birth_date", "study_date", "physician", "address", "phone")


def find_table(folder: Path) -> Path:
    """Return `reports.csv`, or the only CSV or TSV file of the folder; raises SourceInvalid."""
    if (folder / "reports.csv").is_file():
        return folder / "reports.csv"
    tables = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".csv", ".tsv"))
    if len(tables) != 1:
        raise SourceInvalid(
            f"expected reports.csv or exactly one .csv or .tsv in {folder}, found {len(tables)}"
        )
    return tables[0]


def read_mapping(path: Path | None) -> dict[str, str]:
    """Read a mapping file: `[columns]` with our column name = theirs; raises SourceInvalid."""
    if path is None:
        return {}
    try:
        value = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SourceInvalid(f"cannot read mapping {path}: {error}") from error
    columns = value.get("columns")
    if set(value) != {"columns"} or not isinstance(columns, dict):
        raise SourceInvalid(f"expected one table [columns] in {path}")
    for ours, theirs in columns.items():
        if ours not in ALIASES or not isinstance(theirs, str):
            raise SourceInvalid(
                f"unknown column {ours[:40]!r} in {path}, expected one of {', '.join(ALIASES)}"
            )
    return columns


def open_text(path: Path) -> TextIO:
    """Open a plain or gzip-compressed UTF-8 text file; inflating stops at `MAX_INFLATED_BYTES`."""
    if path.suffix != ".gz":
        return path.open(encoding="utf-8-sig", newline="")
    return io.TextIOWrapper(io.BufferedReader(_Bounded(path)), encoding="utf-8-sig", newline="")


class _Bounded(io.RawIOBase):
    """A gzip reader that raises SourceInvalid after `MAX_INFLATED_BYTES`."""

    def __init__(self, path: Path) -> None:
        self._source, self._left = gzip.GzipFile(path), MAX_INFLATED_BYTES

    def close(self) -> None:
        self._source.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise SourceInvalid("expected a whole gzip file, got a damaged one") from error
        self._left -= len(data)
        if self._left < 0:
            raise SourceInvalid(
                f"expected at most {MAX_INFLATED_BYTES} bytes in a compressed table, got more"
            )
        buffer[: len(data)] = data
        return len(data)


def read_rows(
    table: Path, *, required: tuple[str, ...], mapping: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line`, row under our column names) for every row; absent columns are missing.

    Raises SourceInvalid for a missing required column, a row of the wrong width, or text that is not UTF-8.
    """
    rows = raw_rows(table)
    header = [name.lower() for name in next(rows)[1]]
    columns = _columns(table, header, required, mapping or {})
    for where, values in rows:
        yield where, {name: values[index] for name, index in columns.items()}


def read_columns(
    table: Path, columns: tuple[str, ...], *, optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line`, row) with exactly the named columns, absent optional ones empty.

    Raises SourceInvalid as `read_rows`.
    """
    rows = raw_rows(table)
    header = next(rows)[1]
    if missing := [name for name in columns if name not in header]:
        raise SourceInvalid(f"{table}: expected a column {missing[0]}, found none")
    places = {name: header.index(name) for name in (*columns, *optional) if name in header}
    for where, values in rows:
        yield where, {**dict.fromkeys(optional, ""), **{name: values[at] for name, at in places.items()}}


def raw_rows(table: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the header, then every row that is not empty, as stripped values of the header's width."""
    if table.is_symlink() or not table.is_file():
        raise SourceInvalid(f"expected a plain file {table}")
    csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        with open_text(table) as handle:
            header_line = handle.readline(MAX_FIELD_CHARS)
            delimiter = max(",;\t|", key=header_line.count)
            header = [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter), [])]
            yield f"{table.name}:1", header
            reader = csv.reader(handle, delimiter=delimiter)
            for values in reader:
                where = f"{table.name}:{reader.line_num + 1}"
                if values and len(values) != len(header):
                    raise SourceInvalid(f"{where}: expected {len(header)} values, got {len(values)}")
                if values:
                    yield where, [value.strip() for value in values]
    except UnicodeDecodeError as error:
        raise SourceInvalid(f"expected UTF-8 text in {table}, got other bytes at {error.start}") from error
    except csv.Error as error:
        raise SourceInvalid(f"{table}: {error}") from error


def read_table(
    folder: Path, *, table: Path | None = None, mapping: Mapping[str, str] | None = None
) -> Iterator[SourceStudy]:
    """Yield one study per row of a table; image paths are relative to `folder`."""
    from client.data.labels import parse_list

    table = table or find_table(folder)
    for where, row in read_rows(table, required=("patient", "study", "image"), mapping=mapping):
        images = tuple(
            SourceImage(path=path.strip(), view=row.get("view", ""))
            for path in row["image"].split(";")
            if path.strip()
        )
        yield SourceStudy(
            where=where,
            patient=row["patient"],
            study=row["study"],
            images=images,
            text={name: row[name] for name in (*SECTIONS, "report") if row.get(name)},
            known=tuple((name, row[name]) for name in IDENTIFIERS if row.get(name)),
            reason="" if row["patient"] and row["study"] else Reason.NO_IDENTIFIER,
            labels=parse_list(row.get("labels", "")),
        )


def _columns(
    table: Path, header: list[str], required: tuple[str, ...], mapping: Mapping[str, str]
) -> dict[str, int]:
    columns: dict[str, int] = {}
    for ours, aliases in ALIASES.items():
        names = (mapping[ours].strip().lower(),) if ours in mapping else aliases
        index = next((header.index(name) for name in names if name in header), None)
        if index is not None:
            columns[ours] = index
        elif ours in mapping or ours in required:
            raise SourceInvalid(f"{table}: expected a column {' or '.join(names)}, found none")
    if not {"findings", "report"} & set(columns):
        raise SourceInvalid(f"{table}: expected a column findings or report, found neither")
    return columns
