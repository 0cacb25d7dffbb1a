"""The plan: what it refuses, what runs from it, what is accounted from it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client import gradients
from common.canonical import canonical_json, parse_canonical
from common.errors import PlanInvalid
from common.privacy import mechanism
from common.privacy.accounting import epsilon_pld
from common.privacy.mechanism import (
    Mode,
    PrivacyPlan,
    ServedRound,
    View,
    calibrate,
    dequantise,
    privatise,
    quantise,
    top_up,
)
from common.privacy.sampling import Csprng
from tests.common.privacy import checks
from tests.common.privacy.checks import plan_of

CONSORTIUM = {"sites": 10, "colluders": 2, "dropouts": 3, "site_noise": 1.0, "release_noise": 1.5}


# --- what runs --------------------------------------------------------------------------------------------


def test_a_sites_noise_has_the_planned_width_and_shape() -> None:
    plan = plan_of(**CONSORTIUM)
    checks.check_noise_width(lambda v: privatise(v, plan, Csprng.for_test(1)), plan.site_share_sigma_units)


def test_shares_of_the_certain_sites_add_up_to_the_sites_guarantee() -> None:
    plan = plan_of(**CONSORTIUM)
    total = math.sqrt(plan.honest_floor) * plan.site_share_sigma_units
    assert plan.honest_floor == 5
    assert total == pytest.approx(1.0 * plan.sensitivity_units, rel=1e-9)
    assert total >= 1.0 * plan.sensitivity_units


@pytest.mark.parametrize("survivors", [7, 8, 10])
def test_the_server_tops_up_to_the_release_guarantee_whoever_survives(survivors: int) -> None:
    plan = plan_of(**CONSORTIUM)
    honest = (survivors - plan.colluders) * plan.site_share_sigma_units**2
    total = math.sqrt(honest + plan.server_topup_sigma_units(survivors) ** 2)
    assert total == pytest.approx(1.5 * plan.sensitivity_units, rel=1e-9)
    assert total >= 1.5 * plan.sensitivity_units


def test_noise_measured_on_a_whole_round_has_the_widths_of_both_guarantees() -> None:
    """Seven of ten sites answer; two of them know their own share."""
    plan = plan_of(**CONSORTIUM, dimension=60_000)
    shares = [privatise(np.zeros(60_000), plan, Csprng.for_test(site)).astype(np.int64) for site in range(7)]
    unmasked = np.sum(shares, axis=0)
    released = top_up(unmasked.astype(np.int32), plan, Csprng.for_test(99), survivors=7)
    known = shares[0] + shares[1]
    checks.check_noise_width(lambda _: unmasked - known, 1.0 * plan.sensitivity_units, 60_000)
    checks.check_noise_width(lambda _: released - known, 1.5 * plan.sensitivity_units, 60_000)


def test_no_top_up_is_added_when_the_sites_noise_is_enough() -> None:
    plan = plan_of(**(CONSORTIUM | {"release_noise": 1.0}))
    assert plan.server_topup_sigma_units(7) == 0.0
    total = np.arange(5, dtype=np.int32)
    assert np.array_equal(top_up(total, plan, Csprng.for_test(0), survivors=7), total)


def test_mode_local_noises_fully_at_each_site_and_mode_plain_not_at_all() -> None:
    local = plan_of(mode=Mode.LOCAL, sites=5, local_steps=4)
    assert local.site_share_sigma_units == pytest.approx(local.sensitivity_units, rel=1e-9)
    assert local.server_topup_sigma_units(5) == 0.0
    plain = plan_of(mode=Mode.PLAIN, sites=5, site_noise=0.0, release_noise=0.0)
    vector = np.linspace(-0.5, 0.5, 11)
    assert np.array_equal(privatise(vector, plain, Csprng.for_test(0)), quantise(vector, plain))
    assert plain.epsilon(View.SITE) == plain.epsilon(View.RELEASE) == math.inf


def test_canaries_are_as_hidden_as_planned() -> None:
    plan = plan_of()
    checks.check_canaries_are_as_hidden_as_planned(
        gradients, lambda total: privatise(total, plan, Csprng.for_test(5)), plan
    )


def test_rounding_is_within_the_sensitivity() -> None:
    for dimension, units in ((100_000, 1 << 14), (50_000, 1 << 20), (3, 1 << 10)):
        plan = plan_of(dimension=dimension, units_per_clip=units)
        if dimension > 3:
            checks.check_rounding_is_within_the_sensitivity(mechanism, plan)


VECTORS = hnp.arrays(np.float64, 40, elements=st.floats(-30, 30))


@given(VECTORS, VECTORS)
def test_neighbours_stay_within_the_sensitivity_after_rounding_and_clamping(
    base: np.ndarray, direction: np.ndarray
) -> None:
    plan = plan_of(dimension=40, units_per_clip=1 << 10, clip_norm=0.01)
    norm = np.linalg.norm(direction)
    neighbour = base + direction * (0.01 / norm if norm > 0 else 0.0)
    apart = quantise(neighbour, plan).astype(float) - quantise(base, plan)
    assert np.linalg.norm(apart) <= plan.sensitivity_units


@given(VECTORS)
def test_dequantised_values_are_within_half_a_unit(vector: np.ndarray) -> None:
    plan = plan_of(dimension=40, clip_norm=0.5)
    back = dequantise(quantise(vector, plan), plan)
    assert np.abs(back - vector).max() <= plan.quantum * 0.5000001


@pytest.mark.parametrize(("sites", "noise"), [(1, 1.0), (7, 8.0), (60, 0.5)])
def test_sums_of_clamped_contributions_never_wrap(sites: int, noise: float) -> None:
    plan = plan_of(sites=sites, dimension=64, site_noise=noise, release_noise=noise)
    extreme = np.full(64, 1e12)
    parts = [privatise(extreme, plan, Csprng.for_test(site)) for site in range(sites)]
    wrapped = np.sum([part.astype(np.uint32) for part in parts], axis=0, dtype=np.uint32).view(np.int32)
    assert np.array_equal(wrapped, np.sum(parts, axis=0, dtype=np.int64))


def test_a_vector_that_is_too_long_not_flat_or_not_finite_is_refused() -> None:
    plan = plan_of(dimension=4)
    for bad in (np.zeros(5), np.zeros((2, 2)), np.array([1.0, np.nan]), np.array([np.inf])):
        with pytest.raises(PlanInvalid):
            quantise(bad, plan)


# --- what is accounted ------------------------------------------------------------------------------------


def test_calibration_meets_both_targets_and_reproduces_the_notes() -> None:
    """Sites at 1.032 give epsilon 8 against the server; a server top-up of 1.185 gives 4 for the release."""
    plan = calibrate(
        target_site_epsilon=8.0,
        target_release_epsilon=4.0,
        mode=Mode.CONSORTIUM,
        sites=5,
        patients=100_000,
        sampling_rate=0.05,
        studies_per_patient=2,
        clip_norm=1.0,
        dimension=20_000_000,
        rounds=500,
        delta=1e-6,
    )
    assert plan.site_noise == pytest.approx(1.032, abs=2e-3)
    assert math.sqrt(plan.release_noise**2 - plan.site_noise**2) == pytest.approx(1.185, abs=4e-3)
    assert 7.98 < plan.epsilon(View.SITE) <= 8.0
    assert 3.99 < plan.epsilon(View.RELEASE) <= 4.0
    plan.verify_accounting()


def test_calibration_without_a_release_target_or_with_a_weak_one_needs_no_server_noise() -> None:
    fields = {k: v for k, v in plan_of().__dict__.items() if k not in ("site_noise", "release_noise")}
    alone = calibrate(target_site_epsilon=4.0, **fields)
    weak = calibrate(target_site_epsilon=4.0, target_release_epsilon=20.0, **fields)
    assert alone == weak
    assert alone.release_noise == alone.site_noise


def test_calibration_refuses_the_impossible() -> None:
    fields = {k: v for k, v in plan_of().__dict__.items() if k not in ("site_noise", "release_noise")}
    for target in (0.0, -1.0, math.inf, 1e-9):
        with pytest.raises(PlanInvalid):
            calibrate(target_site_epsilon=target, **fields)
    with pytest.raises(PlanInvalid):
        calibrate(target_site_epsilon=8.0, **(fields | {"mode": Mode.PLAIN}))


def test_the_event_is_the_planned_mechanism() -> None:
    plan = plan_of(spare_rounds=3)
    poisson = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    assert plan.event(View.SITE) == dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(poisson, 13)]
    )
    assert plan.event(View.RELEASE) == dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(poisson, 10)]
    )


def test_rounds_are_accounted_as_they_happened() -> None:
    plan = plan_of(**CONSORTIUM, rounds=20)
    assert plan.round_noise(View.SITE, ServedRound(7)) == pytest.approx(1.0, rel=1e-9)
    assert plan.round_noise(View.SITE, ServedRound(10)) == pytest.approx(math.sqrt(8 / 5), rel=1e-9)
    topped = [ServedRound(n, plan.server_topup_sigma_units(n)) for n in (7, 10)]
    for served in topped:
        assert plan.round_noise(View.RELEASE, served) == pytest.approx(1.5, rel=1e-9)
    dead = ServedRound(None)
    assert plan.round_noise(View.SITE, dead) == 1.0
    happened = [topped[0], topped[1], dead, *[topped[1]] * 17]
    history = plan.served(View.SITE, happened)
    assert sum(r.count for r in history) == 20
    assert plan.epsilon(View.SITE, happened) < plan.epsilon(View.SITE)
    assert plan.epsilon(View.RELEASE, topped * 10) == pytest.approx(plan.epsilon(View.RELEASE), rel=1e-3)


def test_a_server_that_adds_less_than_planned_is_accounted_for_what_it_added() -> None:
    plan = plan_of(**CONSORTIUM)
    silent = [ServedRound(7, 0.0)] * 10
    assert plan.epsilon(View.RELEASE, silent) == pytest.approx(
        epsilon_pld(plan_of(site_noise=1.0).planned(View.SITE), delta=plan.delta), rel=1e-6
    )


def test_local_steps_are_each_accounted() -> None:
    plan = plan_of(mode=Mode.LOCAL, sites=5, local_steps=4, rounds=3)
    assert plan.planned(View.SITE)[0].count == 12
    assert plan.served(View.SITE, [ServedRound(None)] * 3) == plan.planned(View.SITE)


def test_survivors_outside_the_plan_are_refused() -> None:
    plan = plan_of(**CONSORTIUM)
    for survivors in (6, 11):
        with pytest.raises(PlanInvalid, match="surviving"):
            plan.server_topup_sigma_units(survivors)
        with pytest.raises(PlanInvalid, match="surviving"):
            plan.round_noise(View.SITE, ServedRound(survivors))


def test_denominator_is_a_public_constant() -> None:
    assert plan_of().denominator == 50.0


# --- form -------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.floats(0.001, 1.0),
    st.floats(1e-3, 1e3),
    st.floats(0.3, 20.0),
    st.sampled_from([0, 1.0]),
)
def test_a_plan_survives_canonical_json(
    sites: int, rate: float, clip: float, noise: float, more: float
) -> None:
    plan = plan_of(
        sites=sites, sampling_rate=rate, clip_norm=clip, site_noise=noise, release_noise=noise + more
    )
    data = canonical_json(plan.to_json())
    assert PrivacyPlan.from_json(parse_canonical(data, max_bytes=10_000)) == plan
    assert PrivacyPlan.from_json(json.loads(data)) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"mode": "mixed"},
        {"unit": "record"},
        {"neighbours": "replace"},
        {"clip_norm": "0.5"},
        {"rounds": 2.5},
        {"rounds": True},
        {"delta": None},
    ],
)
def test_a_malformed_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanInvalid):
        PrivacyPlan.from_json(plan_of().to_json() | change)
    with pytest.raises(PlanInvalid):
        PrivacyPlan.from_json([])
    short = plan_of().to_json()
    del short["delta"]
    with pytest.raises(PlanInvalid):
        PrivacyPlan.from_json(short)


@pytest.mark.parametrize(
    "change",
    [
        {"sites": 0},
        {"sites": 3, "colluders": 2, "dropouts": 1},
        {"colluders": -1},
        {"patients": 0},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"studies_per_patient": 0},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"dimension": 0},
        {"rounds": 0},
        {"delta": 1.01e-4},  # above 1 / (10 * 1000 patients)
        {"delta": 0.0},
        {"site_noise": 0.0, "release_noise": 0.0},
        {"site_noise": 2.0},  # release below sites
        {"mode": Mode.PLAIN},
        {"mode": Mode.LOCAL, "release_noise": 2.0},
        {"local_steps": 2},
        {"units_per_clip": 1 << 30},
        {"sites": 2000},
        {"units_per_clip": 16, "dimension": 4},
        {"mode": "consortium"},
    ],
)
def test_an_impossible_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanInvalid):
        plan_of(**change)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of().site_noise = 0.1  # type: ignore[misc]
