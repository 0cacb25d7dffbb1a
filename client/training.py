"""One site's part of a round: draw patients, sum their gradients over the adapter.

The sum is over patients; a patient's gradient is the mean over their drawn studies (at most K), each study's
loss the mean over its own report tokens. Weighted by the manifest's public denominator at the server, the
sum over sites equals the gradient of central training on the union. Nothing here sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.data.store import Pair
from client.features import Features, Progress, load_features
from common.config import Study, TensorGroup
from common.errors import DataInsufficient
from common.model.lora import group_mask, vector_size
from common.model.prompts import Example, collate, encode_pair, prompt_template

if TYPE_CHECKING:
    from common.model.loading import AdaptedModel

Draw = Sequence[tuple[str, Sequence[int]]]  # patients with the indices of their drawn studies


@dataclass(frozen=True)
class TrainingData:
    """A site's training split, tokenised: `studies[patient]` indexes `examples` and `image_rows`."""

    patients: tuple[str, ...]
    studies: Mapping[str, tuple[int, ...]]
    examples: tuple[Example, ...]
    image_rows: tuple[tuple[int, ...], ...]
    features: Features


def prepare_training(
    adapted: AdaptedModel,
    study: Study,
    pairs: Sequence[Pair],
    *,
    data: Path,
    cache: Path,
    progress: Progress,
    split: str = "train",
) -> TrainingData:
    """Tokenise one split of a site's pairs and load its vision features.

    Raises DataInsufficient when the split is empty, ImageUnreadable or PromptTooLong.
    """
    chosen = sorted((p for p in pairs if p.split == split), key=lambda p: (p.patient, p.study))
    if not chosen:
        raise DataInsufficient(f"{data}: expected at least one pair in split {split!r}, got none")
    image_tokens = image_tokens_of(adapted)
    template = prompt_template(adapted.directory)
    examples: list[Example] = []
    rows: list[tuple[int, ...]] = []
    images: list[Path] = []
    studies: dict[str, list[int]] = {}
    for index, pair in enumerate(chosen):
        examples.append(
            encode_pair(
                adapted.tokenizer,
                image_tokens=image_tokens,
                image_token_id=adapted.model.config.image_token_id,
                indication=pair.indication,
                report=pair.findings,
                images=len(pair.images),
                max_tokens=study.training.max_tokens,
                template=template,
            )
        )
        rows.append(tuple(range(len(images), len(images) + len(pair.images))))
        images.extend(data / image for image in pair.images)
        studies.setdefault(pair.patient, []).append(index)
    features = load_features(
        adapted.model,
        images,
        base=adapted.directory,
        base_files=study.base.files,
        cache=cache,
        progress=progress,
    )
    return TrainingData(
        tuple(studies), {p: tuple(s) for p, s in studies.items()}, tuple(examples), tuple(rows), features
    )


def image_tokens_of(adapted: AdaptedModel) -> int:
    """Count the language-model tokens that one image takes (its vision patches)."""
    config = adapted.model.config
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def gradient_sum(
    adapted: AdaptedModel,
    data: TrainingData,
    draw: Draw,
    *,
    groups: frozenset[TensorGroup],
    clip_norm: float | None,
    microbatch_patients: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> npt.NDArray[np.float64]:
    """Sum the (clipped) gradients of the drawn patients: float64 [adapter size], zero outside `groups`.

    The adapter's current values are the model's own; the order of additions is fixed by the draw.
    """
    import torch

    from client.gradients import PatientGradients, patient_loss, per_sample_loss
    from common.model.llava import forward_features

    active = []
    for (name, parameter), spec in zip(adapted.parameters, adapted.tensors, strict=True):
        parameter.requires_grad_(spec.group in groups)
        if spec.group in groups:
            active.append((name, parameter))
    pad = adapted.tokenizer.pad_token_id
    with PatientGradients(adapted.model, active) as engine:
        for start in range(0, len(draw), microbatch_patients):
            part = draw[start : start + microbatch_patients]
            chosen = [(unit, i) for unit, (_, studies) in enumerate(part) for i in studies]
            batch = collate([data.examples[i] for _, i in chosen], pad_token_id=pad)
            row_to_unit = torch.tensor([unit for unit, _ in chosen])
            image_to_unit = torch.tensor([unit for unit, i in chosen for _ in data.image_rows[i]])
            features = data.features.rows([row for _, i in chosen for row in data.image_rows[i]])
            with engine.microbatch(units=len(part), row_to_unit=row_to_unit, image_to_unit=image_to_unit):
                logits = forward_features(
                    adapted.model,
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    features=features,
                )
                patient_loss(per_sample_loss(logits, batch["labels"]), row_to_unit).backward()
            engine.accumulate(clip_norm)
            progress(min(start + microbatch_patients, len(draw)), len(draw))
        taken = engine.take()
    full = np.zeros(vector_size(adapted.tensors), np.float64)
    full[group_mask(adapted.tensors, groups)] = taken
    return full
