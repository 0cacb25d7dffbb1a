"""Does the model tell its own image's report from others? Ranks by likelihood, in both directions.

For N studies the model's log-likelihood of every report under every image is an N x N matrix. Image to report
ranks a row after taking off how likely each report is under the images at large; report to image ranks a
column. R@k is the share whose own partner is among the first k; P@k the share of the first k that state the
same findings. A model that writes from habit alone gives every image the same likelihood, and chance is k /
N.

Cost: N * N short forward passes through the language model, so N is a sample of the studies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from client.evaluate.scores import Array
from common.errors import ScoresInvalid
from common.labeller import present_findings

if TYPE_CHECKING:
    import torch

RANKS = (1, 5, 10)


def likelihoods(
    model: Any,
    tokenizer: Any,
    *,
    device: str,
    features: torch.Tensor,
    reports: Sequence[str],
    template: str,
    max_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Array:
    """Mean log-likelihood per token of report j under image i, [N, N]; features [N, T, D], no indication."""
    import torch

    from common.model.llava import forward_features, llava_of
    from common.model.prompts import IGNORED, collate, encode_pair

    llava = llava_of(model)
    examples = [
        encode_pair(
            tokenizer,
            image_tokens=features.shape[1],
            image_token_id=llava.config.image_token_id,
            indication="",
            report=report,
            max_tokens=max_tokens,
            template=template,
        )
        for report in reports
    ]
    matrix = np.zeros((len(features), len(reports)))
    with torch.no_grad():
        for column, example in enumerate(examples):
            for start in range(0, len(features), batch_size):
                rows = features[start : start + batch_size].to(device)
                batch = collate([example] * len(rows), pad_token_id=tokenizer.pad_token_id or 0)
                batch = {name: values.to(device) for name, values in batch.items()}
                logits = forward_features(
                    model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], features=rows
                )
                said = batch["labels"][:, 1:]
                chosen = said.clamp(min=0)[..., None]
                values = logits[:, :-1].float().log_softmax(-1).gather(-1, chosen)[..., 0]
                mask = said != IGNORED
                matrix[start : start + len(rows), column] = (
                    ((values * mask).sum(1) / mask.sum(1)).cpu().numpy()
                )
            progress(column + 1, len(examples))
    return matrix


def retrieval_scores(matrix: Array, reports: Sequence[str]) -> dict[str, float]:
    """R@k and P@k in both directions from likelihoods [image, report]; raises ScoresInvalid."""
    count = len(reports)
    if matrix.shape != (count, count) or count < 2:
        raise ScoresInvalid(f"expected a square matrix of at least 2 studies, got {matrix.shape}")
    labels = [present_findings(report) for report in reports]
    texts = [" ".join(report.lower().split()) for report in reports]
    same_text = np.array([[one == other for other in texts] for one in texts])
    same_findings = np.array([[one == other for other in labels] for one in labels])
    centred = matrix - np.log(np.exp(matrix - matrix.max(0)).mean(0)) - matrix.max(0)
    scores: dict[str, float] = {"n": float(count)}
    for name, values in (("image_to_report", centred), ("report_to_image", matrix.T)):
        order = np.argsort(-values, axis=1, kind="stable")
        hit = np.take_along_axis(same_text, order, axis=1)
        match = np.take_along_axis(same_findings, order, axis=1)
        for k in (k for k in RANKS if k < count):
            scores[f"{name}_r@{k}"] = float(hit[:, :k].any(1).mean())
            scores[f"{name}_p@{k}"] = float(match[:, :k].mean())
    scores["chance_p"] = float(same_findings.mean())
    scores["chance_r@1"] = float(same_text.mean(1).mean())
    return scores
