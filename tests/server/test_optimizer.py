"""The server's step against torch.optim on the same gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.config import OptimizerName, OptimizerSection, Study, TensorGroup, TensorSpec, parse_study_toml
from common.model.lora import group_mask
from common.schedule import active_groups
from server.optimizer import initial_state, take_step
from tests.simulator import study_text

TENSORS = (
    TensorSpec("p", (3, 2), TensorGroup.PROJECTOR),
    TensorSpec("a", (2, 4), TensorGroup.LORA_A),
    TensorSpec("b", (5,), TensorGroup.LORA_B),
)
ALL = frozenset(TensorGroup)


def study(**optimizer: Any) -> Study:
    parsed = parse_study_toml(study_text(rounds=40))
    return replace(
        parsed,
        adapter=replace(parsed.adapter, tensors=TENSORS),
        optimizer=OptimizerSection(**optimizer),
    )


def gradients(count: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    generator = np.random.default_rng(4)
    return [generator.standard_normal(19).astype(np.float32) for _ in range(count)]


def torch_optimizer(of: OptimizerSection, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    if of.name is OptimizerName.ADAM:
        return torch.optim.Adam([parameter], lr=0.05, betas=(of.beta1, of.beta2), eps=of.epsilon)
    return torch.optim.SGD([parameter], lr=0.05, momentum=of.momentum)


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta1": 0.0, "beta2": 0.5, "epsilon": 1e-3}, {"name": OptimizerName.SGD},
     {"name": OptimizerName.SGD, "momentum": 0.9}],
)  # fmt: skip
def test_it_equals_torch_with_one_optimizer_per_group(settings: dict[str, Any]) -> None:
    """A group's moments and step count move only in rounds that train it."""
    of = study(**settings)
    start = np.random.default_rng(1).standard_normal(19).astype(np.float32)
    vector, state = start, initial_state(of)
    masks = {group: group_mask(TENSORS, frozenset({group})) for group in TensorGroup}
    parameters = {g: torch.nn.Parameter(torch.from_numpy(start[mask].copy())) for g, mask in masks.items()}
    optimizers = {group: torch_optimizer(of.optimizer, p) for group, p in parameters.items()}
    for round, gradient in enumerate(gradients(20)):
        groups = active_groups(of, round)
        vector, state, _ = take_step(of, vector, state, gradient, groups=groups, learning_rate=0.05)
        for group in groups:
            parameters[group].grad = torch.from_numpy(gradient[masks[group]].copy())
            optimizers[group].step()
    for group, mask in masks.items():
        np.testing.assert_allclose(vector[mask], parameters[group].detach().numpy(), rtol=0, atol=2e-6)


def test_what_a_round_does_not_train_keeps_value_and_moments() -> None:
    of = study()
    vector, state = np.ones(19, np.float32), initial_state(of)
    after, moved, _ = take_step(
        of, vector, state, gradients(1)[0], groups=frozenset({TensorGroup.LORA_B}), learning_rate=0.1
    )
    trained = group_mask(TENSORS, frozenset({TensorGroup.LORA_B}))
    assert np.array_equal(after[~trained], vector[~trained])
    assert not moved.first[~trained].any() and not moved.second[~trained].any()
    assert (after[trained] != vector[trained]).all()
    assert moved.steps == {"projector": 0, "lora_a": 0, "lora_b": 1}


def test_a_step_is_bounded_and_keeps_its_direction() -> None:
    bounded, free = study(max_step_norm=0.01), study()
    vector = np.zeros(19, np.float32)
    small, _, norm = take_step(
        bounded, vector, initial_state(bounded), gradients(1)[0], groups=ALL, learning_rate=1.0
    )
    large, _, norm_free = take_step(
        free, vector, initial_state(free), gradients(1)[0], groups=ALL, learning_rate=1.0
    )
    assert norm == 0.01 and np.linalg.norm(small) == pytest.approx(0.01, rel=1e-5)
    np.testing.assert_allclose(small, large * (0.01 / norm_free), rtol=1e-4)


def test_inputs_are_not_changed_and_the_step_is_deterministic() -> None:
    of = study()
    vector, state, gradient = np.ones(19, np.float32), initial_state(of), gradients(1)[0]
    copies = vector.copy(), state.first.copy(), gradient.copy()
    one = take_step(of, vector, state, gradient, groups=ALL, learning_rate=0.1)[0]
    two = take_step(of, vector, state, gradient, groups=ALL, learning_rate=0.1)[0]
    assert np.array_equal(one, two) and one.dtype == np.float32
    for before, now in zip(copies, (vector, state.first, gradient), strict=True):
        assert np.array_equal(before, now)


def test_a_gradient_of_zeros_does_not_divide_by_zero() -> None:
    of = study()
    after, _, norm = take_step(
        of,
        np.ones(19, np.float32),
        initial_state(of),
        np.zeros(19, np.float32),
        groups=ALL,
        learning_rate=0.1,
    )
    assert norm == 0.0 and np.array_equal(after, np.ones(19, np.float32))
