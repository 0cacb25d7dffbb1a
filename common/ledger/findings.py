"""What an audit says: one finding per control, and the catalogue of controls.

A finding is pass, fail or not checkable, with a sentence and the evidence it rests on. Guarantees: a report
fails as soon as one control fails; what could not be checked is said, never counted as passed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Any


class Status(StrEnum):
    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    NOT_CHECKABLE = "not checkable"


@dataclass(frozen=True)
class Finding:
    """A control's outcome for a study (empty: for the log); evidence names entries, checkpoints, members."""

    control: str
    status: Status
    detail: str
    evidence: tuple[str, ...] = ()
    study: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "control": self.control,
            "status": self.status.value,
            "detail": self.detail,
            "evidence": list(self.evidence),
            "study": self.study,
        }


@dataclass(frozen=True)
class Problem:
    """One thing wrong, and where it shows."""

    detail: str
    evidence: str = ""


class Problems(list[Problem]):
    """The problems that one check collects."""

    def add(self, detail: str, evidence: str = "") -> None:
        self.append(Problem(detail, evidence))


_SHOWN = 5


def conclude(
    control: str,
    problems: Sequence[Problem],
    *,
    passed: str,
    evidence: Sequence[str] = (),
    study: str = "",
    unchecked: str = "",
) -> Finding:
    """Fail with the first problems; else not checkable where `unchecked` says why; else pass."""
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        detail = "; ".join(problem.detail for problem in problems[:_SHOWN]) + more
        shown = tuple(dict.fromkeys(p.evidence for p in problems if p.evidence))[: 4 * _SHOWN]
        return Finding(control, Status.FAIL, detail, shown, study)
    if unchecked:
        return Finding(control, Status.NOT_CHECKABLE, unchecked, tuple(evidence), study)
    return Finding(control, Status.PASS, passed, tuple(evidence), study)


@functools.cache
def catalogue() -> Mapping[str, Any]:
    """The controls, regimes and their map: `controls.json`, the one file that holds them."""
    data = files("common.ledger").joinpath("controls.json").read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(data)
    return value
