"""Federated evaluation: what a patient adds to the counts, what noise they get, and what the sum then says.

Each site counts, per finding, what its drafts found rightly, wrongly and not at all, and adds noise before
anything leaves; the server adds the sites' sums, tops the noise up, and reads F1 from the noised counts. A
patient counts as one: the mean over at most `studies_per_patient` of the patient's studies, scaled down to L2
norm `clip_norm`. The plan is an ordinary `PrivacyPlan`, so noise, masks, budget and ε are those of training.

Guarantees: adding or removing a patient moves a site's sum by at most the plan's `sensitivity_units`;
intervals hold both the noise, whose width is public, and the chance that drew the patients (a bound: a share
of p varies by at most p(1 - p)). They do not hold the bias of clipping, which makes patients with many
findings count less.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Study
from common.errors import ScoresInvalid
from common.labeller import LABELS, NO_FINDING
from common.ledger.entries import Evaluation, EvaluationSum
from common.ledger.statements import bucket
from common.privacy import mechanism
from common.privacy.mechanism import PrivacyPlan, View, dequantise

Array = NDArray[np.float64]
FINDINGS = tuple(label for label in LABELS if label != NO_FINDING)
DIMENSION = 3 * len(FINDINGS) + 1  # found rightly, wrongly, missed per finding; patients at the end
CLIP_NORM = 2.5  # one patient and a little over five findings
_UNITS_PER_CLIP = 1 << 10
_DRAWS = 4000
_SIGNAL = 3.0  # a finding with fewer cases than this many noise widths is not shown


@dataclass(frozen=True)
class Score:
    """An F1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What the noised counts say: micro-F1, F1 of findings above the noise, patients, and the ε so far."""

    finding_f1: Score
    findings: dict[str, Score]
    patients: float
    noise: float  # standard deviation of every count
    site_epsilon: float
    release_epsilon: float


def evaluation_plan(
    study: Study,
    *,
    site_epsilon: float,
    release_epsilon: float,
    rounds: int,
    studies_per_patient: int = 2,
    clip_norm: float = CLIP_NORM,
) -> PrivacyPlan:
    """Make the plan of a study's evaluations: `rounds` of them together cost at most these ε.

    Cohort, δ and nominal patients are the study's; every patient is counted (sampling rate 1). Raises
    PlanInvalid.
    """
    return mechanism.calibrate(
        target_site_epsilon=site_epsilon,
        target_release_epsilon=release_epsilon,
        **_terms(study, rounds=rounds, studies_per_patient=studies_per_patient, clip_norm=clip_norm),
    )


def _terms(
    study: Study, *, rounds: int, studies_per_patient: int = 2, clip_norm: float = CLIP_NORM
) -> dict[str, Any]:
    return {
        "mode": mechanism.Mode(study.privacy.mode.value),
        "sites": len(study.cohort.site),
        "colluders": study.privacy.colluders,
        "dropouts": study.privacy.dropouts,
        "patients": study.training.patients,
        "sampling_rate": 1.0,
        "studies_per_patient": studies_per_patient,
        "clip_norm": clip_norm,
        "units_per_clip": _UNITS_PER_CLIP,
        "dimension": DIMENSION,
        "rounds": rounds,
        "spare_rounds": study.privacy.spare_rounds,
        "local_steps": 1,
        "delta": study.privacy.delta,
    }


@functools.lru_cache(maxsize=8)
def evaluation_plan_of(study: Study) -> PrivacyPlan:
    """Return the plan of a study's one federated evaluation, as both sides derive it from the manifest."""
    section = study.federated_evaluation
    if section is None:
        raise ScoresInvalid("federated_evaluation: expected this section in the manifest, got none")
    return evaluation_plan(
        study, site_epsilon=section.site_epsilon, release_epsilon=section.release_epsilon, rounds=1
    )


def patient_vector(studies: Sequence[Sequence[int]], *, clip_norm: float) -> Array:
    """Average a patient's studies (3 * 13 counts of 0 or 1 each), add the patient, clip: [DIMENSION]."""
    counts = np.asarray(studies, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[1] != DIMENSION - 1 or not len(counts):
        raise ScoresInvalid(f"expected counts of {DIMENSION - 1} values per study, got {counts.shape}")
    vector = np.append(counts.mean(0), 1.0)
    norm = float(np.linalg.norm(vector))
    return vector * min(1.0, clip_norm / norm)


def summarise(
    total_units: NDArray[np.int64],
    plan: PrivacyPlan,
    *,
    survivors: int,
    server_sigma_units: float,
    evaluations: int,
    seed: int = 0,
) -> Summary:
    """Read F1 from the noised sum of `survivors` sites, after `evaluations` of the plan's rounds.

    total_units: int64 [DIMENSION], the server's noise included. `seed` is of the interval's draws.
    """
    if total_units.shape != (DIMENSION,):
        raise ScoresInvalid(f"expected {DIMENSION} counts, got {total_units.shape}")
    values = dequantise(total_units, plan)
    variance = survivors * plan.site_share_sigma_units**2 + server_sigma_units**2
    noise = math.sqrt(variance) * plan.quantum
    patients = max(1.0, float(values[-1]))
    counts = np.maximum(values[:-1].reshape(len(FINDINGS), 3), 0.0)
    share = np.minimum(counts / patients, 1.0)
    width = np.sqrt(patients * share * (1 - share) + noise**2)
    rng = np.random.default_rng(seed)
    drawn = values[:-1].reshape(len(FINDINGS), 3) + width * rng.standard_normal((_DRAWS, len(FINDINGS), 3))
    cases = counts[:, 0] + counts[:, 2]
    shown = [at for at in range(len(FINDINGS)) if cases[at] > _SIGNAL * noise * math.sqrt(2)]
    served = [mechanism.ServedRound(survivors, server_sigma_units)] * evaluations
    micro = values[:-1].reshape(len(FINDINGS), 3).sum(0)  # unclipped, so that noise cancels
    return Summary(
        finding_f1=_score(micro, drawn.sum(1)),
        findings={FINDINGS[at]: _score(values[3 * at : 3 * at + 3], drawn[:, at]) for at in shown},
        patients=patients,
        noise=noise,
        site_epsilon=plan.epsilon(View.SITE, served),
        release_epsilon=plan.epsilon(View.RELEASE, served),
    )


def evaluation_entry(
    summary: Summary, *, number: int, adapter: str, done: EvaluationSum | None = None
) -> Evaluation:
    """Make the ledger's entry of a summary: scores with their intervals, ε, and the patients in a bucket."""
    metrics: dict[str, float] = {
        "site_epsilon": summary.site_epsilon,
        "release_epsilon": summary.release_epsilon,
        "noise": summary.noise,
    }
    for name, score in {"finding_f1": summary.finding_f1, **_coded(summary.findings)}.items():
        metrics |= {name: score.value, f"{name}.low": score.low, f"{name}.high": score.high}
    return Evaluation(
        number=number,
        adapter=adapter,
        site="all",
        subgroup="all",
        studies=bucket(round(summary.patients)),
        metrics={name: round(value, 6) for name, value in metrics.items()},
        sum=done,
    )


def _coded(findings: Mapping[str, Score]) -> dict[str, Score]:
    return {"f1." + label.lower().replace(" ", "-"): score for label, score in findings.items()}


def _score(counts: Array, drawn: Array) -> Score:
    low, high = np.percentile(_f1(drawn), [2.5, 97.5])
    return Score(float(_f1(counts)), float(low), float(high))


def _f1(counts: Array) -> Array:
    right, wrong, missed = (np.maximum(counts[..., at], 0.0) for at in range(3))
    return np.asarray(2 * right / np.maximum(2 * right + wrong + missed, 1e-9))
