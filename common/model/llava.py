"""Forward and greedy generation of a Llava model through cached vision features.

The vision tower is frozen, so its features are computed once per image; everything after them (projector,
language model, head) runs here. Guarantees: logits equal `model(...)` and generated ids equal
`model.generate(do_sample=False)` up to rounding. Features belong to one base: never use them with another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.errors import FeatureMismatch

if TYPE_CHECKING:
    import torch


def llava_of(model: Any) -> Any:
    """Return the `LlavaForConditionalGeneration` inside a plain or peft-wrapped model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vision_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run the frozen tower on [B, 3, H, W]; returns what the projector reads, [B, N, D], without gradient."""
    import torch

    llava = llava_of(model)
    layer = llava.config.vision_feature_layer
    tower = llava.model.vision_tower
    with torch.no_grad():
        first = next(tower.parameters())
        states = tower(
            pixel_values.to(first.device, first.dtype), output_hidden_states=True, return_dict=True
        ).hidden_states
        chosen = [states[index] for index in ([layer] if isinstance(layer, int) else layer)]
        if llava.config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return torch.cat(chosen, dim=-1)


def embed(model: Any, *, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Embed ids [B, T] and put projected features [I, N, D] on the image placeholders, in row order.

    I is the number of images of the whole batch: B when each row has one. Raises FeatureMismatch.
    """
    llava = llava_of(model)
    embedded = llava.get_input_embeddings()(input_ids)
    places = input_ids == llava.config.image_token_id
    expected = features.shape[0] * features.shape[1]
    if int(places.sum()) != expected:
        raise FeatureMismatch(f"expected {expected} image placeholders, got {int(places.sum())}")
    projector = llava.model.multi_modal_projector
    kind = next(projector.parameters()).dtype
    projected = projector(features.to(kind)).to(embedded.dtype)
    filled: torch.Tensor = embedded.masked_scatter(places.unsqueeze(-1), projected)
    return filled


def forward_features(
    model: Any, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Logits [B, T, V] from ids [B, T] and vision features [I, N, D]; padding on the right."""
    llava = llava_of(model)
    hidden = llava.model.language_model(
        inputs_embeds=embed(model, input_ids=input_ids, features=features),
        attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state
    logits: torch.Tensor = llava.lm_head(hidden)
    return logits


def generate_from_features(
    model: Any,
    *,
    prompt_ids: Sequence[Sequence[int]],
    features: torch.Tensor,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
) -> list[list[int]]:
    """Write greedily from B prompts and features [I, N, D]; returns the new ids without the end token."""
    import torch

    llava = llava_of(model)
    device = features.device
    longest = max(len(ids) for ids in prompt_ids)
    ids = torch.full((len(prompt_ids), longest), pad_token_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompt_ids):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=device)
        mask[row, longest - len(prompt) :] = 1
    written: list[list[int]] = [[] for _ in prompt_ids]
    going = list(range(len(prompt_ids)))
    with torch.no_grad():
        inputs = embed(model, input_ids=ids, features=features)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = None
        for _ in range(max_new_tokens):
            out = llava.model.language_model(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            chosen = llava.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            alive = [row for row, token in enumerate(chosen.tolist()) if token != eos_token_id]
            for row in alive:
                written[going[row]].append(int(chosen[row]))
            if not alive:
                break
            if len(alive) < len(going):
                keep = torch.tensor(alive, device=device)
                past.batch_select_indices(keep)
                chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
                going = [going[row] for row in alive]
            inputs = llava.get_input_embeddings()(chosen)[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
    return written
