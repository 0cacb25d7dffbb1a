"""The server's optimizer: one step on the flat adapter vector from one averaged gradient.

Adam (Kingma & Ba 2015) and SGD with momentum as in torch.optim, float32, on the coordinates that the round
trains; the others keep their value and moments. Guarantees: deterministic, and the step's norm is at most
`max_step_norm`. It adds no noise: what it is given is already protected or public.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.config import OptimizerName, OptimizerSection, Study, TensorGroup
from common.model.lora import Vector, group_mask, vector_size


@dataclass(frozen=True)
class OptimizerState:
    """Moments [size] float32 and the number of steps that each tensor group has taken."""

    first: Vector
    second: Vector
    steps: dict[str, int]


def initial_state(study: Study) -> OptimizerState:
    size = vector_size(study.adapter.tensors)
    second = size if study.optimizer.name is OptimizerName.ADAM else 0
    return OptimizerState(
        np.zeros(size, np.float32), np.zeros(second, np.float32), {group.value: 0 for group in TensorGroup}
    )


def take_step(
    study: Study,
    vector: Vector,
    state: OptimizerState,
    gradient: npt.NDArray[np.float32],
    *,
    groups: frozenset[TensorGroup],
    learning_rate: float,
) -> tuple[Vector, OptimizerState, float]:
    """Return the new vector, the new state and the norm of the step; inputs are not changed."""
    tensors = study.adapter.tensors
    steps = {name: count + (TensorGroup(name) in groups) for name, count in state.steps.items()}
    first, second, step = state.first.copy(), state.second.copy(), np.zeros_like(vector)
    for group in sorted(groups):
        where = group_mask(tensors, frozenset({group}))
        if not where.any():
            continue
        step[where], first[where], moved = _direction(
            study.optimizer, gradient[where], first[where], second[where] if second.size else None,
            steps[group.value],
        )  # fmt: skip
        if moved is not None:
            second[where] = moved
    step *= np.float32(learning_rate)
    norm = float(np.linalg.norm(step.astype(np.float64)))
    limit = study.optimizer.max_step_norm
    if norm > limit:
        step *= np.float32(limit / norm)
        norm = limit
    return vector - step, OptimizerState(first, second, steps), norm


def _direction(
    optimizer: OptimizerSection,
    gradient: npt.NDArray[np.float32],
    first: Vector,
    second: Vector | None,
    step: int,
) -> tuple[Vector, Vector, Vector | None]:
    if second is None:
        first = np.float32(optimizer.momentum) * first + gradient
        return first, first, None
    beta1, beta2 = np.float32(optimizer.beta1), np.float32(optimizer.beta2)
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient * gradient
    correction1 = 1.0 - optimizer.beta1**step
    correction2 = 1.0 - optimizer.beta2**step
    denominator = np.sqrt(second) / np.float32(correction2**0.5) + np.float32(optimizer.epsilon)
    return (first / denominator / np.float32(correction1)).astype(np.float32), first, second
