"""Metrics of drafted reports as sums over studies, so that any grouping or resampling is only addition.

Each metric turns (draft, truth) into a few counts and the sum of counts into a score. `finding_f1`,
`finding_f1_macro` and `statement_f1` read findings with `common.labeller`; a flipped negation lowers them,
and they are the ones to decide by. `rouge_l`, `bleu_4` and `exact_match` compare wording: with every negation
flipped, real reports still score 0.89 in ROUGE-L and 0.73 in BLEU-4 against themselves (docs/evaluation.md),
so these are shown for comparison only.

Guarantees: a score of the sum over studies equals the score computed at once; `bleu_4` is corpus BLEU
(Papineni et al. 2002) over lower-case words, without smoothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import ScoresInvalid
from common.evaluation_counts import FINDINGS
from common.labeller import NO_FINDING, Status, label_report

Array = NDArray[np.float64]
Tables = dict[str, Array]
_WORDS = re.compile(r"\w+|[^\w\s]")
_ORDERS = 4


@dataclass(frozen=True)
class Metric:
    """A score from summed counts [..., columns] → [...]; `recommended` for what a clinic may decide by."""

    name: str
    recommended: bool
    combine: Callable[[Array], Array]
    meaning: str


def f1_of(sums: Array) -> Array:
    """F1 from found rightly, found wrongly, missed; 0 where there is nothing to find and nothing found."""
    right, wrong, missed = sums[..., 0], sums[..., 1], sums[..., 2]
    return np.asarray(2 * right / np.maximum(2 * right + wrong + missed, 1))


def _macro_f1(sums: Array) -> Array:
    """Mean F1 over the findings that the references state at least once."""
    counts = sums.reshape(*sums.shape[:-1], len(FINDINGS), 3)
    there = counts[..., 0] + counts[..., 2] > 0
    total = np.where(there, f1_of(counts), 0.0).sum(-1)
    return np.asarray(total / np.maximum(there.sum(-1), 1))


def _micro_f1(sums: Array) -> Array:
    return f1_of(sums.reshape(*sums.shape[:-1], len(FINDINGS), 3).sum(-2))


def _mean(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1))


def _bleu(sums: Array) -> Array:
    hits, tries = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
    said, truth = sums[..., 2 * _ORDERS], sums[..., 2 * _ORDERS + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(hits / tries).mean(-1))
        brevity = np.where(said < truth, np.exp(1 - truth / said), 1.0)
    return np.where((hits > 0).all(-1), precision * brevity, 0.0)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("finding_f1", True, _micro_f1, "micro-F1 over findings stated as present"),
        Metric("finding_f1_macro", True, _macro_f1, "mean F1 over the findings that occur"),
        Metric(
            "statement_f1", True, f1_of, "micro-F1 over findings with what is said of them, absent or present"
        ),
        Metric("rouge_l", False, _mean, "longest common subsequence of words, F-measure"),
        Metric("bleu_4", False, _bleu, "n-grams up to four words"),
        Metric("exact_match", False, _mean, "the same words"),
    )
}
_TABLE_OF = {"finding_f1_macro": "finding_f1"}  # both read the counts per finding


def tabulate(drafts: Sequence[str], truths: Sequence[str]) -> Tables:
    """Count each draft against its truth: metric to [N, columns]; raises ScoresInvalid for unequal lists."""
    if len(drafts) != len(truths) or not truths:
        raise ScoresInvalid(f"expected as many drafts as references, got {len(drafts)}/{len(truths)}")
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"])
    rows: dict[str, list[Sequence[float]]] = {name: [] for name in METRICS if name not in _TABLE_OF}
    for draft, truth in zip(drafts, truths, strict=True):
        said, there = _statements(draft), _statements(truth)
        rows["finding_f1"].append(_per_finding(said, there))
        common = len(said.items() & there.items())
        rows["statement_f1"].append((common, len(said) - common, len(there) - common))
        rows["rouge_l"].append((rouge.score(truth, draft)["rougeL"].fmeasure, 1))
        rows["exact_match"].append((draft.lower().split() == truth.lower().split(), 1))
        rows["bleu_4"].append(_ngrams(draft, truth))
    return {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def score(tables: Tables, weights: Array | None = None) -> dict[str, Array]:
    """Score summed tables; `weights` [..., N] counts each study so often, None counts each once."""
    scores = {}
    for name, metric in METRICS.items():
        table = tables.get(_TABLE_OF.get(name, name))
        if table is None:
            continue
        scores[name] = metric.combine(table.sum(0) if weights is None else weights @ table)
    for name in tables.keys() - METRICS.keys():
        scores[name] = _mean(tables[name].sum(0) if weights is None else weights @ tables[name])
    return scores


def per_finding(table: Array) -> dict[str, dict[str, float]]:
    """Split the table of `finding_f1` by finding: cases, found rightly, found wrongly, missed, F1."""
    counts = table.sum(0).reshape(len(FINDINGS), 3)
    return {
        label: {
            "cases": int(row[0] + row[2]),
            "right": int(row[0]),
            "wrong": int(row[1]),
            "missed": int(row[2]),
            "f1": float(f1_of(row)),
        }
        for label, row in zip(FINDINGS, counts, strict=True)
    }


def finding_counts(draft: str, truth: str) -> tuple[int, ...]:
    """Count one report for `finding_f1`: per finding found rightly, found wrongly, missed (3 * 13 values)."""
    return _per_finding(_statements(draft), _statements(truth))


def _statements(text: str) -> dict[str, bool]:
    """Findings that a text speaks of, and whether it holds them for present."""
    return {
        label: status is not Status.NEGATIVE
        for label, status in label_report(text).items()
        if label != NO_FINDING
    }


def _per_finding(said: Mapping[str, bool], there: Mapping[str, bool]) -> tuple[int, ...]:
    counts: list[int] = []
    for label in FINDINGS:
        found, true = said.get(label, False), there.get(label, False)
        counts += [int(found and true), int(found and not true), int(true and not found)]
    return tuple(counts)


def _ngrams(draft: str, truth: str) -> tuple[float, ...]:
    said, there = (_WORDS.findall(text.lower()) for text in (draft, truth))
    hits, tries = [], []
    for order in range(1, _ORDERS + 1):
        ours, theirs = (
            Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))
            for words in (said, there)
        )
        hits.append(float((ours & theirs).total()))
        tries.append(float(ours.total()))
    return (*hits, *tries, float(len(said)), float(len(there)))
