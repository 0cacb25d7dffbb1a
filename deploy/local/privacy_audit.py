"""Attacks on a finished study: what an adversary's success proves about epsilon, beside what is claimed.

Membership inference scores each patient by how far the released adapter lowered the loss on that patient
(Watson et al., ICLR 2022). The canary audit replays the study's mechanism, the very code and plan, with
planted patients whose gradients are orthogonal and as large as the clip, and reads them out of noised sums.

Guarantees: `one_run_epsilon` is a lower bound of epsilon at the stated confidence if members were chosen by
independent fair coins (Steinke, Nasr & Jagielski, NeurIPS 2023), as canaries are. Members and non-members of
a study come from a random split, so there it is a close stand-in. `gaussian_epsilon` is tighter, sees halved
noise where the first does not, and supposes that scores are Gaussian.

A low bound proves nothing: a stronger attack may exist. Scores are patient data and stay at the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import PlanInvalid
from common.privacy.mechanism import Mode, PrivacyPlan, View, dequantise, privatise, top_up
from common.privacy.sampling import Csprng, poisson_sample

if TYPE_CHECKING:
    from client.training import TrainingData
    from common.model.loading import AdaptedModel
    from common.model.lora import Vector

Scores = NDArray[np.float64]
CONFIDENCE = 0.95
_GUESSED_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Membership:
    """How well members are told from others by one score each; areas and rates are of the attack."""

    members: int
    others: int
    auc: float
    auc_low: float
    auc_high: float
    true_positives_at_1_percent: float
    epsilon_lower: float


@dataclass(frozen=True)
class CanaryAudit:
    """What canaries give away against one view; the measured d' should be the promised one."""

    view: str
    canaries: int
    rounds: int
    d_prime: float
    d_prime_promised: float
    d_prime_error: float
    epsilon_lower: float
    epsilon_lower_gaussian: float
    epsilon_claimed: float

    @property
    def consistent(self) -> bool:
        """Whether the noise that runs is the noise that is claimed, within five standard errors."""
        return abs(self.d_prime - self.d_prime_promised) <= 5 * self.d_prime_error


# --- membership -------------------------------------------------------------------------------------------


def membership_inference(members: Scores, others: Scores, *, delta: float, seed: int = 0) -> Membership:
    """Attack with one score per patient, higher meaning "was in training"; both must be non-empty."""
    auc = _auc(members, others)
    error = _auc_error(auc, members.size, others.size)
    threshold = np.quantile(others, 0.99)
    return Membership(
        members=members.size,
        others=others.size,
        auc=auc,
        auc_low=max(0.0, auc - 1.96 * error),
        auc_high=min(1.0, auc + 1.96 * error),
        true_positives_at_1_percent=float((members > threshold).mean()),
        epsilon_lower=one_run_epsilon(*_balanced(members, others, seed), delta=delta),
    )


def patient_losses(
    adapted: AdaptedModel, data: TrainingData, vector: Vector, *, batch: int = 64
) -> dict[str, float]:
    """Mean loss of each patient's studies under one adapter."""
    import torch

    from client.gradients import per_sample_loss
    from common.model.llava import forward_features
    from common.model.prompts import collate

    adapted.write_vector(vector)
    losses = np.empty(len(data.examples))
    with torch.no_grad():
        for start in range(0, len(data.examples), batch):
            rows = range(start, min(start + batch, len(data.examples)))
            inputs = collate([data.examples[i] for i in rows], pad_token_id=adapted.tokenizer.pad_token_id)
            logits = forward_features(
                adapted.model,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                features=data.features.rows([image for i in rows for image in data.image_rows[i]]),
            )
            losses[rows.start : rows.stop] = per_sample_loss(logits, inputs["labels"]).double().numpy()
    return {patient: float(losses[list(rows)].mean()) for patient, rows in data.studies.items()}


def membership_scores(before: dict[str, float], after: dict[str, float]) -> Scores:
    """How far training lowered each patient's loss; patients in sorted order."""
    return np.array([before[patient] - after[patient] for patient in sorted(before)])


def _balanced(members: Scores, others: Scores, seed: int) -> tuple[Scores, NDArray[np.bool_]]:
    draw = np.random.default_rng(seed)
    count = min(members.size, others.size)
    scores = np.concatenate([draw.permutation(members)[:count], draw.permutation(others)[:count]])
    return scores, np.arange(2 * count) < count


def _auc(members: Scores, others: Scores) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, others]))[: members.size]
    area = ranks.sum() - members.size * (members.size + 1) / 2
    return float(area / (members.size * others.size))


def _auc_error(auc: float, members: int, others: int) -> float:
    """Standard error of the area by Hanley & McNeil (Radiology, 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (q1 - auc**2) + (others - 1) * (q2 - auc**2)
    return math.sqrt(max(variance, 0.0) / (members * others))


# --- bounds -----------------------------------------------------------------------------------------------


def one_run_epsilon(
    scores: Scores, present: NDArray[np.bool_], *, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Lower bound of epsilon from guessing who was in: the highest scores in, the lowest out, others passed.

    Five numbers of guesses are tried; the confidence is shared among them (Bonferroni).
    """
    order = np.argsort(scores)
    best = 0.0
    for fraction in _GUESSED_FRACTIONS:
        each = max(1, round(fraction * scores.size / 2))
        correct = int(present[order[-each:]].sum() + (~present[order[:each]]).sum())
        allowed = (1 - confidence) / len(_GUESSED_FRACTIONS)
        best = max(best, _largest_refuted(scores.size, 2 * each, correct, delta, allowed))
    return best


def _largest_refuted(examples: int, guesses: int, correct: int, delta: float, allowed: float) -> float:
    low, high = 0.0, 20.0
    if _p_value(examples, guesses, correct, low, delta) > allowed:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        refuted = _p_value(examples, guesses, correct, middle, delta) <= allowed
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _p_value(examples: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound on the probability of so many correct guesses under (epsilon, delta), by Steinke et al."""
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    masses = binom.pmf(np.arange(correct - 1, -1, -1), guesses, right).cumsum()
    alpha = float((masses / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, beta + 2 * examples * delta * alpha)


def gaussian_epsilon(d_prime: float, *, delta: float) -> float:
    """Epsilon of a Gaussian mechanism whose neighbours are `d_prime` apart (Balle & Wang, ICML 2018)."""
    from scipy.stats import norm

    if d_prime <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        tail = norm.logcdf(-d_prime / 2 - epsilon / d_prime) + epsilon
        return float(norm.cdf(d_prime / 2 - epsilon / d_prime) - math.exp(tail)) - delta

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


# --- canaries ---------------------------------------------------------------------------------------------


def canary_audit(
    plan: PrivacyPlan,
    csprng: Csprng,
    *,
    canaries: int = 1000,
    privatised: Callable[[Any, PrivacyPlan, Csprng], NDArray[np.int32]] = privatise,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CanaryAudit, ...]:
    """Replay all rounds of `plan` with planted patients and read them out, for each view.

    Canary i has gradient clip_norm in coordinate i and is in the data by a coin; present ones are drawn in
    each round as patients are. The least favourable cohort that the plan allows is replayed: only shares that
    are certain to be there. Raises PlanInvalid in mode plain.
    """
    if plan.mode is Mode.PLAIN:
        raise PlanInvalid("mode plain claims nothing that could be audited")
    count = min(canaries, plan.dimension)
    present = csprng.stream("canary coins").words(count) % np.uint64(2) == 1
    names = [f"{i:09d}" for i in np.flatnonzero(present)]
    seen = {view: np.zeros(count) for view in _views(plan)}
    steps = plan.rounds * plan.local_steps
    for step in range(steps):
        round_randomness = csprng.child(f"round {step}")
        total = np.zeros(count)
        total[[int(name) for name in poisson_sample(round_randomness, names, plan.sampling_rate)]] = (
            plan.clip_norm
        )
        shares = plan.honest_floor if plan.mode is Mode.CONSORTIUM else 1
        units = np.zeros(count, np.int64)
        for site in range(shares):
            own = total if site == 0 else np.zeros(count)
            units += privatised(own, plan, round_randomness.child(f"site {site}"))
        seen[View.SITE] += dequantise(units, plan)
        if View.RELEASE in seen:
            noised = top_up(
                units.astype(np.int32), plan, round_randomness.child("server"), survivors=plan.survivor_floor
            )
            seen[View.RELEASE] += dequantise(noised, plan)
        progress(step + 1, steps)
    return tuple(_judge(plan, view, scores, present, steps) for view, scores in seen.items())


def _views(plan: PrivacyPlan) -> Sequence[View]:
    return tuple(View) if plan.mode is Mode.CONSORTIUM else (View.SITE,)


def _judge(
    plan: PrivacyPlan, view: View, scores: Scores, present: NDArray[np.bool_], steps: int
) -> CanaryAudit:
    with_, without = scores[present], scores[~present]
    measured = (with_.mean() - without.mean()) / math.sqrt((with_.var(ddof=1) + without.var(ddof=1)) / 2)
    noise = plan.site_noise if view is View.SITE else plan.release_noise
    sigma = noise * plan.sensitivity_units * plan.quantum
    drawn = plan.sampling_rate * (1 - plan.sampling_rate) * plan.clip_norm**2 / 2
    promised = math.sqrt(steps) * plan.sampling_rate * plan.clip_norm / math.sqrt(sigma**2 + drawn)
    error = math.sqrt(4 / scores.size * (1 + promised**2 / 8))
    return CanaryAudit(
        view=view.value,
        canaries=scores.size,
        rounds=steps,
        d_prime=float(measured),
        d_prime_promised=promised,
        d_prime_error=error,
        epsilon_lower=one_run_epsilon(scores, present, delta=plan.delta),
        epsilon_lower_gaussian=gaussian_epsilon(float(measured) - 1.645 * error, delta=plan.delta),
        epsilon_claimed=plan.epsilon(view),
    )
