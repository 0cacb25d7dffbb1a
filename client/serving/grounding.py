"""Where on the image each written token rests: gradient-weighted attention to the image tokens.

One teacher-forced pass over the finished draft, forward and backward: for every attention head of the later
half of the layers (at most the last eight), the attention that the row which predicts a token pays to an
image token, times the gradient of the token's log-odds by it, where that product is positive (after Chefer
et al., ICCV 2021). Log-odds do not flatten where the model is sure, as log-probabilities do.

Guarantees: values are finite and not negative; the model is left as it was. Measured against raw attention
and occlusion on images whose findings' places are known: docs/radiologist-page.md. It shows what moved the
model's words, not that the words are true; an image token has seen its neighbours through the vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import GroundingUnavailable

if TYPE_CHECKING:
    import torch

    from common.model.images import ImageProcessor

Map = NDArray[np.float32]
MOST_LAYERS = 8


def image_attention(
    model: Any, *, input_ids: Sequence[int], features: torch.Tensor, written: Sequence[int]
) -> Map:
    """Attribute each written token to the image tokens: float32 [len(written), N].

    `input_ids` is the whole prompt with its N image placeholders; `features` [1, N, D] are the vision
    tower's, made outside inference mode. Costs one forward pass, and a backward pass through the layers that
    are read, whose attention weights it holds in memory (layers x heads x length squared). Raises
    GroundingUnavailable for a model whose attention cannot be read, FeatureMismatch for another image.
    """
    import torch

    from common.model.llava import embed, llava_of

    llava = llava_of(model)
    image_tokens = int(features.shape[1])
    if not written:
        return np.zeros((0, image_tokens), np.float32)
    device = features.device
    ids = torch.tensor([[*input_ids, *written]], dtype=torch.long, device=device)
    places = (ids[0] == llava.config.image_token_id).nonzero()[:, 0]
    rows = torch.arange(len(input_ids) - 1, ids.shape[1] - 1, device=device)
    language_model = llava.model.language_model
    count = len(language_model.layers)
    first = max(count // 2, count - MOST_LAYERS)
    with torch.no_grad():
        inputs = embed(model, input_ids=ids, features=features)
    with _eager(language_model), _gradients_from(language_model, first):
        out = language_model(
            inputs_embeds=inputs,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            output_attentions=True,
        )
        later = list(out.attentions or ())[first:]
        if not later or any(one is None for one in later):
            raise GroundingUnavailable("expected attention weights from the language model, got none")
        logits = llava.lm_head(out.last_hidden_state[0, rows]).float()
        chosen = torch.tensor([list(written)], device=device).T
        others = logits.scatter(-1, chosen, -torch.inf).logsumexp(-1)
        log_odds = logits.gather(-1, chosen)[:, 0] - others
        gradients = torch.autograd.grad(log_odds.sum(), later)
    total = torch.zeros(len(written), image_tokens, device=device)
    for attention, gradient in zip(later, gradients, strict=True):
        product = (attention.detach()[0].float() * gradient[0].float())[:, rows][:, :, places]
        total += product.clamp(min=0).sum(0)
    values: Map = total.cpu().numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise GroundingUnavailable("expected finite attributions, got NaN or infinity")
    return values


def span_map(attention: Map, *, first_token: int, end_token: int) -> Map:
    """Add up the tokens of a word or sentence and sharpen by squaring: float32 [N], sums to 1.

    Where nothing rests on the image the map is even. Raises GroundingUnavailable for tokens out of range.
    """
    if not 0 <= first_token < end_token <= len(attention):
        raise GroundingUnavailable(
            f"expected tokens within 0 to {len(attention)}, got {first_token} to {end_token}"
        )
    summed = attention[first_token:end_token].astype(np.float64).sum(0)
    squared = (summed / max(float(summed.max()), 1e-30)) ** 2
    mass = float(squared.sum())
    if mass <= 0:
        return np.full(attention.shape[1], 1 / attention.shape[1], np.float32)
    return np.asarray(squared / mass, dtype=np.float32)


def grid_side(image_tokens: int) -> int:
    """Return the side of the square patch grid; raises GroundingUnavailable for another shape."""
    side = math.isqrt(image_tokens)
    if side * side != image_tokens or not side:
        raise GroundingUnavailable(f"expected a square grid of image tokens, got {image_tokens}")
    return side


def picture_box(processor: ImageProcessor, *, width: int, height: int) -> tuple[float, float, float, float]:
    """Say what part of a picture the patches cover: left, top, right, bottom as fractions of its sides."""
    if processor.crop is None:
        return 0.0, 0.0, 1.0, 1.0
    wide, tall = processor.width, processor.height
    if processor.shortest_edge is not None:
        short = min(width, height)
        wide, tall = (processor.shortest_edge * side // short for side in (width, height))
    crop_tall, crop_wide = processor.crop
    left, top = (wide - crop_wide) // 2, (tall - crop_tall) // 2
    return left / wide, top / tall, (left + crop_wide) / wide, (top + crop_tall) / tall


@contextmanager
def _gradients_from(language_model: Any, first: int) -> Iterator[None]:
    """Record gradients from layer `first` on only: what is before it is a constant, and costs no memory."""
    import torch

    def begin(layer: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        torch.set_grad_enabled(True)
        return (given[0].detach().requires_grad_(True), *given[1:])

    hook = language_model.layers[first].register_forward_pre_hook(begin)
    try:
        with torch.set_grad_enabled(False):
            yield
    finally:
        hook.remove()


@contextmanager
def _eager(language_model: Any) -> Iterator[None]:
    """Let the language model return its attention weights; its own implementation comes back afterwards."""
    before = language_model.config._attn_implementation
    try:
        language_model.set_attn_implementation("eager")
    except (ValueError, AttributeError) as error:
        raise GroundingUnavailable(f"expected eager attention, got {type(error).__name__}") from error
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)
