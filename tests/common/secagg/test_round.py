"""Whole rounds: the unmasked sum is the plain sum, whoever drops out whenever, or there is none at all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CohortTooSmall
from common.secagg.context import threshold
from tests.common.secagg.consortium import Consortium, Drop, consortium, exact_sum, run_round


def check(world: Consortium, drops: dict[str, Drop]) -> bool:
    """Run a round; check that it gives the exact sum just when enough sites stay; say whether it did."""
    stay = {stage: sum(drop > stage for drop in drops.values()) for stage in Drop}
    quorum = max(threshold(stay[Drop.BEFORE_KEYS]), world.terms.floor)
    enough = (
        stay[Drop.BEFORE_KEYS] >= world.terms.floor
        and stay[Drop.BEFORE_UPLOAD] >= quorum
        and stay[Drop.BEFORE_REVEAL] >= threshold(stay[Drop.BEFORE_KEYS])
    )
    if not enough:
        with pytest.raises(CohortTooSmall):
            run_round(world, drops)
        return False
    round, out = run_round(world, drops)
    survivors = [site for site, drop in drops.items() if drop > Drop.BEFORE_UPLOAD]
    np.testing.assert_array_equal(out, exact_sum(round.vectors, survivors))
    return True


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_dropout_pattern_gives_the_exact_sum_or_none(count: int) -> None:
    world = consortium(count)
    patterns = [dict(zip(world.sites, drops, strict=True)) for drops in product(Drop, repeat=count)]
    summed = [check(world, drops) for drops in patterns]
    assert any(summed) and not all(summed)


@pytest.mark.slow
def test_every_dropout_pattern_of_five_sites_gives_the_exact_sum_or_none() -> None:
    world = consortium(5, floor=3)
    for drops in product(Drop, repeat=5):
        check(world, dict(zip(world.sites, drops, strict=True)))


@pytest.mark.parametrize(
    "stage", [Drop.BEFORE_KEYS, Drop.BEFORE_SHARES, Drop.BEFORE_UPLOAD, Drop.BEFORE_REVEAL]
)
@pytest.mark.parametrize("gone", range(5))
def test_five_sites_survive_any_one_dropping_out_at_any_stage(stage: Drop, gone: int) -> None:
    world = consortium(5)
    drops = dict.fromkeys(world.sites, Drop.NEVER) | {world.sites[gone]: stage}
    assert check(world, drops)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*Drop, *[Drop.NEVER] * 8]), min_size=10, max_size=10))
def test_ten_sites_give_the_exact_sum_or_none(drops: list[Drop]) -> None:
    world = consortium(10, floor=5)
    check(world, dict(zip(world.sites, drops, strict=True)))


@settings(max_examples=2, deadline=None)
@given(st.sets(st.integers(0, 49), max_size=16), st.sampled_from(list(Drop)[2:4]))
def test_fifty_sites_with_up_to_a_third_gone_give_the_exact_sum(gone: set[int], stage: Drop) -> None:
    world = consortium(50)
    drops = {site: stage if i in gone else Drop.NEVER for i, site in enumerate(world.sites)}
    assert check(world, drops)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*Drop, *[Drop.NEVER] * 16]), min_size=50, max_size=50))
def test_fifty_sites_give_the_exact_sum_or_none(drops: list[Drop]) -> None:
    world = consortium(50, floor=20)
    check(world, dict(zip(world.sites, drops, strict=True)))


def test_sum_of_a_vector_longer_than_several_chunks_is_exact() -> None:
    world = consortium(3, length=(1 << 21) + 12_345)
    round, out = run_round(world)
    np.testing.assert_array_equal(out, exact_sum(round.vectors, world.sites))


def test_masked_uploads_look_nothing_like_their_vectors() -> None:
    world = consortium(3, length=100_000)
    round, _ = run_round(world)
    for site in world.sites:
        difference = (round.masked[site] - round.vectors[site]).view(np.uint8)
        counts = np.bincount(difference, minlength=256)
        expected = difference.size / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 255 + 6 * np.sqrt(2 * 255), "mask bytes are not uniform"


def test_two_rounds_of_the_same_sites_have_unrelated_masks() -> None:
    first, _ = run_round(consortium(3, length=1000, round=7))
    second, _ = run_round(consortium(3, length=1000, round=8))
    for site in first.masked:
        masks = [r.masked[site] - r.vectors[site] for r in (first, second)]
        assert np.count_nonzero(masks[0] == masks[1]) <= 1
