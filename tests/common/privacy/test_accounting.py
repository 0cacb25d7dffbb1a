"""Epsilon: known values, two accountants, rounds as they happened."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AccountantsDisagree, PlanInvalid
from common.privacy.accounting import (
    SampledGaussian,
    bucketed,
    dp_event,
    epsilon_pld,
    epsilon_prv,
    verify_accountants_agree,
)

NOTES = (SampledGaussian(0.05, 1.0, 500),)


def test_published_figure_is_reproduced() -> None:
    assert epsilon_pld(NOTES, delta=1e-6) == pytest.approx(8.49, abs=0.02)
    assert epsilon_prv(NOTES, delta=1e-6) == pytest.approx(8.49, abs=0.02)
    verify_accountants_agree(NOTES, delta=1e-6)


def test_full_batch_gaussian_matches_the_analytic_curve() -> None:
    """Balle & Wang (ICML 2018): delta of a Gaussian mechanism with mu = sqrt(rounds) / noise."""
    from scipy.stats import norm

    mu = math.sqrt(10) / 10.0
    epsilon = epsilon_pld([SampledGaussian(1.0, 10.0, 10)], delta=1e-6, discretisation=1e-4)
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-6, rel=2e-3)


def test_pld_is_below_renyi_and_above_nothing() -> None:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    accountant.compose(dp_event(NOTES))
    renyi = accountant.get_epsilon(1e-6)
    assert renyi == pytest.approx(9.26, abs=0.02)
    assert 0.85 * renyi < epsilon_pld(NOTES, delta=1e-6) < renyi


def test_rounds_with_unequal_noise_are_composed() -> None:
    mixed = [SampledGaussian(0.05, 1.0, 250), SampledGaussian(0.05, 1.3, 250)]
    value = epsilon_pld(mixed, delta=1e-6)
    low, high = (epsilon_pld([SampledGaussian(0.05, s, 500)], delta=1e-6) for s in (1.3, 1.0))
    assert low < value < high
    verify_accountants_agree(mixed, delta=1e-6)


def test_many_widths_are_bucketed_towards_more_epsilon_by_under_two_percent() -> None:
    rounds = [SampledGaussian(0.05, 1.0 + 0.002 * i, 2) for i in range(100)]
    assert len(bucketed(rounds)) < 45
    value = epsilon_pld(rounds, delta=1e-6)
    exact = epsilon_pld([SampledGaussian(0.05, 1.1, 200)], delta=1e-6)
    assert exact * 0.99 < value < exact * 1.03


@given(st.lists(st.tuples(st.floats(0.3, 50.0), st.integers(1, 9)), min_size=1, max_size=60))
def test_bucketing_never_loses_a_round_nor_raises_noise(rounds: list[tuple[float, int]]) -> None:
    history = [SampledGaussian(0.1, noise, count) for noise, count in rounds]
    result = bucketed(history)
    assert sum(r.count for r in result) == sum(r.count for r in history)
    before = sorted(r.noise_multiplier for r in history for _ in range(r.count))
    after = sorted(r.noise_multiplier for r in result for _ in range(r.count))
    assert all(a <= b and a > b * 0.9949 for a, b in zip(after, before, strict=True))


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([0.01, 0.05, 0.3]), st.floats(0.9, 4.0), st.integers(5, 100))
def test_more_rounds_cost_more_and_more_noise_costs_less(rate: float, noise: float, count: int) -> None:
    here = epsilon_pld([SampledGaussian(rate, noise, count)], delta=1e-5)
    assert epsilon_pld([SampledGaussian(rate, noise, 2 * count)], delta=1e-5) > here
    assert epsilon_pld([SampledGaussian(rate, 1.2 * noise, count)], delta=1e-5) < here


@pytest.mark.parametrize(
    "history",
    [
        (SampledGaussian(0.05, 1.5, 200),),
        (SampledGaussian(0.3, 3.0, 100),),
        (SampledGaussian(1.0, 10.0, 10),),
        (SampledGaussian(0.01, 0.8, 1000),),
        (SampledGaussian(0.02, 4.0, 20),),
    ],
)
def test_accountants_agree_over_the_range_of_studies(history: tuple[SampledGaussian, ...]) -> None:
    verify_accountants_agree(history, delta=1e-6)


def test_accountants_that_differ_stop_the_study() -> None:
    with pytest.raises(AccountantsDisagree, match="apart"):
        verify_accountants_agree(NOTES, delta=1e-6, tolerance=1e-5)


def test_an_accountant_without_an_answer_is_a_disagreement() -> None:
    with pytest.raises(AccountantsDisagree, match="no epsilon"):
        epsilon_prv(NOTES, delta=1e-17)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon_pld([], delta=1e-6) == 0.0
    assert epsilon_pld([SampledGaussian(0.1, 1.0, 0)], delta=1e-6) == 0.0
    none = [SampledGaussian(0.1, 0.0, 1)]
    assert epsilon_pld(none, delta=1e-6) == epsilon_prv(none, delta=1e-6) == math.inf
    verify_accountants_agree(none, delta=1e-6)


def test_values_out_of_range_are_refused() -> None:
    for bad in ((0.0, 1.0, 1), (1.5, 1.0, 1), (0.1, -1.0, 1), (0.1, math.nan, 1), (0.1, 1.0, -1)):
        with pytest.raises(PlanInvalid):
            SampledGaussian(*bad)
    for delta in (0.0, 1.0):
        with pytest.raises(PlanInvalid, match="delta"):
            epsilon_pld(NOTES, delta=delta)
