"""Scores of generated reports against the radiologists' own, with bootstrap intervals.

`finding_f1` is the micro-F1 over the observations that `common.labeller` reads from both texts, doubtful ones
counted as present and "No Finding" left out. `rouge_l` is the F-measure of `rouge-score` without stemming.
`exact_match` ignores case and white space. These compare systems on the same reports; they are no measure of
clinical correctness.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import ScoresInvalid
from common.labeller import present_findings

METRICS = ("finding_f1", "rouge_l", "exact_match")


def score_reports(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    interval_seed: int = 0,
    resamples: int = 1000,
) -> dict[str, object]:
    """Score reports pairwise: the three metrics (0-1), `n`, and `interval`, metric to [low, high] at 95 %.

    The interval resamples reports with replacement (percentile bootstrap); `resamples` 0 leaves it out.
    Raises ScoresInvalid for no reports or unequal counts.
    """
    if len(predictions) != len(references) or not references:
        raise ScoresInvalid(
            f"expected as many predictions as references, got {len(predictions)}/{len(references)}"
        )
    counts = _counts(predictions, references)
    scores: dict[str, object] = dict(zip(METRICS, _scores(counts.sum(0)), strict=True))
    scores["n"] = len(references)
    if resamples:
        rng = np.random.default_rng(interval_seed)
        draws = rng.integers(len(counts), size=(resamples, len(counts)))
        drawn = np.array([_scores(counts[rows].sum(0)) for rows in draws])
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        scores["interval"] = {metric: [float(low[at]), float(high[at])] for at, metric in enumerate(METRICS)}
    return scores


def _counts(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Per report: found rightly, found wrongly, missed, ROUGE-L, exact match, one."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"])
    rows = []
    for said, truth in zip(predictions, references, strict=True):
        found, there = (present_findings(text) - {"No Finding"} for text in (said, truth))
        rows.append(
            (
                len(found & there),
                len(found - there),
                len(there - found),
                rouge.score(truth, said)["rougeL"].fmeasure,
                said.lower().split() == truth.lower().split(),
                1,
            )
        )
    return np.array(rows, dtype=np.float64)


def _scores(total: NDArray[np.float64]) -> tuple[float, float, float]:
    right, wrong, missed, rouge, exact, many = total.tolist()
    # With nothing to find and nothing found there is nothing to score; 0 claims the least.
    f1 = 2 * right / (2 * right + wrong + missed) if right else 0.0
    return f1, rouge / many, exact / many
