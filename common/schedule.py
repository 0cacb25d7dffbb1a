"""What each round trains, and how fast: pure functions of the study and the round number (0-based)."""

from __future__ import annotations

import math

from common.config import Schedule, StageName, StageSection, Strategy, Study, TensorGroup
from common.errors import WrongRound


def stage_of(study: Study, round: int) -> tuple[StageSection, int]:
    """Return a round's stage and its 0-based place in it; raises WrongRound outside the study."""
    start = 0
    for stage in study.stage:
        if round < start + stage.rounds:
            if round < 0:
                break
            return stage, round - start
        start += stage.rounds
    raise WrongRound(f"expected a round in 0…{study.rounds - 1}, got {round}")


def active_groups(study: Study, round: int) -> frozenset[TensorGroup]:
    """Return the tensor groups that a round trains.

    The projector is trained every round. In strategy alternating (RoLoRA, arXiv 2502.01755) the rounds of
    a tune stage train B, then A, in turn: B starts at zero, so A has no gradient before B moved.
    """
    stage, place = stage_of(study, round)
    if stage.name is StageName.ALIGN:
        return frozenset({TensorGroup.PROJECTOR})
    if study.adapter.strategy is Strategy.JOINT:
        return frozenset(TensorGroup)
    if study.adapter.strategy is Strategy.FROZEN_A or place % 2 == 0:
        return frozenset({TensorGroup.PROJECTOR, TensorGroup.LORA_B})
    return frozenset({TensorGroup.PROJECTOR, TensorGroup.LORA_A})


def learning_rate(study: Study, round: int) -> float:
    """Return a round's learning rate: linear warm-up, then constant, linear or cosine decay to 5 %."""
    stage, place = stage_of(study, round)
    if place < stage.warmup_rounds:
        return stage.learning_rate * (place + 1) / (stage.warmup_rounds + 1)
    span = max(1, stage.rounds - stage.warmup_rounds)
    done = (place - stage.warmup_rounds) / span
    if stage.schedule is Schedule.LINEAR:
        factor = max(0.05, 1.0 - done)
    elif stage.schedule is Schedule.COSINE:
        factor = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        factor = 1.0
    return stage.learning_rate * factor
