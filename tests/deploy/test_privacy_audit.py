"""The audit's bounds hold for mechanisms of known epsilon, and it notices noise that is missing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.errors import PlanInvalid
from common.privacy.mechanism import Mode, privatise, quantise
from common.privacy.sampling import Csprng
from deploy.local.privacy_audit import (
    canary_audit,
    gaussian_epsilon,
    membership_inference,
    membership_scores,
    one_run_epsilon,
)
from tests.common.privacy.checks import plan_of


def coins(size: int, seed: int) -> Any:
    return np.random.default_rng(seed).random(size) < 0.5


def test_one_run_bound_stays_below_the_true_epsilon_of_randomised_response() -> None:
    """Each answer is right with probability e^eps / (1 + e^eps): the attack is the best there is."""
    true = 2.0
    bounds = []
    for seed in range(20):
        present = coins(2000, seed)
        honest = np.random.default_rng(1000 + seed).random(2000) < 1 / (1 + math.exp(-true))
        scores = np.where(honest == present, 1.0, -1.0) + np.random.default_rng(seed).normal(0, 1e-3, 2000)
        bounds.append(one_run_epsilon(scores, present, delta=0.0))
    assert sum(bound > true for bound in bounds) <= 3  # 95 % confidence
    assert np.median(bounds) > 0.75 * true


def test_one_run_bound_of_useless_scores_is_zero() -> None:
    bounds = [
        one_run_epsilon(np.random.default_rng(s).normal(size=500), coins(500, s), delta=1e-5)
        for s in range(20)
    ]
    assert sum(bound > 0 for bound in bounds) <= 3


def test_delta_can_only_weaken_the_bound() -> None:
    present = coins(1000, 0)
    scores = present * 3.0 + np.random.default_rng(0).normal(size=1000)
    strong, weak = (one_run_epsilon(scores, present, delta=d) for d in (0.0, 1e-3))
    assert strong > weak > 0


def test_gaussian_epsilon_inverts_the_analytic_curve() -> None:
    for mu in (0.5, 1.0, 4.38):
        epsilon = gaussian_epsilon(mu, delta=1e-5)
        delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(
            -mu / 2 - epsilon / mu
        )
        assert delta == pytest.approx(1e-5, rel=1e-3)
    assert gaussian_epsilon(0.0, delta=1e-5) == gaussian_epsilon(-1.0, delta=1e-5) == 0.0
    assert gaussian_epsilon(1e-7, delta=1e-5) == 0.0


def test_membership_of_an_overfitted_model_is_seen_and_of_a_fresh_one_not() -> None:
    draw = np.random.default_rng(3)
    others = draw.normal(0, 1, 800)
    leaky = membership_inference(draw.normal(1.5, 1, 900), others, delta=1e-5)
    fresh = membership_inference(draw.normal(0, 1, 900), others, delta=1e-5)
    assert leaky.auc == pytest.approx(stats.norm.cdf(1.5 / math.sqrt(2)), abs=0.03)
    assert leaky.auc_low > 0.5 and leaky.epsilon_lower > 0.5 and leaky.true_positives_at_1_percent > 0.1
    assert fresh.auc_low < 0.5 < fresh.auc_high
    assert (fresh.members, fresh.others) == (900, 800)


def test_scores_are_how_far_the_loss_fell_in_order_of_patients() -> None:
    before, after = {"b": 2.0, "a": 1.0}, {"a": 0.25, "b": 2.5}
    assert membership_scores(before, after).tolist() == [0.75, -0.5]


PLAN = {
    "sites": 4,
    "dropouts": 1,
    "colluders": 1,
    "sampling_rate": 0.2,
    "rounds": 30,
    "site_noise": 1.0,
    "release_noise": 1.6,
}


def test_canaries_are_as_visible_as_the_plan_promises_and_below_the_claim() -> None:
    site, release = canary_audit(plan_of(**PLAN), Csprng.for_test(4), canaries=1500)
    assert (site.view, release.view) == ("site", "release")
    for audit in (site, release):
        assert audit.consistent
        assert audit.epsilon_lower < audit.epsilon_claimed
        assert audit.epsilon_lower_gaussian < audit.epsilon_claimed
    assert site.d_prime > release.d_prime > 0
    assert site.epsilon_lower_gaussian > 1.0


def test_halved_or_missing_noise_is_noticed() -> None:
    def halved(vector: Any, plan: Any, csprng: Csprng) -> Any:
        return quantise(vector, plan) + (privatise(np.zeros(vector.size), plan, csprng) // 2)

    def missing(vector: Any, plan: Any, csprng: Csprng) -> Any:
        return quantise(vector, plan) + privatise(np.zeros(vector.size), plan, csprng) // 100

    for defect in (halved, missing):
        site, *_ = canary_audit(plan_of(**PLAN), Csprng.for_test(4), canaries=1500, privatised=defect)
        assert not site.consistent
        assert site.d_prime > site.d_prime_promised
    assert site.epsilon_lower > 2.0


def test_local_mode_has_one_view_and_every_local_step_is_replayed() -> None:
    (site,) = canary_audit(
        plan_of(mode=Mode.LOCAL, sites=4, rounds=5, local_steps=4, sampling_rate=0.3),
        Csprng.for_test(1),
        canaries=800,
    )
    assert site.rounds == 20
    assert site.consistent


def test_mode_plain_is_refused() -> None:
    with pytest.raises(PlanInvalid):
        canary_audit(plan_of(mode=Mode.PLAIN, site_noise=0.0, release_noise=0.0), Csprng.for_test(0))
