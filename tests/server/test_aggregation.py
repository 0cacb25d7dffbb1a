"""From sums to one averaged gradient."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import AdapterInvalid, SumOutOfRange
from common.model.lora import group_mask, vector_size, vector_to_bytes
from common.privacy.study_plan import plan_of
from common.schedule import active_groups
from server.aggregation import Collected, parse_floats, parse_units, protect, sum_range
from tests.simulator import Consortium, build


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("plain"), mode="plain")


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("consortium"), mode="consortium")


def size(world: Consortium) -> int:
    return vector_size(world.study.adapter.tensors)


@pytest.mark.parametrize("extra", [-4, 4, -1])
def test_a_contribution_of_another_length_is_refused_with_its_site(plain: Consortium, extra: int) -> None:
    blob = memoryview(bytes(4 * size(plain) + extra))
    with pytest.raises(AdapterInvalid, match="beta"):
        parse_floats(blob, study=plain.study, site="beta")
    with pytest.raises(AdapterInvalid, match="beta"):
        parse_units(blob, length=size(plain), site="beta")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_contribution_that_is_no_number_is_refused_with_its_site(plain: Consortium, value: float) -> None:
    values = np.zeros(size(plain), np.float32)
    values[-1] = value
    with pytest.raises(AdapterInvalid, match="beta"):
        parse_floats(memoryview(vector_to_bytes(values)), study=plain.study, site="beta")


def test_a_plain_average_divides_by_the_public_denominator_whoever_is_missing(plain: Consortium) -> None:
    one = np.arange(size(plain), dtype=np.float32)
    sums = {"beta": one, "alpha": 2 * one}
    got = protect(plain.study, Collected(dict.fromkeys(sums, ""), {}, floats=sums), round=0)
    np.testing.assert_allclose(got.gradient, 3 * one / 20.0, rtol=1e-6)  # 0.5 of 40 patients
    assert (got.site_share_sigma_units, got.server_sigma_units) == (0.0, 0.0)


def test_floats_are_added_in_order_of_site_whatever_order_they_came_in(plain: Consortium) -> None:
    generator = np.random.default_rng(0)
    sums = {s: (1e6 * generator.standard_normal(size(plain))).astype(np.float32) for s in "abcd"}
    back = dict(reversed(sums.items()))
    one = protect(plain.study, Collected({}, {}, floats=sums), round=0).gradient
    assert np.array_equal(one, protect(plain.study, Collected({}, {}, floats=back), round=0).gradient)


def of_units(world: Consortium, units: npt.NDArray[np.int32]) -> Collected:
    return Collected(dict.fromkeys(world.study.site_ids, ""), {}, units=units.view(np.uint32))


def first_trained(world: Consortium) -> int:
    return int(np.flatnonzero(group_mask(world.study.adapter.tensors, active_groups(world.study, 0)))[0])


def test_units_come_out_dequantised_and_noised_where_the_round_trains(consortium: Consortium) -> None:
    study, plan = consortium.study, plan_of(consortium.study)
    units = np.zeros(size(consortium), np.int32)
    place = first_trained(consortium)
    units[place] = 70 * round(plan.units_per_clip)
    trained = group_mask(study.adapter.tensors, active_groups(study, 0))
    got = protect(study, of_units(consortium, units), round=0)
    noise = got.server_sigma_units * plan.quantum / study.training.denominator
    wanted = 70 * plan.clip_norm / study.training.denominator
    assert not got.gradient[~trained].any()
    assert got.gradient[place] == pytest.approx(wanted, abs=8 * noise)
    assert got.server_sigma_units == plan.server_topup_sigma_units(4)
    others = np.delete(got.gradient[trained], 0)
    assert others.std() == pytest.approx(noise, rel=0.05)


def test_negative_sums_modulo_2_32_come_out_negative(consortium: Consortium) -> None:
    units = np.zeros(size(consortium), np.int32)
    units[first_trained(consortium)] = -70 * plan_of(consortium.study).units_per_clip
    got = protect(consortium.study, of_units(consortium, units), round=0)
    assert got.gradient[first_trained(consortium)] < 0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_coordinate_that_no_honest_sum_reaches_is_refused(consortium: Consortium, sign: int) -> None:
    plan = plan_of(consortium.study)
    limit = sum_range(plan, dimension=size(consortium), survivors=4)
    units = np.zeros(size(consortium), np.int32)
    units[first_trained(consortium)] = sign * round(limit.coordinate_units + 9 * plan.site_share_sigma_units)
    with pytest.raises(SumOutOfRange, match="coordinate"):
        protect(consortium.study, of_units(consortium, units), round=0)


def test_a_sum_whose_norm_no_honest_sum_reaches_is_refused_though_each_coordinate_is_small(
    consortium: Consortium,
) -> None:
    plan = plan_of(consortium.study)
    trained = group_mask(consortium.study.adapter.tensors, active_groups(consortium.study, 0))
    limit = sum_range(plan, dimension=int(trained.sum()), survivors=4)
    units = np.zeros(size(consortium), np.int32)
    units[trained] = round(1.1 * limit.norm_units / trained.sum() ** 0.5)
    assert units.max() < limit.coordinate_units
    with pytest.raises(SumOutOfRange, match="norm"):
        protect(consortium.study, of_units(consortium, units), round=0)


def test_the_range_grows_with_clip_patients_and_noise_as_the_documents_say(consortium: Consortium) -> None:
    plan = plan_of(consortium.study)
    sigma = (4 * plan.site_share_sigma_units**2 + plan.server_topup_sigma_units(4) ** 2) ** 0.5
    clips = (40 + 6 * 40**0.5 + 6) * plan.sensitivity_units  # twice 0.5 of 40 patients
    limit = sum_range(plan, dimension=10_000, survivors=4)
    assert limit.coordinate_units == pytest.approx(clips + 8 * sigma)
    assert limit.norm_units == pytest.approx(clips + 108 * sigma)
