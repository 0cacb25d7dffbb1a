"""The adapter: its layout, its vector, its file, and that plain transformers and peft read it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from common.config import AdapterSection, Strategy, TensorGroup
from common.errors import AdapterInvalid, BaseInvalid
from common.model.loading import AdaptedModel, load_adapted
from common.model.lora import (
    Vector,
    adapter_tensors,
    group_mask,
    initial_vector,
    read_adapter,
    split_vector,
    vector_from_bytes,
    vector_sha256,
    vector_size,
    vector_to_bytes,
    write_adapter,
)
from common.model.tiny import IMAGE, IMAGE_TOKENS, tiny_base_directory

BASE = tiny_base_directory()
DRAFT = AdapterSection(rank=2, alpha=4.0, targets=r".*language_model.*\.(q_proj|down_proj)", init_seed=3)


@functools.cache
def section() -> AdapterSection:
    return replace(DRAFT, tensors=adapter_tensors(BASE, DRAFT))


@functools.cache
def adapted() -> AdaptedModel:
    return load_adapted(BASE, section())


def random_vector(seed: int = 1) -> Vector:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(vector_size(section().tensors))).astype(np.float32)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, IMAGE_TOKENS), IMAGE), torch.tensor([[7, 8, 9]])], 1)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 64, 64),
    }  # fmt: skip


# --- layout -------------------------------------------------------------------------------------------------


def test_the_layout_from_headers_is_what_peft_trains() -> None:
    model = adapted()
    trainable = {id(p): tuple(p.shape) for p in model.model.parameters() if p.requires_grad}
    listed = {
        id(parameter): spec.shape
        for (_, parameter), spec in zip(model.parameters, model.tensors, strict=True)
    }
    assert listed == trainable
    assert all(parameter.dtype == torch.float32 for _, parameter in model.parameters)


def test_a_layout_of_another_rank_or_target_does_not_load() -> None:
    other = replace(DRAFT, rank=3)
    with pytest.raises(AdapterInvalid):
        load_adapted(BASE, replace(DRAFT, tensors=adapter_tensors(BASE, other)))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [(r".*\.(q_proj|v_proj)", "language model only"), (r".*nothing.*", "expected a match")],
)
def test_targets_outside_the_language_model_or_none_are_refused(targets: str, reason: str) -> None:
    with pytest.raises(BaseInvalid, match=reason):
        adapter_tensors(BASE, replace(DRAFT, targets=targets))


def test_groups_partition_the_vector() -> None:
    masks = [group_mask(section().tensors, frozenset({group})) for group in TensorGroup]
    assert np.sum(masks, axis=0).tolist() == [1] * vector_size(section().tensors)


# --- the vector ---------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_vector_survives_bytes_tensors_and_the_model(seed: int) -> None:
    tensors, vector = section().tensors, random_vector(seed)
    assert np.array_equal(vector_from_bytes(vector_to_bytes(vector), tensors), vector)
    parts = split_vector(vector, tensors)
    assert np.array_equal(np.concatenate([parts[spec.name].reshape(-1) for spec in tensors]), vector)


def test_the_model_gives_back_the_vector_that_was_written() -> None:
    vector = random_vector()
    adapted().write_vector(vector)
    assert np.array_equal(adapted().read_vector(), vector)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    vector = random_vector()
    vector[3] = value
    with pytest.raises(AdapterInvalid, match="finite"):
        vector_from_bytes(vector_to_bytes(vector), section().tensors)


def test_a_vector_of_another_length_is_refused() -> None:
    data = vector_to_bytes(random_vector())
    for wrong in (data[:-4], data + bytes(4), b"", data[:-1]):
        with pytest.raises(AdapterInvalid, match="bytes"):
            vector_from_bytes(wrong, section().tensors)
    with pytest.raises(AdapterInvalid):
        split_vector(random_vector()[:-1], section().tensors)


def test_the_first_adapter_is_the_projector_of_the_base_and_zero_b() -> None:
    vector = initial_vector(BASE, section())
    parts = split_vector(vector, section().tensors)
    state = adapted().model.get_base_model().model.multi_modal_projector
    original = dict(state.original_module.named_parameters())
    for spec in section().tensors:
        if spec.group is TensorGroup.LORA_B:
            assert not parts[spec.name].any()
        if spec.group is TensorGroup.PROJECTOR:
            name = spec.name.partition("multi_modal_projector.")[2]
            assert np.array_equal(parts[spec.name], original[name].float().numpy())
        if spec.group is TensorGroup.LORA_A:
            assert 0 < np.abs(parts[spec.name]).max() <= 1 / np.sqrt(spec.shape[1])


def test_the_first_adapter_changes_nothing_of_the_base() -> None:
    model = adapted()
    model.write_vector(initial_vector(BASE, section()))
    with torch.no_grad():
        with_adapter = model.model(**batch()).logits
        with model.model.disable_adapter():
            without = model.model(**batch()).logits
    torch.testing.assert_close(with_adapter, without)


def test_the_first_adapter_is_deterministic_and_depends_on_its_seed() -> None:
    assert vector_sha256(initial_vector(BASE, section())) == vector_sha256(initial_vector(BASE, section()))
    other = initial_vector(BASE, replace(section(), init_seed=4))
    assert vector_sha256(other) != vector_sha256(initial_vector(BASE, section()))


def test_frozen_a_has_orthonormal_rows() -> None:
    vector = initial_vector(BASE, replace(section(), strategy=Strategy.FROZEN_A))
    for spec, values in zip(section().tensors, split_vector(vector, section().tensors).values(), strict=True):
        if spec.group is TensorGroup.LORA_A:
            np.testing.assert_allclose(values @ values.T, np.eye(section().rank), atol=1e-6)


# --- the file -----------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_adapter(tmp_path, random_vector(), section().tensors, section())
    return tmp_path


def test_a_file_reads_back_to_the_vector(written: Path) -> None:
    assert np.array_equal(read_adapter(written, section().tensors), random_vector())


def rewrite(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(change(dict(load_file(path))), path)


def first(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


def nan(tensors: dict[str, Any]) -> dict[str, Any]:
    name = first(tensors)
    return tensors | {name: np.full_like(tensors[name], np.nan)}


@pytest.mark.parametrize(
    ("what", "change", "reason"),
    [
        (
            "renamed",
            lambda t: {("x" + k if k == first(t) else k): v for k, v in t.items()},
            "only the manifest's",
        ),
        ("missing", lambda t: {k: v for k, v in t.items() if k != first(t)}, "got none"),
        ("extra", lambda t: t | {"extra": np.zeros(3, np.float32)}, "'extra'"),
        ("dtype", lambda t: t | {first(t): t[first(t)].astype(np.float16)}, "expected F32"),
        ("shape", lambda t: t | {first(t): t[first(t)].reshape(-1)[:-1].copy()}, "expected F32"),
        ("transposed", lambda t: {k: np.ascontiguousarray(v.T) for k, v in t.items()}, "expected F32"),
        ("nan", nan, "finite"),
    ],
)
def test_an_altered_tensor_is_refused_by_name(written: Path, what: str, change: Any, reason: str) -> None:
    rewrite(written, change)
    with pytest.raises(AdapterInvalid, match=reason):
        read_adapter(written, section().tensors)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(written: Path, keep: float) -> None:
    path = written / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(AdapterInvalid):
        read_adapter(written, section().tensors)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid):
        read_adapter(tmp_path, section().tensors)


def test_plain_transformers_and_peft_load_it_with_the_same_logits(written: Path) -> None:
    """The five lines of the README, nothing of FedRad's in them."""
    adapted().write_vector(random_vector())
    with torch.no_grad():
        ours = adapted().model(**batch()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers 5 retires
        from peft import PeftModel
        from transformers import LlavaForConditionalGeneration

        base = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, written).eval()
    with torch.no_grad():
        theirs = model(**batch()).logits
    assert torch.equal(ours, theirs)
