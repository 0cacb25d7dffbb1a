"""What each round trains, and how fast."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from common.config import Schedule, StageName, StageSection, Strategy, Study, TensorGroup, parse_study_toml
from common.errors import WrongRound
from common.schedule import active_groups, learning_rate, stage_of
from tests.simulator import study_text

PROJECTOR, A, B = TensorGroup.PROJECTOR, TensorGroup.LORA_A, TensorGroup.LORA_B


def study(strategy: Strategy = Strategy.ALTERNATING, schedule: Schedule = Schedule.COSINE) -> Study:
    parsed = parse_study_toml(study_text())
    stages = (
        StageSection(StageName.ALIGN, 3, 0.1, schedule, warmup_rounds=2),
        StageSection(StageName.TUNE, 10, 0.01, schedule),
    )
    return replace(parsed, stage=stages, adapter=replace(parsed.adapter, strategy=strategy))


def test_rounds_fall_into_their_stages() -> None:
    places = [(stage_of(study(), r)[0].name, stage_of(study(), r)[1]) for r in (0, 2, 3, 12)]
    assert places == [
        (StageName.ALIGN, 0), (StageName.ALIGN, 2), (StageName.TUNE, 0), (StageName.TUNE, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("round", [-1, 13, 10_000])
def test_a_round_outside_the_study_is_refused(round: int) -> None:
    with pytest.raises(WrongRound):
        stage_of(study(), round)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_align_trains_the_projector_only(strategy: Strategy) -> None:
    assert active_groups(study(strategy), 1) == {PROJECTOR}


def test_alternating_trains_b_then_a_in_turn() -> None:
    groups = [active_groups(study(), r) for r in range(3, 7)]
    assert groups == [{PROJECTOR, B}, {PROJECTOR, A}, {PROJECTOR, B}, {PROJECTOR, A}]


def test_frozen_a_never_trains_a_and_joint_trains_all() -> None:
    assert all(A not in active_groups(study(Strategy.FROZEN_A), r) for r in range(13))
    assert all(active_groups(study(Strategy.JOINT), r) == {PROJECTOR, A, B} for r in range(3, 13))


def test_the_rate_warms_up_in_equal_steps() -> None:
    assert [learning_rate(study(), r) for r in range(2)] == pytest.approx([0.1 / 3, 0.2 / 3])
    assert learning_rate(study(), 2) == pytest.approx(0.1)


def test_a_constant_rate_stays_and_the_others_fall_to_a_twentieth_at_least() -> None:
    for schedule in Schedule:
        rates = [learning_rate(study(schedule=schedule), r) for r in range(3, 13)]
        assert rates[0] == pytest.approx(0.01)
        assert rates == sorted(rates, reverse=True)
        assert min(rates) >= 0.05 * 0.01
    constant = [learning_rate(study(schedule=Schedule.CONSTANT), r) for r in range(3, 13)]
    assert set(constant) == {0.01}


def test_cosine_is_halfway_down_in_the_middle() -> None:
    assert learning_rate(study(), 8) == pytest.approx(0.01 * (0.05 + 0.95 / 2))


def test_linear_falls_by_equal_steps() -> None:
    rates = [learning_rate(study(schedule=Schedule.LINEAR), r) for r in range(3, 12)]
    assert [a - b for a, b in pairwise(rates)] == pytest.approx([0.001] * 8)
