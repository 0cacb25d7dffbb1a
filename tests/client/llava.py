"""A random small Llava with LoRA for tests of gradients: real module names, no pretraining."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
IMAGE_TOKEN = 199


@dataclass(frozen=True)
class LlavaSize:
    vocabulary: int = 200
    hidden: int = 32
    layers: int = 2
    vision_hidden: int = 24
    image_pixels: int = 28
    patch_pixels: int = 14
    rank: int = 4
    intermediate: int = 64

    @property
    def patches(self) -> int:
        return (self.image_pixels // self.patch_pixels) ** 2


def llava_with_lora(size: LlavaSize, *, seed: int = 0) -> Any:
    """A Llava of random weights whose projector and language LoRA (B not zero) are trainable."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision_hidden,
            intermediate_size=2 * size.vision_hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=size.image_pixels,
            patch_size=size.patch_pixels,
        ),
        text_config=LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
        ),
        image_token_id=size.vocabulary - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft 0.21 reads a name that transformers 5.23 retires
        model: Any = get_peft_model(
            LlavaForConditionalGeneration(config),
            LoraConfig(
                r=size.rank,
                lora_alpha=2 * size.rank,
                target_modules=TARGETS,
                lora_dropout=0.0,
                init_lora_weights=False,
            ),
        )
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    return model.train()


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def random_batch(
    size: LlavaSize, *, samples: int, tokens: int, images_each: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels [B, T] with various padding, pixel_values [B*images_each, ...]."""
    draw = torch.Generator().manual_seed(seed)
    image_tokens = size.patches * images_each
    ids = torch.randint(3, size.vocabulary - 1, (samples, tokens), generator=draw)
    ids[:, 1 : 1 + image_tokens] = size.vocabulary - 1
    labels = ids.clone()
    labels[:, : 1 + image_tokens + 2] = -100
    mask = torch.ones_like(ids)
    for row in range(samples):
        cut = tokens - (row % 3) * 2
        ids[row, cut:], labels[row, cut:], mask[row, cut:] = 0, -100, 0
    pixels = torch.randn(samples * images_each, 3, size.image_pixels, size.image_pixels, generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
