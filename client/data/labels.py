"""Labels that come beside the reports, and whether the text contradicts them.

A table of labels has one row per study or patient: one column per finding (1 present, 0 absent, -1 or empty
unsaid) as in MIMIC-CXR, CheXpert and the NIH sets, or one column with a list as in PadChest or MeSH codes.
Guarantees: names are mapped to the labeller's by a closed list, others are ignored; a label and a text
disagree only where the text says the opposite, never where it is silent or unsure. English texts are read by
`common/labeller.py`, Spanish and Chinese ones by a short list of terms. It does not say which one is right.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from client.data.sources.table import ALIASES, raw_rows
from client.data.statements import BROAD, said_by
from client.data.study import SourceStudy
from common.errors import SourceInvalid

Label = tuple[str, bool]
NORMAL = "No Finding"
# What each name of a label means in the words of the labeller; lower case, '_' and '-' read as spaces.
_NAMES: Mapping[str, tuple[str, ...]] = {
    NORMAL: ("no finding", "normal"),
    "Enlarged Cardiomediastinum": ("enlarged cardiomediastinum",),
    "Cardiomegaly": ("cardiomegaly",),
    "Lung Opacity": ("lung opacity",),
    "Lung Lesion": ("lung lesion", "nodule", "mass", "pulmonary mass"),
    "Edema": ("edema", "pulmonary edema"),
    "Consolidation": ("consolidation",),
    "Pneumonia": ("pneumonia",),
    "Atelectasis": ("atelectasis", "pulmonary atelectasis", "laminar atelectasis"),
    "Pneumothorax": ("pneumothorax",),
    "Pleural Effusion": ("pleural effusion", "effusion"),
    "Pleural Other": ("pleural other", "pleural thickening"),
    "Fracture": ("fracture", "rib fracture", "vertebral fracture", "clavicle fracture", "fractures, bone"),
    "Support Devices": ("support devices",),
}
_CANONICAL = {name: label for label, names in _NAMES.items() for name in names}
# Findings that a normal chest has not; the others may be old or incidental.
_ABNORMAL = ("Edema", "Consolidation", "Pneumonia", "Pneumothorax", "Pleural Effusion", "Cardiomegaly")
_LISTS = ("labels", "label", "finding labels", "findings labels", "mesh", "problems")
_STATED = {"1": True, "1.0": True, "0": False, "0.0": False}


def canonical(name: str) -> str | None:
    """Return the labeller's name of a label, or None for one that is not compared."""
    plain = " ".join(re.sub(r"[_-]", " ", name).strip().strip("'\"").lower().split())
    return _CANONICAL.get(plain)


def parse_list(value: str) -> tuple[Label, ...]:
    """Parse a list of present labels, split at ; | or the commas of ['a', 'b']; MeSH qualifiers (/) go."""
    value = value.strip()
    separator = r"'\s*,\s*'" if value.startswith("['") else r"[;|]"
    names = (canonical(part.split("/")[0]) for part in re.split(separator, value.strip("[]'\" ")))
    return tuple(dict.fromkeys((name, True) for name in names if name))


def disagreements(labels: tuple[Label, ...], text: str, *, language: str) -> tuple[str, ...]:
    """Return the labels, in order, of which the text says the opposite."""
    said = said_by(text, language=language)
    found = [
        name
        for name, present in labels
        if name not in (NORMAL, *BROAD) and name in said and said[name] is not present
    ]
    if (NORMAL, True) in labels and any(said.get(name) for name in _ABNORMAL):
        found.append(NORMAL)
    return tuple(dict.fromkeys(found))


def with_labels(studies: Iterator[SourceStudy], table: Path | None) -> Iterator[SourceStudy]:
    """Add the labels of a table, by study or else by patient, to the studies; raises SourceInvalid."""
    if table is None:
        yield from studies
        return
    index = sqlite3.connect("")
    try:
        _read(table, index)
        for study in studies:
            keys = (f"study:{study.study}", f"patient:{study.patient}")
            found = index.execute(
                "SELECT name, present FROM label WHERE key IN (?, ?) ORDER BY rowid", keys
            ).fetchall()
            more = tuple((name, bool(present)) for name, present in found)
            yield replace(study, labels=tuple(dict.fromkeys((*study.labels, *more))))
    finally:
        index.close()


def _read(table: Path, index: sqlite3.Connection) -> None:
    index.execute("CREATE TABLE label (key TEXT, name TEXT, present INTEGER)")
    rows = raw_rows(table)
    header = [name.lower() for name in next(rows)[1]]
    keys = {
        place: kind
        for kind in ("study", "patient")
        for place, name in enumerate(header)
        if name in ALIASES[kind]
    }
    if not keys:
        raise SourceInvalid(f"{table}: expected a column that names the study or the patient, found none")
    place, kind = next(iter(keys.items()))
    wide = {at: name for at, column in enumerate(header) if (name := canonical(column))}
    lists = [at for at, column in enumerate(header) if column.replace("_", " ") in _LISTS]
    if not wide and not lists:
        raise SourceInvalid(f"{table}: expected a column per finding or one named labels, found neither")
    for _, values in rows:
        labels = [(name, _STATED[values[at]]) for at, name in wide.items() if values[at] in _STATED]
        labels += [label for at in lists for label in parse_list(values[at])]
        # Two columns may mean one label (mass and nodule): present in one of them is present.
        present = {name for name, stated in labels if stated}
        kept = [(name, stated) for name, stated in labels if stated or name not in present]
        index.executemany(
            "INSERT INTO label VALUES (?, ?, ?)",
            [(f"{kind}:{values[place]}", name, stated) for name, stated in dict.fromkeys(kept)],
        )
    index.execute("CREATE INDEX by_key ON label (key)")
