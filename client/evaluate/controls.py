"""Controls: what a metric must notice to be worth anything.

`flip_negations` turns what a report denies into what it states and the other way round; `finding_f1` and
`statement_f1` of a flipped report must fall, wording metrics hardly do. Handing every study another study's
image (`client.evaluation.shuffled`) shows how much of a score is only the habit of reports.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from client.evaluate.intervals import Scores
from client.evaluate.scores import score, tabulate

_DENIED = (
    (r"\b(no|without) (?:evidence of |definite |focal |acute |visible )*", ""),
    (r"\b(is|are|was|were) not\b", r"\1"),
    (r"\bnegative for\b", "positive for"),
    (r"\bfree of\b", "full of"),
)
_STATED = (
    (r"\bthere (is|are) (?:an? )?", r"there \1 no "),
    (r"\b(is|are|was|were) (?=(?:\w+ )?(?:enlarged|present|seen|noted|identified|visible)\b)", r"\1 not "),
)


def flip_negations(report: str) -> str:
    """Deny what a report states and state what it denies, sentence by sentence, in as few words as can be."""
    flipped = [_flip(sentence) for sentence in re.split(r"(?<=[.;!?])\s+", report.strip())]
    return " ".join(flipped)


def negation_control(references: Sequence[str]) -> dict[str, dict[str, float]]:
    """Score the references against themselves, and flipped against themselves: metric to both."""
    same = score(tabulate(references, references))
    flipped = score(tabulate([flip_negations(text) for text in references], references))
    return {name: {"same": float(same[name]), "flipped": float(flipped[name])} for name in same}


def verdicts(
    control: dict[str, dict[str, float]], shuffled: Scores, scores: Scores
) -> dict[str, dict[str, bool]]:
    """Per metric: does it notice flipped negations (falls by half), and does it notice other images."""
    return {
        name: {
            "notices_negation": both["flipped"] <= both["same"] / 2 and both["same"] > 0,
            "notices_images": name in shuffled and shuffled[name] < scores[name],
        }
        for name, both in control.items()
    }


def _flip(sentence: str) -> str:
    for pattern, made in _DENIED:
        changed, count = re.subn(pattern, made, sentence, count=1, flags=re.IGNORECASE)
        if count:
            return _capital(changed)
    for pattern, made in _STATED:
        changed, count = re.subn(pattern, made, sentence, count=1, flags=re.IGNORECASE)
        if count:
            return _capital(changed)
    return f"No {sentence[:1].lower()}{sentence[1:]}" if sentence else sentence


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
