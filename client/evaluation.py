"""Reports written by a model for held-out studies, from cached vision features.

Guarantees: the same model, features and indications give the same reports, whatever the batch size, up to
rounding. `shuffled` hands every study another study's image: a model that reads images must score lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.errors import ScoresInvalid

if TYPE_CHECKING:
    import torch


def generate_reports(
    model: Any,
    tokenizer: Any,
    *,
    features: torch.Tensor,
    indications: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 64,
    template: str | None = None,
) -> list[str]:
    """Write one report per study, greedily; features [M, N, D], `template` as the training used.

    Without `template` it is read from the directory the model was loaded from.
    """
    from pathlib import Path

    from common.model.llava import generate_from_features, llava_of
    from common.model.prompts import encode_prompt, prompt_template

    if len(features) != len(indications):
        raise ScoresInvalid(f"expected {len(features)} indications, got {len(indications)}")
    llava = llava_of(model)
    if template is None:
        template = prompt_template(Path(llava.config._name_or_path))
    prompts = [
        encode_prompt(
            tokenizer,
            image_tokens=features.shape[1],
            image_token_id=llava.config.image_token_id,
            indication=indication,
            template=template,
        )
        for indication in indications
    ]
    # Like lengths together: less padding, same reports.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    reports = [""] * len(prompts)
    training = llava.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        written = generate_from_features(
            model,
            prompt_ids=[prompts[row] for row in rows],
            features=features[rows],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, ids in zip(rows, written, strict=True):
            reports[row] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    model.train(training)
    return reports


def shuffled(features: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Give every study another study's features [M, N, D]: one random cycle, so none keeps its own."""
    import torch

    if len(features) < 2:
        raise ScoresInvalid(f"expected at least 2 studies to shuffle, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    mixed = torch.empty_like(features)
    mixed[order] = features[order.roll(1)]
    return mixed
