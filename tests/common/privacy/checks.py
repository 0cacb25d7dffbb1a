"""The checks that the privacy code must pass and its mutants must fail: each raises AssertionError.

They take the functions under test as arguments and nothing from the modules that define them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from common.privacy.mechanism import Mode, PrivacyPlan

ALARM = 1e-9  # false alarms of one statistical check


def plan_of(**changes: Any) -> PrivacyPlan:
    """A small valid plan, changed by keyword."""
    fields: dict[str, Any] = {
        "mode": Mode.CONSORTIUM,
        "sites": 1,
        "patients": 1000,
        "sampling_rate": 0.05,
        "studies_per_patient": 2,
        "clip_norm": 0.5,
        "units_per_clip": 1 << 20,
        "dimension": 100_000,
        "rounds": 10,
        "site_noise": 1.0,
        "release_noise": 1.0,
        "delta": 1e-5,
    }
    return PrivacyPlan(**(fields | changes))


class Dots(nn.Module):
    """w.x as a loss: the gradient of a row is the row itself, so canaries can be planted at will."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dimension, 1, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        losses: Tensor = self.layer(rows)[:, 0]
        return losses


def clipped_sum(gradients: Any, rows: Tensor, patients: list[int], clip_norm: float | None) -> Any:
    """Sum of the rows, clipped by patient, through the engine of module `gradients`."""
    model = Dots(rows.shape[1])
    where = torch.tensor(patients)
    with gradients.PatientGradients(model, list(model.named_parameters())) as engine:
        for start in range(0, max(patients) + 1, 256):
            mine = torch.nonzero((where >= start) & (where < start + 256))[:, 0]
            own = where[mine] - start
            with engine.microbatch(units=int(own.max()) + 1, row_to_unit=own):
                gradients.patient_loss(model(rows[mine]), own).backward()
            engine.accumulate(clip_norm)
        return engine.take()


def check_a_patient_moves_the_sum_by_at_most_the_clip(gradients: Any) -> None:
    clip = 0.5
    rows = torch.zeros(6, 8)
    for row in range(6):
        rows[row, row] = 10.0 * (row + 1)
    total = clipped_sum(gradients, rows, [0, 0, 0, 0, 1, 2], clip)
    without = clipped_sum(gradients, rows[4:], [0, 1], clip)
    moved = float(np.linalg.norm(total - without))
    assert moved <= clip * (1 + 1e-9), (
        f"four studies of one patient moved the sum by {moved / clip:.3f} clips"
    )
    assert moved >= clip * (1 - 1e-6)


def check_losses_are_separable(gradients: Any) -> None:
    """The loss, and so the gradient, of a sample must not move with another sample's labels."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 9, 20), torch.randint(0, 20, (3, 9))
    before = gradients.per_sample_loss(logits, labels)
    changed = labels.clone()
    changed[2, 3:] = -100
    after = gradients.per_sample_loss(logits, changed)
    assert torch.equal(before[:2], after[:2]), "a patient's loss moved with another patient's labels"
    assert not torch.equal(before[2], after[2])


def check_a_broken_patient_is_left_out(gradients: Any) -> None:
    rows = torch.eye(4)
    rows[1, 2] = float("inf")
    total = clipped_sum(gradients, rows, [0, 1, 2, 3], 0.5)
    assert np.array_equal(total, [0.5, 0.0, 0.5, 0.5])


def check_noise_width(noisy: Callable[[Any], Any], sigma: float, size: int = 100_000) -> None:
    """Noise on a vector of zeros has the planned width (chi-square) and shape (Kolmogorov-Smirnov)."""
    values = np.asarray(noisy(np.zeros(size)), dtype=np.float64)
    statistic = float((values**2).sum()) / sigma**2
    low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], df=size)
    assert low < statistic < high, f"variance is {statistic / size:.4f} of the plan's"
    assert abs(values.mean()) < 7 * sigma / math.sqrt(size)
    assert stats.kstest(values / sigma, "norm").pvalue > ALARM
    pairs = float((values[1:] * values[:-1]).mean()) / sigma**2
    assert abs(pairs) < 7 / math.sqrt(size), "neighbouring coordinates are correlated"


def check_draws_are_poisson(sample: Callable[[int, list[str], float], list[str]]) -> None:
    """Draw sizes vary as a binomial's; patients are drawn at the rate and independently of each other."""
    people, rate, draws = [f"p{i:03d}" for i in range(200)], 0.1, 600
    drawn = np.array(
        [
            [p in chosen for p in people]
            for s in range(draws)
            if (chosen := set(sample(s, people, rate))) or True
        ]
    )
    sizes = drawn.sum(1)
    variance = len(people) * rate * (1 - rate)
    ratio = float(sizes.var()) * draws / variance
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], df=draws - 1)
    assert low < ratio < high, f"draw sizes vary by {sizes.var():.2f}, Poisson sampling by {variance:.2f}"
    assert stats.binomtest(int(drawn.sum()), drawn.size, rate).pvalue > ALARM
    each = stats.chisquare(drawn.sum(0), np.full(len(people), drawn.sum() / len(people)))
    assert each.pvalue > ALARM


def d_prime(observed: Any, present: Any) -> float:
    """How well a canary's presence is told from the output: difference of means over the noise width."""
    with_, without = observed[present], observed[~present]
    spread = math.sqrt((with_.var(ddof=1) + without.var(ddof=1)) / 2)
    return float((with_.mean() - without.mean()) / spread)


def check_canaries_are_as_hidden_as_planned(
    gradients: Any, privatise: Callable[[Any], Any], plan: PrivacyPlan
) -> None:
    """Gaussian d' audit: 3,000 canaries in orthogonal directions, each present by a coin.

    The mechanism promises d' = 1 / noise multiplier; the estimate must agree in both directions.
    """
    canaries = 3000
    present = np.random.default_rng(1).random(canaries) < 0.5
    where = np.flatnonzero(present)
    total = np.zeros(canaries)
    for start in range(0, where.size, 500):
        part = where[start : start + 500]
        rows = torch.zeros(part.size, canaries)
        rows[torch.arange(part.size), torch.from_numpy(part)] = 4.0 * plan.clip_norm
        total += clipped_sum(gradients, rows, list(range(part.size)), plan.clip_norm)
    got = d_prime(np.asarray(privatise(total), dtype=np.float64), present)
    promised = 1 / plan.site_noise
    error = 5 * math.sqrt(4 / canaries * (1 + promised**2 / 8))
    assert abs(got - promised) < error, f"d' is {got:.2f}, the plan promises {promised:.2f} ± {error:.2f}"


def check_rounding_is_within_the_sensitivity(mechanism: Any, plan: PrivacyPlan) -> None:
    """Neighbours built to round apart on every coordinate stay within `sensitivity_units`."""
    size = plan.dimension
    base = np.full(size, 0.5 - 1e-7) * plan.quantum
    other = base + np.full(size, plan.clip_norm / math.sqrt(size)) + 2e-7 * plan.quantum
    apart = mechanism.quantise(other, plan).astype(np.float64) - mechanism.quantise(base, plan)
    got = float(np.linalg.norm(apart))
    assert got > plan.units_per_clip, "the example does not stress rounding"
    assert got <= plan.sensitivity_units, f"{got} units apart, {plan.sensitivity_units} accounted"


def check_a_purpose_is_drawn_once(sampling: Any) -> None:
    csprng = sampling.Csprng.for_test(1)
    csprng.stream("noise")
    try:
        csprng.stream("noise")
    except Exception as error:
        assert type(error).__name__ == "GeneratorReused"
        return
    raise AssertionError("the same randomness was handed out twice")
