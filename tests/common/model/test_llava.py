"""Cached vision features give what the whole model gives."""

from typing import Any

import pytest
import torch

from common.errors import FeatureMismatch
from common.model.llava import forward_features, generate_from_features, vision_features
from common.model.tiny import BOS, EOS, IMAGE, IMAGE_TOKENS, PAD, build_model

# peft 0.21 asks transformers 5.23 for a deprecated property.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module", params=["plain", "peft", "two-layers"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = build_model()
    if request.param == "two-layers":
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(**model.config.to_dict() | {"vision_feature_layer": [-1, 2]})
        model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # untrained weights are so small that all tokens score alike
    if request.param == "peft":
        from peft import LoraConfig, get_peft_model

        regex = r".*language_model.*\.(q_proj|v_proj)"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=regex, init_lora_weights=False))
    return model.eval()


def pixels(many: int) -> torch.Tensor:
    return torch.randn(many, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def rows(*tails: list[int], images: int = 1) -> list[list[int]]:
    return [[BOS, *[IMAGE] * (IMAGE_TOKENS * images), *tail] for tail in tails]


def padded(prompts: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    gaps = [[PAD] * (longest - len(prompt)) for prompt in prompts]
    ids = [g + p if left else p + g for g, p in zip(gaps, prompts, strict=True)]
    marks = [[0] * len(g) + [1] * len(p) for g, p in zip(gaps, prompts, strict=True)]
    return torch.tensor(ids), torch.tensor(marks if left else [mark[::-1] for mark in marks])


@pytest.mark.parametrize("images", [1, 2])
def test_logits_equal_the_whole_model(model: Any, images: int) -> None:
    ids, mask = padded(rows([40, 50, 60], [70], images=images), left=False)
    shown = pixels(2 * images)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, pixel_values=shown).logits
        features = vision_features(model, shown)
        ours = forward_features(model, input_ids=ids, attention_mask=mask, features=features)
    real = mask.bool()
    assert (whole[real] - ours[real]).abs().max() < 1e-5


def test_generation_equals_the_whole_model(model: Any) -> None:
    prompts = rows([40, 50, 60, 61], [70], [80, 81])
    shown = pixels(3)
    ids, mask = padded(prompts, left=True)
    with torch.no_grad():
        whole = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=shown,
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, ids.shape[1] :].tolist()
    ours = generate_from_features(
        model,
        prompt_ids=prompts,
        features=vision_features(model, shown),
        max_new_tokens=25,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    cut = [row[: row.index(EOS)] if EOS in row else row for row in whole]
    assert ours == cut and any(ours)


def test_a_row_that_ends_leaves_the_others_going(model: Any) -> None:
    prompts, shown = rows([40, 50, 60, 61], [70], [80, 81]), pixels(3)
    features = vision_features(model, shown)

    def write(eos: int) -> list[list[int]]:
        return generate_from_features(
            model,
            prompt_ids=prompts,
            features=features,
            max_new_tokens=12,
            eos_token_id=eos,
            pad_token_id=PAD,
        )

    free = write(-1)
    early = free[1][0]
    assert write(early) == [row[: row.index(early)] if early in row else row for row in free]


def test_features_carry_no_gradient_and_projector_does(model: Any) -> None:
    features = vision_features(model, pixels(1))
    assert features.shape[1] == IMAGE_TOKENS and not features.requires_grad
    ids, mask = padded(rows([40]), left=False)
    projector = next(p for n, p in model.named_parameters() if "projector.linear_1.weight" in n)
    projector.requires_grad_(True)
    forward_features(model, input_ids=ids, attention_mask=mask, features=features).sum().backward()
    assert projector.grad is not None and projector.grad.abs().sum() > 0
    projector.grad = None


def test_wrong_number_of_placeholders_is_refused(model: Any) -> None:
    ids, mask = padded(rows([40]), left=False)
    with pytest.raises(FeatureMismatch, match="expected 32 image placeholders, got 16"):
        forward_features(
            model, input_ids=ids, attention_mask=mask, features=vision_features(model, pixels(2))
        )
