"""PadChest: one CSV row per image with a Spanish report, PNG files in numbered folders.

Guarantees: one study per study identifier, its rows taken together in the order of first mention. The
public reports are stemmed Spanish without accents; they are imported as they are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from client.data.labels import parse_list
from client.data.sources.table import read_columns
from client.data.study import Reason, SourceImage, SourceStudy
from common.errors import SourceInvalid

_COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Report")
_LABELS = "Labels"
_VIEWS = {"PA": "pa", "AP": "ap", "AP_horizontal": "ap", "L": "lateral", "COSTAL": "costal"}


def read_padchest(folder: Path) -> Iterator[SourceStudy]:
    """Yield one study per study identifier; raises SourceInvalid without the labels table."""
    tables = sorted(folder.glob("PADCHEST_chest_x_ray_images_labels*.csv*"))
    if len(tables) != 1:
        raise SourceInvalid(
            f"expected one PADCHEST_chest_x_ray_images_labels*.csv in {folder}, found {len(tables)}"
        )
    index = sqlite3.connect("")
    index.execute(
        "CREATE TABLE row (at TEXT, study TEXT, patient TEXT, path TEXT, view TEXT, report TEXT, labels TEXT)"
    )
    index.execute("CREATE INDEX by_study ON row (study)")
    try:
        for where, row in read_columns(tables[0], _COLUMNS, optional=(_LABELS,)):
            path = f"{row['ImageDir']}/{row['ImageID']}" if row["ImageDir"] else row["ImageID"]
            view = _VIEWS.get(row["Projection"], row["Projection"] or "unknown")
            values = (where, row["StudyID"], row["PatientID"], path, view, row["Report"], row[_LABELS])
            index.execute("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        for (study,) in index.execute("SELECT study FROM row GROUP BY study ORDER BY MIN(rowid)"):
            rows = index.execute(
                "SELECT at, patient, path, view, report, labels FROM row WHERE study = ? ORDER BY rowid",
                (study,),
            ).fetchall()
            patients = {patient for _, patient, *_ in rows}
            reason = Reason.PATIENT_CONFLICT if len(patients) > 1 else ""
            yield SourceStudy(
                where=rows[0][0],
                patient=rows[0][1],
                study=study,
                images=tuple(SourceImage(path, view) for _, _, path, view, _, _ in rows),
                text={"findings": rows[0][4]} if rows[0][4] else {},
                reason=reason if study and rows[0][1] else Reason.NO_IDENTIFIER,
                labels=parse_list(rows[0][5]),
            )
    finally:
        index.close()
