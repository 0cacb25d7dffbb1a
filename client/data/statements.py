"""What a report affirms and what it denies, and whether two of its sections say opposite things.

English texts are read by `common/labeller.py`, Spanish and Chinese ones by a short list of terms. Guarantees:
silence and doubt are neither; a finding that a Spanish or Chinese text both affirms and denies is neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from client.data.reports import negated, sentences

_TERMS: Mapping[str, str] = {
    "Pleural Effusion": r"derram\w*|胸腔积液|胸水",
    "Pneumothorax": r"neumot[oó]ra\w*|气胸",
    "Cardiomegaly": r"cardiomegal\w*|心影增大|心脏增大",
    "Atelectasis": r"atelecta\w*|肺不张",
    "Pneumonia": r"neumon\w*|bronconeumon\w*|肺炎",
    "Consolidation": r"consolida\w*|condensaci\w*|实变",
    "Lung Lesion": r"n[oó]dul\w*|masas?\b|结节|肿块",
    "Fracture": r"fractur\w*|骨折",
    "Edema": r"edema\w*|肺水肿",
}
# Denying one kind of it (infiltrate) does not deny another (scar): no contradiction can be read off.
BROAD = ("Lung Opacity",)


def said_by(text: str, *, language: str) -> dict[str, bool]:
    """Return the findings that a text affirms (True) or denies (False) without doubt."""
    if language == "en":
        from common.labeller import Status, label_report

        stated = {Status.POSITIVE: True, Status.NEGATIVE: False}
        return {name: stated[status] for name, status in label_report(text).items() if status in stated}
    said: dict[str, set[bool]] = {}
    for sentence in sentences(text):
        for clause in re.split(r"[,，;；]|\s\.\s", sentence.lower()):
            for name, pattern in _TERMS.items():
                match = re.search(rf"(?<![a-z])(?:{pattern})", clause)
                if match:
                    said.setdefault(name, set()).add(not negated(clause[: match.start()]))
    return {name: values.pop() for name, values in said.items() if len(values) == 1}


def contradictions(findings: str, impression: str, *, language: str) -> tuple[str, ...]:
    """Return the findings that one section affirms and the other denies."""
    first, second = said_by(findings, language=language), said_by(impression, language=language)
    return tuple(
        name for name in first if name not in BROAD and name in second and first[name] is not second[name]
    )
