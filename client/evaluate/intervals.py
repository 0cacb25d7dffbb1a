"""How sure a score is, and whether two releases differ: resampling of patients, never of studies.

Guarantees: a patient's studies stay together; equal inputs and seed give equal numbers. Intervals are
percentile bootstraps at 95 %; the test swaps the two releases' drafts patient by patient (Fisher–Pitman
paired randomisation) and counts itself among the draws, so a p-value is never 0. Both are descriptive: they
know nothing of how the patients were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client.evaluate.scores import Array, Tables, score
from common.errors import ScoresInvalid

Scores = dict[str, float]


def patient_sums(tables: Tables, patients: Sequence[str]) -> Tables:
    """Add up each patient's studies, patients in sorted order: metric to [P, columns]."""
    names = sorted(set(patients))
    place = {name: at for at, name in enumerate(names)}
    rows = np.array([place[name] for name in patients])
    sums = {}
    for metric, table in tables.items():
        if len(table) != len(patients):
            raise ScoresInvalid(f"expected {len(table)} patients' names, got {len(patients)}")
        total = np.zeros((len(names), table.shape[1]))
        np.add.at(total, rows, table)
        sums[metric] = total
    return sums


def bootstrap(tables: Tables, *, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """95 % interval of every score, resampling the rows (patients) of `tables`."""
    count = len(next(iter(tables.values())))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    drawn = score(tables, weights.astype(np.float64))
    return {
        name: (float(low), float(high))
        for name, values in drawn.items()
        for low, high in [np.percentile(values, [2.5, 97.5])]
    }


def compare(one: Tables, other: Tables, *, resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """Difference one - other of every score, its p-value (two-sided) and 95 % bootstrap interval.

    Rows are the same patients in the same order. Raises ScoresInvalid when they cannot be.
    """
    if any(one[name].shape != other[name].shape for name in one) or one.keys() != other.keys():
        raise ScoresInvalid("expected the same patients for both releases, got others")
    count = len(next(iter(one.values())))
    rng = np.random.default_rng(seed)
    keep = rng.integers(0, 2, size=(resamples, count)).astype(np.float64)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    observed = _differences(one, other, np.ones((1, count)))
    swapped = _swapped(one, other, keep)
    resampled = _differences(one, other, weights)
    result = {}
    for name, value in observed.items():
        difference = float(value[0])
        extreme = int((np.abs(swapped[name]) >= abs(difference) - 1e-12).sum())
        low, high = np.percentile(resampled[name], [2.5, 97.5])
        result[name] = {
            "difference": difference,
            "p": (1 + extreme) / (1 + resamples),
            "low": float(low),
            "high": float(high),
        }
    return result


def _differences(one: Tables, other: Tables, weights: Array) -> dict[str, Array]:
    ours, theirs = score(one, weights), score(other, weights)
    return {name: ours[name] - theirs[name] for name in ours}


def _swapped(one: Tables, other: Tables, keep: Array) -> dict[str, Array]:
    """Differences after handing each patient's drafts to the other release where `keep` is 0."""
    rows = {name: np.concatenate([one[name], other[name]]) for name in one}
    ours, theirs = score(rows, np.hstack([keep, 1 - keep])), score(rows, np.hstack([1 - keep, keep]))
    return {name: ours[name] - theirs[name] for name in ours}
