"""Reports about phantoms: varied, naturally worded, and saying exactly what the picture holds.

A writing style picks among phrasings, orders the sentences and decides which normal remarks are made.
Guarantees: `common.labeller` reads from every report the findings it was written for (tested). It does not
imitate any radiologist or corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.model.phantoms import LABELS, Finding

# {d} is the size, degree or zone; {s} the side. One tuple per label, the same length for all: a style names
# positions in it.
POSITIVE: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": (
        "There is {d} cardiomegaly.",
        "The heart is enlarged, {d}.",
        "{d} enlargement of the cardiac silhouette.",
        "Cardiac silhouette shows {d} enlargement.",
    ),
    "Edema": (
        "There is {d} pulmonary edema.",
        "{d} interstitial edema is present.",
        "{d} vascular congestion with edema.",
        "Lungs show {d} edema.",
    ),
    "Pleural Effusion": (
        "There is a {d} {s} pleural effusion.",
        "{d} effusion on the {s}.",
        "{d} {s} pleural effusion.",
        "{s} pleural space shows {d} effusion.",
    ),
    "Pneumothorax": (
        "There is a {d} {s} pneumothorax.",
        "{d} pneumothorax on the {s}.",
        "{d} {s} apical pneumothorax.",
        "{s} pleural space shows {d} pneumothorax.",
    ),
    "Lung Opacity": (
        "There is an opacity in the {s} {d} lung.",
        "{d} zone opacity on the {s}.",
        "{s} {d} lung airspace opacity.",
        "{s} lung shows {d} opacity.",
    ),
    "Lung Lesion": (
        "There is a nodule in the {s} {d} lung.",
        "{d} zone nodule on the {s}.",
        "{s} {d} lung nodule.",
        "{s} lung shows {d} nodule.",
    ),
    "Atelectasis": (
        "There is {s} basilar atelectasis.",
        "Linear atelectasis on the {s}.",
        "{s} base atelectasis.",
        "{s} lung shows basilar atelectasis.",
    ),
    "Support Devices": (
        "{v} is in place.",
        "{v} noted.",
        "{v} in satisfactory position.",
        "Support device: {v}.",
    ),
}
DEVICES = {"pacemaker": "cardiac pacemaker", "tube": "endotracheal tube", "line": "central venous catheter"}
BOTH_SIDES = {
    "There is a {d} {s} pleural effusion.": "There are {d} {s} pleural effusions.",
    "{d} effusion on the {s}.": "{d} effusions on both sides.",
    "{d} {s} pleural effusion.": "{d} {s} pleural effusions.",
    "{s} pleural space shows {d} effusion.": "{s} pleural spaces show {d} effusions.",
}
# What may be said when none of these labels is present; most readers say it for some patients only.
NEGATIVE: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Cardiomegaly",),
        (
            "Heart size is normal.",
            "The heart is not enlarged.",
            "Normal heart.",
            "Cardiac silhouette is normal.",
        ),
    ),
    (
        ("Pleural Effusion", "Pneumothorax"),
        (
            "No pleural effusion or pneumothorax.",
            "There is no effusion or pneumothorax.",
            "No pneumothorax or effusion.",
            "Pleural spaces are clear.",
        ),
    ),
    (
        ("Edema", "Lung Opacity", "Lung Lesion", "Atelectasis"),
        ("The lungs are clear.", "Lungs are clear.", "Clear lungs.", "Lungs show no focal opacity."),
    ),
)
INDICATIONS = (
    "cough", "fever", "chest pain", "dyspnea", "shortness of breath", "trauma", "preoperative", "weakness",
    "follow up", "hypoxia",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Style:
    """How one hospital writes: which phrasings, how often normal remarks, and in what order."""

    phrasings: tuple[int, ...] = (0, 1, 2, 3)
    remark_rate: float = 0.5
    devices_first: bool = False
    lungs_first: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """The text of one study."""

    indication: str
    findings: str
    impression: str


def write_report(findings: Sequence[Finding], style: Style, rng: np.random.Generator) -> Report:
    """Write the report of one phantom in a hospital's style."""
    say = style.phrasings[int(rng.integers(len(style.phrasings)))]
    present = {finding.label for finding in findings}
    spoken: list[tuple[int, str]] = []
    for finding in findings:
        spoken.append((_place(finding.label, style), describe(finding, say)))
    for labels, phrases in NEGATIVE:
        alone = not present or rng.random() < style.remark_rate
        if alone and not present & set(labels):
            spoken.append((_place(labels[0], style), phrases[say]))
    spoken.sort(key=lambda item: item[0])
    impression = ", ".join(sorted(label.lower() for label in present)).capitalize()
    return Report(
        indication=INDICATIONS[int(rng.integers(len(INDICATIONS)))],
        findings=" ".join(sentence for _, sentence in spoken),
        impression=f"{impression}." if present else "No acute disease.",
    )


def describe(finding: Finding, phrasing: int) -> str:
    """One sentence about one finding."""
    template = POSITIVE[finding.label][phrasing]
    if finding.side == "bilateral":
        template = BOTH_SIDES[template]
    device = DEVICES.get(finding.detail, "")
    if template.startswith("{v}"):
        device = device.capitalize()
    sentence = template.format(d=finding.detail, s=finding.side, v=device)
    return sentence[0].upper() + sentence[1:]


def _place(label: str, style: Style) -> int:
    """Position of a label's sentence in the report."""
    place = LABELS.index(label)
    if style.devices_first and label == "Support Devices":
        return -1
    if style.lungs_first and label == "Cardiomegaly":
        return len(LABELS) - 2
    return place
