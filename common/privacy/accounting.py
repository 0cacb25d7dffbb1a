"""What rounds cost: epsilon of a history of Poisson-sampled Gaussian releases, by two accountants.

The accountants are Google's privacy-loss distributions (dp-accounting) and Opacus's privacy random variables
(Gopi, Lee & Wutschitz, NeurIPS 2021). They share no code. Neighbouring data sets differ by adding or removing
one patient. Published values come from the first; the second must agree before a study may start.

It does not know what happened: a history is only as true as the rounds that it lists.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.errors import AccountantsDisagree, PlanInvalid

DISCRETISATION = 1e-3
AGREEMENT = 0.02
_MAX_DISTINCT = 16
_BUCKET_RATIO = 1.005


@dataclass(frozen=True, order=True)
class SampledGaussian:
    """`count` releases of a Poisson sample at `sampling_rate`, noise `noise_multiplier` * sensitivity."""

    sampling_rate: float
    noise_multiplier: float
    count: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise PlanInvalid(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise PlanInvalid(
                f"noise_multiplier must be finite and not negative, got {self.noise_multiplier}"
            )
        if self.count < 0:
            raise PlanInvalid(f"count must not be negative, got {self.count}")


History = tuple[SampledGaussian, ...]


def bucketed(rounds: Iterable[SampledGaussian]) -> History:
    """Merge equal rounds; with more than 16 distinct widths, round them down by at most 0.5 %.

    Rounding down can only raise epsilon.
    """
    merged = _merged(rounds)
    if len(merged) <= _MAX_DISTINCT:
        return merged
    return _merged(
        SampledGaussian(r.sampling_rate, _floor_to_bucket(r.noise_multiplier), r.count) for r in merged
    )


def _floor_to_bucket(multiplier: float) -> float:
    if multiplier == 0:
        return 0.0
    floor: float = _BUCKET_RATIO ** math.floor(math.log(multiplier, _BUCKET_RATIO))
    return min(floor, multiplier)


def _merged(rounds: Iterable[SampledGaussian]) -> History:
    counts: dict[tuple[float, float], int] = {}
    for r in rounds:
        if r.count:
            key = (r.sampling_rate, r.noise_multiplier)
            counts[key] = counts.get(key, 0) + r.count
    return tuple(SampledGaussian(rate, noise, count) for (rate, noise), count in sorted(counts.items()))


def dp_event(rounds: Iterable[SampledGaussian]) -> Any:
    """The history as a `dp_accounting.DpEvent`."""
    import dp_accounting

    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(
                    r.sampling_rate, dp_accounting.GaussianDpEvent(r.noise_multiplier)
                ),
                r.count,
            )
            for r in rounds
        ]
    )


def epsilon_pld(
    rounds: Iterable[SampledGaussian], *, delta: float, discretisation: float = DISCRETISATION
) -> float:
    """Epsilon by privacy-loss distributions, rounded up by the discretisation; infinite without noise."""
    history = bucketed(rounds)
    trivial = _trivial(history, delta)
    return _pld(history, delta, discretisation) if trivial is None else trivial


@lru_cache(maxsize=256)  # a budget asks the same question at every charge
def _pld(history: History, delta: float, discretisation: float) -> float:
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=discretisation)
    accountant.compose(dp_event(history))
    return float(accountant.get_epsilon(delta))


def epsilon_prv(rounds: Iterable[SampledGaussian], *, delta: float, error: float = 0.01) -> float:
    """Epsilon by Opacus's PRV accountant, an upper bound at most 2 * `error` above the true value."""
    history = bucketed(rounds)
    trivial = _trivial(history, delta)
    if trivial is not None:
        return trivial
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sampling_rate, r.count) for r in history]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, FloatingPointError) as problem:
        raise AccountantsDisagree(f"the PRV accountant gave no epsilon: {problem}") from problem


def _trivial(history: History, delta: float) -> float | None:
    if not 0 < delta < 1:
        raise PlanInvalid(f"delta must be in (0, 1), got {delta}")
    if not history:
        return 0.0
    if any(r.noise_multiplier == 0 for r in history):
        return math.inf
    return None


def verify_accountants_agree(
    rounds: Iterable[SampledGaussian], *, delta: float, tolerance: float = AGREEMENT
) -> None:
    """Raise AccountantsDisagree when the two epsilons differ by more than `tolerance` of the larger."""
    history = tuple(rounds)
    first = epsilon_pld(history, delta=delta)
    if first in (0.0, math.inf):
        return
    second = epsilon_prv(history, delta=delta, error=min(0.01, AGREEMENT * first / 8))
    if not abs(first - second) <= tolerance * max(first, second):
        raise AccountantsDisagree(
            f"epsilon by PLD is {first:.4f} and by PRV {second:.4f}, more than {tolerance:.0%} apart"
        )
