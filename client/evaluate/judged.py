"""A judge's verdicts on all drafts of an evaluation, kept as they come, with its own control.

The judge also sees the radiologist's text as a draft, as it is and with every negation flipped: a judge that
does not mind the difference is worth nothing, and the summary says so. An answer that failed is asked again
when the evaluation is run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from client.evaluate.controls import flip_negations
from client.evaluate.drafts import Journal, Progress
from client.evaluate.judge import ERROR_KINDS, Ask, Errors, Judged, judge_study
from client.evaluate.scores import Tables

_CONTROLS = 20


def judge_studies(
    ask: Ask,
    journal: Journal,
    keys: Sequence[str],
    drafts: Sequence[str],
    truths: Sequence[str],
    progress: Progress,
) -> dict[str, list[Judged]]:
    """Judge all drafts, and for the first studies the radiologist's own text, as it is and flipped.

    Verdicts come as drafts, same and flipped; those of an earlier run are read from the journal.
    """
    done = journal.read()
    some = range(min(_CONTROLS, len(keys)))
    wanted = {
        "drafts": [(keys[row], drafts[row], truths[row]) for row in range(len(keys))],
        "same": [(keys[row], truths[row], truths[row]) for row in some],
        "flipped": [(keys[row], flip_negations(truths[row]), truths[row]) for row in some],
    }
    verdicts: dict[str, list[Judged]] = {}
    total, count = sum(map(len, wanted.values())), 0
    for kind, studies in wanted.items():
        verdicts[kind] = []
        for study, draft, truth in studies:
            key = f"{kind}:{study}"
            if key not in done:
                judged = judge_study(ask, draft=draft, truth=truth)
                done[key] = {"key": key, **asdict(judged)}
                if not judged.failures:  # a failed answer is asked again when the evaluation is run again
                    journal.append([done[key]])
            verdicts[kind].append(_judged_of(done[key]))
            count += 1
            progress("judge", count, total)
    return verdicts


def _judged_of(record: Mapping[str, Any]) -> Judged:
    errors = record["errors"]
    return Judged(
        Errors(tuple(errors["significant"]), tuple(errors["insignificant"])) if errors else None,
        record["crimson"],
        tuple(record["failures"]),
    )


def judge_tables(judged: Mapping[str, Sequence[Judged]]) -> Tables:
    """Count errors and CRIMSON per study: [N, 2], value and 1, or 0 and 0 where the judge failed."""
    significant, every, crimson = [], [], []
    for verdict in judged["drafts"]:
        errors = verdict.errors
        significant.append((sum(errors.significant), 1) if errors else (0, 0))
        every.append((sum(errors.significant + errors.insignificant), 1) if errors else (0, 0))
        crimson.append((verdict.crimson, 1) if verdict.crimson is not None else (0, 0))
    return {
        "judge_significant_errors": np.array(significant, dtype=np.float64),
        "judge_errors": np.array(every, dtype=np.float64),
        "judge_crimson": np.array(crimson, dtype=np.float64),
    }


def judge_summary(name: str, judged: Mapping[str, Sequence[Judged]]) -> dict[str, Any]:
    """Sum errors by kind, name failures, and say whether the judge noticed flipped negations."""
    failures: dict[str, int] = {}
    for verdict in (verdict for side in judged.values() for verdict in side):
        for failure in verdict.failures:
            failures[failure] = failures.get(failure, 0) + 1
    kinds = {}
    for at, kind in enumerate(ERROR_KINDS):
        counted = [verdict.errors for verdict in judged["drafts"] if verdict.errors]
        kinds[kind] = {
            "significant": sum(errors.significant[at] for errors in counted),
            "insignificant": sum(errors.insignificant[at] for errors in counted),
        }
    control = {}
    for side in ("same", "flipped"):
        errors = [sum(v.errors.significant) for v in judged[side] if v.errors]
        crimson = [v.crimson for v in judged[side] if v.crimson is not None]
        control[side] = {
            "significant_errors": float(np.mean(errors)) if errors else None,
            "crimson": float(np.mean(crimson)) if crimson else None,
        }
    same, flipped = control["same"], control["flipped"]
    return {
        "model": name,
        "kinds": kinds,
        "failures": failures,
        "negation": control,
        "notices_negation": {
            "errors": _more(flipped["significant_errors"], same["significant_errors"]),
            "crimson": _more(same["crimson"], flipped["crimson"]),
        },
    }


def _more(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one > other
