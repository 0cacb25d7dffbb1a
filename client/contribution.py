"""What a site computes in a round, by mode of the study; nothing here sends anything.

plain       the gradient sum of the drawn patients, float32
consortium  the clipped sum, rounded, plus the site's share of the noise: int32 units modulo 2^32
local       the mean of fully noised gradients along several local steps (FedOpt, Reddi et al. 2021): float32

All randomness comes from the round's seed, so the same seed on the same data gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.training import Draw, TrainingData, gradient_sum
from common.canonical import sha256_hex
from common.config import Study
from common.model.lora import Vector, group_mask
from common.privacy.sampling import Csprng, poisson_sample, studies_of
from common.schedule import active_groups, learning_rate

if TYPE_CHECKING:
    from common.model.loading import AdaptedModel

Progress = Callable[[int, int], None]


def round_randomness(study: Study, *, site: str, round: int, seed: bytes) -> Csprng:
    """Return the generator of a round; a `[testing]` seed replaces the round's own and marks it."""
    if study.testing is None:
        return Csprng(seed)
    text = f"fedrad test draw|{study.testing.seed}|{site}|{round}"
    return Csprng(bytes.fromhex(sha256_hex(text.encode())), seeded_for_test=True)


def draw_patients(study: Study, data: TrainingData, csprng: Csprng) -> Draw:
    """Draw patients (Poisson) and at most K studies of each."""
    draw = []
    for patient in poisson_sample(csprng, data.patients, study.training.sampling_rate):
        rows = [str(row) for row in data.studies[patient]]
        chosen = studies_of(csprng, rows, study.training.studies_per_patient)
        draw.append((patient, tuple(int(row) for row in chosen)))
    return draw


def plain_sum(
    adapted: AdaptedModel, study: Study, data: TrainingData, csprng: Csprng, *, round: int, progress: Progress
) -> Vector:
    """Sum the drawn patients' gradients, un-clipped and un-noised: float32 [adapter size]."""
    total = _sum(adapted, study, data, csprng, round=round, clip_norm=None, progress=progress)
    return total.astype(np.float32)


def noised_sum(
    adapted: AdaptedModel, study: Study, data: TrainingData, csprng: Csprng, *, round: int, progress: Progress
) -> npt.NDArray[np.uint32]:
    """Sum, clip, round and noise: uint32 [adapter size], to be masked; frozen coordinates get no noise."""
    from common.privacy.mechanism import privatise
    from common.privacy.study_plan import plan_of

    total = _sum(
        adapted, study, data, csprng, round=round, clip_norm=study.privacy.clip_norm, progress=progress
    )
    trained = group_mask(study.adapter.tensors, active_groups(study, round))
    units = np.zeros(total.size, np.int32)
    units[trained] = privatise(total[trained], plan_of(study), csprng)
    return units.view(np.uint32)


def local_update(
    adapted: AdaptedModel,
    study: Study,
    data: TrainingData,
    csprng: Csprng,
    vector: Vector,
    *,
    round: int,
    progress: Progress,
) -> Vector:
    """Take several fully noised local steps and return the mean of their gradients: float32 [adapter size].

    The denominator is the site's public share of the nominal patients, never its true count.
    """
    from common.privacy.mechanism import dequantise, privatise
    from common.privacy.study_plan import plan_of

    plan, trained = plan_of(study), group_mask(study.adapter.tensors, active_groups(study, round))
    share = study.training.denominator / len(study.cohort.site)
    current, mean = vector.copy(), np.zeros(vector.size, np.float64)
    for step in range(study.training.local_steps):
        randomness = csprng.child(f"local step {step}")
        adapted.write_vector(current)
        total = _sum(
            adapted,
            study,
            data,
            randomness,
            round=round,
            clip_norm=study.privacy.clip_norm,
            progress=progress,
        )
        gradient = np.zeros(vector.size, np.float64)
        gradient[trained] = dequantise(privatise(total[trained], plan, randomness), plan) / share
        mean += gradient / study.training.local_steps
        norm = max(float(np.linalg.norm(gradient)), 1e-12)
        current = current - (learning_rate(study, round) * gradient / norm).astype(np.float32)
    return mean.astype(np.float32)


def _sum(
    adapted: AdaptedModel,
    study: Study,
    data: TrainingData,
    csprng: Csprng,
    *,
    round: int,
    clip_norm: float | None,
    progress: Progress,
) -> npt.NDArray[np.float64]:
    return gradient_sum(
        adapted,
        data,
        draw_patients(study, data, csprng),
        groups=active_groups(study, round),
        clip_norm=clip_norm,
        microbatch_patients=study.training.microbatch_patients,
        progress=progress,
    )
