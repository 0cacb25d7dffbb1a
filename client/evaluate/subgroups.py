"""Groups of patients whose scores stand apart: sex, age band, view, scanner.

Sex, age and scanner come from a table that the site keeps (`groups.csv`: study or patient, sex, age,
scanner); prepared data does not hold them. Guarantees: a group of fewer than `least` patients is never
scored, and where one group of a kind is left out the next smallest is too, so that it cannot be had by
subtraction.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import EvaluationRefused

KINDS = ("sex", "age", "view", "scanner")
LEAST_PATIENTS = 10
UNKNOWN = "unknown"
_BANDS = ((0, 17), (18, 39), (40, 59), (60, 79), (80, 130))
_MAX_ROWS = 2_000_000
_SEXES = {"f": "female", "female": "female", "m": "male", "male": "male", "o": "other", "other": "other"}


@dataclass(frozen=True)
class Group:
    """One group: the rows of its studies; `suppressed` when too small to be shown."""

    kind: str
    name: str
    rows: tuple[int, ...]
    patients: int
    suppressed: bool


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """Read the table: study or patient id to sex, age band, scanner; raises EvaluationRefused."""
    table: dict[str, dict[str, str]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            columns = set(reader.fieldnames or ())
            key = "study" if "study" in columns else "patient"
            if (
                key not in columns
                or not columns - {"study", "patient"}
                or columns - {key, "sex", "age", "scanner"}
            ):
                raise EvaluationRefused(
                    f"{path}: expected the columns study or patient, and sex, age, scanner"
                )
            for row in reader:
                if len(table) >= _MAX_ROWS or row.get(key) in table:
                    raise EvaluationRefused(f"{path}: line {reader.line_num}: expected each {key} once")
                table[row[key]] = {
                    "sex": _SEXES.get((row.get("sex") or "").strip().lower(), UNKNOWN),
                    "age": age_band((row.get("age") or "").strip()),
                    "scanner": (row.get("scanner") or "").strip()[:40] or UNKNOWN,
                }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationRefused(f"{path}: expected a table of groups, got {type(error).__name__}") from error
    return table


def age_band(age: str) -> str:
    """Name the band of an age in years, or as DICOM writes it (063Y); "unknown" for anything else."""
    digits = age.removesuffix("Y")
    if not digits.isdecimal():
        return UNKNOWN
    return next(
        (f"{low}-{high}" if high < 130 else f"{low}+" for low, high in _BANDS if low <= int(digits) <= high),
        UNKNOWN,
    )


def group_studies(
    studies: Sequence[str],
    patients: Sequence[str],
    views: Sequence[str],
    table: Mapping[str, Mapping[str, str]],
    *,
    least: int = LEAST_PATIENTS,
) -> list[Group]:
    """Group studies by every kind that tells them apart; kinds that all studies share are left out."""
    groups: list[Group] = []
    for kind in KINDS:
        members: dict[str, list[int]] = {}
        for row, (study, patient, view) in enumerate(zip(studies, patients, views, strict=True)):
            entry = table.get(study) or table.get(patient) or {}
            name = (view or UNKNOWN) if kind == "view" else entry.get(kind, UNKNOWN)
            members.setdefault(name, []).append(row)
        if len(members) < 2:
            continue
        counts = {name: len({patients[row] for row in rows}) for name, rows in members.items()}
        hidden = {name for name, count in counts.items() if count < least}
        if len(hidden) == 1 and len(counts) > 1:
            hidden.add(min(counts.keys() - hidden, key=lambda name: (counts[name], name)))
        groups += [
            Group(kind, name, tuple(rows), counts[name], name in hidden)
            for name, rows in sorted(members.items())
        ]
    return groups
