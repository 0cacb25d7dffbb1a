"""Grounding: shapes and refusals, the model is left alone, and findings of known place are found."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from client.serving.grounding import grid_side, image_attention, picture_box, span_map
from common.errors import FeatureMismatch, GroundingUnavailable
from common.model.images import ImageProcessor
from common.model.llava import embed, llava_of, vision_features
from common.model.loading import load_base
from common.model.tiny import IMAGE, IMAGE_TOKENS, tiny_base_directory
from tests.client.serving.phantom_places import Case, cases, load_release, summarise


@pytest.fixture(scope="module")
def loaded() -> tuple[object, object]:
    return load_base(tiny_base_directory())


def features_of(model: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return vision_features(model, torch.rand(1, 3, 64, 64, generator=generator))


def test_each_written_token_gets_a_row_over_the_image_tokens(loaded: tuple[object, object]) -> None:
    model, _ = loaded
    before = llava_of(model).model.language_model.config._attn_implementation
    prompt = [1, *[IMAGE] * IMAGE_TOKENS, 20, 21]
    got = image_attention(model, input_ids=prompt, features=features_of(model), written=[30, 31, 32])
    assert got.shape == (3, IMAGE_TOKENS) and got.dtype == np.float32
    assert (got >= 0).all() and np.isfinite(got).all() and got.sum() > 0
    assert llava_of(model).model.language_model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())  # type: ignore[attr-defined]


def test_a_token_does_not_depend_on_later_ones_in_a_two_layer_model(loaded: tuple[object, object]) -> None:
    model, _ = loaded
    prompt, features = [1, *[IMAGE] * IMAGE_TOKENS, 20], features_of(model)
    long = image_attention(model, input_ids=prompt, features=features, written=[30, 31, 32, 33])
    short = image_attention(model, input_ids=prompt, features=features, written=[30, 31])
    np.testing.assert_allclose(long[:2], short, rtol=1e-4, atol=1e-7)


def deep_model(layers: int) -> LlavaForConditionalGeneration:
    """The tiny architecture with more layers and shared key heads, random weights."""
    torch.manual_seed(3)
    shape = LlavaConfig.from_pretrained(tiny_base_directory())
    shape.text_config.num_hidden_layers, shape.text_config.num_key_value_heads = layers, 2
    return LlavaForConditionalGeneration(shape).eval().requires_grad_(False)


@pytest.mark.parametrize(("layers", "first"), [(1, 0), (3, 1), (18, 10)])
def test_reading_late_layers_alone_gives_what_the_whole_graph_gives(layers: int, first: int) -> None:
    model = deep_model(layers)
    prompt, written, features = [1, *[IMAGE] * IMAGE_TOKENS, 20], [30, 31, 32], features_of(model)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *written]])
    inputs = embed(model, input_ids=ids, features=features).requires_grad_(True)
    out = model.model.language_model(inputs_embeds=inputs, output_attentions=True, use_cache=False)
    logits = model.lm_head(out.last_hidden_state)[0, len(prompt) - 1 : -1]
    chances = logits.softmax(-1)[range(3), written]
    later = out.attentions[first:]
    gradients = torch.autograd.grad((chances / (1 - chances)).log().sum(), later)
    expected = sum(
        (a[0] * g[0]).clamp(min=0).sum(0)[len(prompt) - 1 : -1, 1 : 1 + IMAGE_TOKENS]
        for a, g in zip(later, gradients, strict=True)
    )
    model.set_attn_implementation("sdpa")
    got = image_attention(model, input_ids=prompt, features=features, written=written)
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-3, atol=1e-8)  # type: ignore[union-attr]
    assert torch.is_grad_enabled() and not model.model.language_model.layers[first]._forward_pre_hooks


def test_half_precision_gives_the_same_regions(loaded: tuple[object, object]) -> None:
    half, _ = load_base(tiny_base_directory(), dtype="float16")
    prompt = [1, *[IMAGE] * IMAGE_TOKENS, 20, 21]
    one, other = (
        image_attention(model, input_ids=prompt, features=features_of(model).float(), written=[30, 31, 40])
        for model in (loaded[0], half)
    )
    np.testing.assert_allclose(one, other, rtol=0.05, atol=0.01 * one.max())


def test_nothing_written_is_an_empty_map(loaded: tuple[object, object]) -> None:
    model, _ = loaded
    got = image_attention(model, input_ids=[1, *[IMAGE] * 16], features=features_of(model), written=[])
    assert got.shape == (0, IMAGE_TOKENS)


def test_features_of_another_size_are_refused(loaded: tuple[object, object]) -> None:
    model, _ = loaded
    with pytest.raises(FeatureMismatch):
        image_attention(model, input_ids=[1, IMAGE, 20], features=features_of(model), written=[30])


def test_span_map_sums_to_one_and_is_even_where_nothing_rests_on_the_image() -> None:
    attention = np.zeros((3, 16), np.float32)
    attention[1, 5] = 2.0
    attention[2, 6] = 1.0
    together = span_map(attention, first_token=1, end_token=3)
    assert together.sum() == pytest.approx(1) and together.argmax() == 5
    assert together[6] == pytest.approx(together[5] / 4)
    assert span_map(attention, first_token=0, end_token=1) == pytest.approx(np.full(16, 1 / 16))


@pytest.mark.parametrize(("first", "end"), [(-1, 1), (1, 1), (2, 4)])
def test_span_outside_the_draft_is_refused(first: int, end: int) -> None:
    with pytest.raises(GroundingUnavailable):
        span_map(np.ones((3, 16), np.float32), first_token=first, end_token=end)


def test_only_square_grids_are_shown() -> None:
    assert grid_side(1369) == 37
    for wrong in (0, 15, 577):
        with pytest.raises(GroundingUnavailable):
            grid_side(wrong)


def test_picture_box_is_what_the_crop_leaves() -> None:
    whole = ImageProcessor(64, 64, None, None, 3, 1 / 255, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]
    cropped = ImageProcessor(518, 518, 518, (518, 518), 3, 1 / 255, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]
    assert picture_box(whole, width=300, height=400) == (0, 0, 1, 1)
    assert picture_box(cropped, width=1000, height=2000) == pytest.approx((0, 0.25, 1, 0.75))
    assert picture_box(cropped, width=2000, height=1000) == pytest.approx((0.25, 0, 0.75, 1))


def test_chance_and_side_are_counted_as_they_are_called() -> None:
    region = np.zeros((16, 16), bool)
    region[4:8, 0:4] = True
    even = Case("Lung Opacity", "right", "right", region, np.full((16, 16), 1 / 256))
    assert (even.mass_on_side, even.times_chance) == (pytest.approx(0.5), pytest.approx(1.0))
    inside = Case("Lung Opacity", "right", "right", region, region / region.sum())
    assert (inside.mass_on_side, inside.times_chance) == (pytest.approx(1.0), pytest.approx(16.0))


def test_the_shipped_base_looks_at_the_side_it_speaks_of(loaded: tuple[object, object]) -> None:
    found = cases(*loaded, patients=12, seed=11)
    assert len(found) >= 12
    assert np.mean([case.times_chance for case in found]) > 2
    assert np.mean([case.mass_on_side > 0.5 for case in found]) > 0.7


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_demo_release_grounds_its_sentences(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.local.cli", "demo", "--out", str(tmp_path / "demo")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert made.returncode == 0, made.stderr[-2000:]
    model, tokenizer = load_release(tmp_path / "demo" / "run" / "release")
    figures = summarise(cases(model, tokenizer, patients=100, seed=5))
    assert figures["cases"] >= 100
    assert figures["most_mass_on_the_right_side"][0] >= 0.9
    assert figures["mass_on_the_right_side"][0] >= 0.9
    assert figures["times_chance"][1] >= 3
