"""How well the labeller reads the real reports of ../shared/data/iu-xray, against the experts' labels.

`python -m tests.common.labeller_scores` prints F1 per finding. Patients are split in halves by a hash: the
rules were written while looking at errors of one half only, the other shows what they are worth elsewhere.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from common.finding_words import CHEST14_WORDS, CHEXPERT_WORDS
from common.labeller import Status, Vocabulary, present_findings

REPORTS = Path(__file__).parents[3] / "shared" / "data" / "iu-xray"
HALVES = ("developed on", "held out", "all")
ENOUGH_CASES = 10  # of all patients
# What CheXpert's observations are called in the experts' table, where it knows them.
_COLUMNS: dict[Vocabulary, dict[str, tuple[str, ...]]] = {
    Vocabulary.CHEST14: {label: (label.replace(" ", "_"),) for label in CHEST14_WORDS},
    Vocabulary.CHEXPERT: {
        "Pleural Effusion": ("Effusion",),
        "Lung Lesion": ("Mass", "Nodule"),
        "Pleural Other": ("Pleural_Thickening",),
    }
    | {
        label: (label,)
        for label in CHEXPERT_WORDS
        if label in ("Cardiomegaly", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax")
    },
}


def score_labeller(
    folder: Path,
    half: str,
    *,
    vocabulary: Vocabulary = Vocabulary.CHEST14,
    least: Status = Status.HEDGED,
) -> dict[str, Any]:
    """Score what is read from findings and impression: F1 per finding, micro-F1 over those with ten cases."""
    with (folder / "finding_labels.csv").open() as handle:
        truth = {row["patient"]: row for row in csv.DictReader(handle)}
    columns = _COLUMNS[vocabulary]

    def true(patient: str, label: str) -> bool:
        return any(truth[patient][name] == "1" for name in columns[label])

    counts = {label: [0, 0, 0] for label in columns}
    common = {label for label in counts if sum(true(patient, label) for patient in truth) >= ENOUGH_CASES}
    for table in sorted(folder.glob("*/reports.csv")):
        with table.open() as handle:
            for row in csv.DictReader(handle):
                patient = row["patient"]
                if half != "all" and HALVES[hashlib.sha256(patient.encode()).digest()[0] & 1] != half:
                    continue
                text = f"{row['findings']}\n{row['impression']}"
                found = present_findings(text, vocabulary, least=least)
                for label, count in counts.items():
                    there = true(patient, label)
                    count[0] += there and label in found
                    count[1] += not there and label in found
                    count[2] += there and label not in found
    total = [sum(counts[label][at] for label in common) for at in range(3)]
    return {
        "micro_f1": _f1(*total),
        "cases": total[0] + total[2],
        "findings": {
            label: {"cases": c[0] + c[2], "right": c[0], "wrong": c[1], "missed": c[2], "f1": _f1(*c)}
            for label, c in counts.items()
        },
    }


def _f1(right: int, wrong: int, missed: int) -> float:
    return round(2 * right / max(1, 2 * right + wrong + missed), 3)


if __name__ == "__main__":
    results = {
        f"{vocabulary.value}, {half}": score_labeller(REPORTS, half, vocabulary=vocabulary)
        for vocabulary in Vocabulary
        for half in HALVES
    }
    print(json.dumps(results, indent=1))
