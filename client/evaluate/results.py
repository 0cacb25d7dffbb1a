"""The figures of an evaluation from its drafts' counts: scores, controls, findings, groups, comparison.

Pure: counts and settings in, JSON values out. No report's text is among them, except in `examples_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.data.store import Pair
from client.evaluate.controls import negation_control, verdicts
from client.evaluate.intervals import Scores, bootstrap, compare, patient_sums
from client.evaluate.scores import METRICS, Tables, per_finding, score
from client.evaluate.settings import Settings
from client.evaluate.subgroups import LEAST_PATIENTS, group_studies, read_groups
from common.model.release import Release


@dataclass(frozen=True)
class Written:
    """One release's drafts and what was counted on them; rows are the held-out studies."""

    release: Release
    drafts: list[str]
    tables: Tables
    shuffled: Scores
    extra: dict[str, Any]


def result_of(settings: Settings, pairs: Sequence[Pair], runs: Sequence[Written]) -> dict[str, Any]:
    """Put together what `result.json` holds; the first run is the release asked about."""
    patients = [pair.patient for pair in pairs]
    truths = [pair.findings for pair in pairs]
    sums = [patient_sums(run.tables, patients) for run in runs]
    control = negation_control(truths)
    first = runs[0]
    scores = scores_of(sums[0], settings)
    plain = {name: entry["value"] for name, entry in scores.items()}
    result: dict[str, Any] = {
        "schema": 1,
        "release": _about(first.release),
        "data": {"split": settings.split, "studies": len(pairs), "patients": len(set(patients))},
        "resamples": settings.resamples,
        "scores": scores,
        "shuffled_images": first.shuffled,
        "negation_control": control,
        "verdicts": verdicts(control, first.shuffled, plain),
        "findings": per_finding(first.tables["finding_f1"]),
        "subgroups": _subgroups(settings, pairs, first.tables),
        **first.extra,
    }
    if len(runs) > 1:
        other = scores_of(sums[1], settings)
        result["against"] = {
            "release": _about(runs[1].release),
            "scores": other,
            "shuffled_images": runs[1].shuffled,
            "comparison": compare(sums[0], sums[1], resamples=settings.resamples, seed=settings.seed),
            **runs[1].extra,
        }
    return result


def scores_of(sums: Tables, settings: Settings) -> dict[str, dict[str, Any]]:
    """Score patients' sums, each score with its interval."""
    values = floats(score(sums))
    intervals = bootstrap(sums, resamples=settings.resamples, seed=settings.seed)
    return {
        name: {
            "value": value,
            "low": intervals[name][0],
            "high": intervals[name][1],
            "recommended": name in METRICS and METRICS[name].recommended,
        }
        for name, value in values.items()
    }


def _subgroups(settings: Settings, pairs: Sequence[Pair], tables: Tables) -> list[dict[str, Any]]:
    table = read_groups(settings.groups) if settings.groups else {}
    patients = [pair.patient for pair in pairs]
    groups = group_studies([p.study for p in pairs], patients, [p.view for p in pairs], table)
    found: list[dict[str, Any]] = []
    for group in groups:
        entry: dict[str, Any] = {"kind": group.kind, "name": group.name, "suppressed": group.suppressed}
        if group.suppressed:
            entry |= {
                "patients": None,
                "note": f"under {LEAST_PATIENTS} patients, or hidden with one that is",
            }
        else:
            rows = list(group.rows)
            part = {name: values[rows] for name, values in tables.items()}
            entry |= {"patients": group.patients, "studies": len(rows)}
            entry["scores"] = scores_of(patient_sums(part, [patients[row] for row in rows]), settings)
        found.append(entry)
    return found


def _about(release: Release) -> dict[str, Any]:
    note = release.note
    return {
        "study": note.study,
        "round": note.round,
        "adapter": note.adapter_sha256,
        "mode": note.mode,
        "release_epsilon": note.release_epsilon or None,
        "base": release.study.base.name,
    }


def examples_of(settings: Settings, pairs: Sequence[Pair], run: Written) -> list[dict[str, str]]:
    """The worst and the best drafts, for the page; report text, so only when asked for."""
    if not settings.examples:
        return []
    values = METRICS["statement_f1"].combine(run.tables["statement_f1"])
    order = np.argsort(values, kind="stable")
    half = (settings.examples + 1) // 2
    rows = [*order[:half], *order[::-1][: settings.examples - half]]
    return [{"truth": pairs[row].findings, "draft": run.drafts[row]} for row in rows]


def floats(values: Mapping[str, Any]) -> Scores:
    """Turn zero-dimensional arrays into numbers."""
    return {name: float(value) for name, value in values.items()}
