"""A language model on this machine as a judge: CheXprompt's six kinds of error, and CRIMSON's score.

CheXprompt (Zambrano Chaves et al. 2025) counts six kinds of error, each clinically significant or not.
CRIMSON weighs findings by urgency: what was found rightly, wrongly and not at all. The wording of the
questions is our own, so figures compare only with figures of the same judge and these questions. Nothing is
sent beyond this machine unless `allow_remote` says so.

Guarantees: an answer that is not exactly the JSON asked for is no score; it counts as failed, under the
reason that is reported. Nothing is repaired or guessed. A judge is a model: `controls` must show that it
notices a flipped negation before its figures mean anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import FedRadError, JudgeAnswerInvalid

Ask = Callable[[str], str]
ERROR_KINDS = (
    "false_finding",
    "missed_finding",
    "wrong_location",
    "wrong_severity",
    "false_comparison",
    "missed_comparison",
)
URGENCY: Mapping[str, float] = {"urgent": 1.0, "actionable": 0.5, "minor": 0.25, "benign": 0.0}
_ERROR_WEIGHT = {"significant": 0.5, "negligible": 0.0}
_MAX_COUNT = 50
_MAX_FINDINGS = 100

_ERRORS_QUESTION = """Compare a draft report of a chest radiograph with the radiologist's own.
Count the draft's errors of each kind, clinically significant ones and others apart:
false_finding: it states a finding that the radiologist does not; missed_finding: it leaves one out;
wrong_location: right finding, wrong place; wrong_severity: right finding, wrong degree;
false_comparison: it compares with an earlier image where the radiologist does not; missed_comparison: it
leaves out such a change. Answer with one JSON object only, of this form, with whole numbers:
{"significant": {"false_finding": 0, "missed_finding": 0, "wrong_location": 0, "wrong_severity": 0,
"false_comparison": 0, "missed_comparison": 0}, "insignificant": {the same six}}

Radiologist: %s

Draft: %s"""
_CRIMSON_QUESTION = """Compare a draft report of a chest radiograph with the radiologist's own.
List abnormal findings only. Give each an urgency: urgent, actionable, minor or benign. Answer with one JSON
object only:
{"matched": [{"urgency": "...", "errors": ["significant" or "negligible", one per wrong detail]}],
"missed": [{"urgency": "..."}], "false": [{"urgency": "..."}]}
matched: in both; missed: only the radiologist's; false: only the draft's.

Radiologist: %s

Draft: %s"""


@dataclass(frozen=True, slots=True)
class Errors:
    """Counts by kind, in the order of ERROR_KINDS."""

    significant: tuple[int, ...]
    insignificant: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """One study's verdicts; None with the reason where the judge gave none."""

    errors: Errors | None
    crimson: float | None
    failures: tuple[str, ...]


def judge_study(ask: Ask, *, draft: str, truth: str) -> Judged:
    """Ask both questions about one study; a failed answer is named, never repaired."""
    failures: list[str] = []

    def put(question: str, name: str) -> str | None:
        try:
            return ask(question % (_plain(truth), _plain(draft)))
        except FedRadError as error:
            failures.append(f"{name}: no answer ({error.code})")
            return None

    errors, crimson = None, None
    if (answer := put(_ERRORS_QUESTION, "errors")) is not None:
        try:
            errors = parse_errors(answer)
        except JudgeAnswerInvalid as error:
            failures.append(f"errors: {error}")
    if (answer := put(_CRIMSON_QUESTION, "crimson")) is not None:
        try:
            crimson = parse_crimson(answer)
        except JudgeAnswerInvalid as error:
            failures.append(f"crimson: {error}")
    return Judged(errors, crimson, tuple(failures))


def parse_errors(answer: str) -> Errors:
    """Parse the six counts, twice; raises JudgeAnswerInvalid."""
    value = _object(answer, {"significant", "insignificant"})
    counts = {}
    for side, part in value.items():
        if not isinstance(part, dict) or part.keys() != set(ERROR_KINDS):
            raise JudgeAnswerInvalid("expected the six kinds of error")
        if not all(type(count) is int and 0 <= count <= _MAX_COUNT for count in part.values()):
            raise JudgeAnswerInvalid(f"expected whole numbers from 0 to {_MAX_COUNT}")
        counts[side] = tuple(int(part[kind]) for kind in ERROR_KINDS)
    return Errors(counts["significant"], counts["insignificant"])


def parse_crimson(answer: str) -> float:
    """Parse the lists of findings and score them; raises JudgeAnswerInvalid."""
    value = _object(answer, {"matched", "missed", "false"})
    for part in value.values():
        if not isinstance(part, list) or len(part) > _MAX_FINDINGS:
            raise JudgeAnswerInvalid("expected three lists of findings")
    matched = []
    for finding in value["matched"]:
        weight = _urgency(finding, {"urgency", "errors"})
        errors = finding["errors"]
        if not isinstance(errors, list) or not all(
            isinstance(error, str) and error in _ERROR_WEIGHT for error in errors
        ):
            raise JudgeAnswerInvalid("expected errors that are significant or negligible")
        matched.append((weight, sum(_ERROR_WEIGHT[error] for error in errors)))
    missed = [_urgency(finding, {"urgency"}) for finding in value["missed"]]
    false = [_urgency(finding, {"urgency"}) for finding in value["false"]]
    return crimson_score(matched, missed, false)


def crimson_score(
    matched: Sequence[tuple[float, float]], missed: Sequence[float], false: Sequence[float]
) -> float:
    """CRIMSON's arithmetic from `matched` (weight, errors) and the weights of missed and false findings.

    S = (correct - false) / N with N the weight of the radiologist's findings, a match worth w * w / (w + e);
    where S < 0, with d = false - correct, it is -d / (1 + d). A normal report without false findings is 1.
    """
    correct = sum(weight * weight / (weight + errors) for weight, errors in matched if weight > 0)
    wrong = sum(false)
    total = sum(weight for weight, _ in matched) + sum(missed)
    if correct < wrong:
        return -(wrong - correct) / (1 + wrong - correct)
    return (correct - wrong) / total if total > 0 else 1.0


def _object(answer: str, keys: set[str]) -> dict[str, Any]:
    start, end = answer.find("{"), answer.rfind("}")
    try:
        value = json.loads(answer[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise JudgeAnswerInvalid("expected one JSON object") from error
    if not isinstance(value, dict) or value.keys() != keys:
        raise JudgeAnswerInvalid(f"expected the keys {', '.join(sorted(keys))}")
    return value


def _urgency(finding: object, keys: set[str]) -> float:
    urgency = finding["urgency"] if isinstance(finding, dict) and finding.keys() == keys else None
    if not isinstance(urgency, str) or urgency not in URGENCY:
        raise JudgeAnswerInvalid(f"expected findings with an urgency of {', '.join(URGENCY)}")
    return URGENCY[urgency]


def _plain(text: str) -> str:
    return " ".join(text.split())
