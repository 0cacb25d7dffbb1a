"""llama.cpp as an engine: the same answers as transformers, a gate that refuses, nothing left of what failed.

Without llama-cpp-python (extra `llamacpp`, built from source) only what needs none of it is tested.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.serving.decoding import BatchDecoder
from client.serving.gguf_export import export_gguf, llama_shape
from client.serving.gguf_parity import Parity, compare, measure_parity, verify_parity
from client.serving.merging import merge_release
from client.serving.plan import GgufType
from client.serving.source import load_source, open_decoder
from common.errors import BaseInvalid, EngineFailed, FedRadError, ParityFailed, ServingRefused
from common.model.loading import load_base
from tests.client.serving.models import PLAN, ask, decoder, talkative_base, talkative_source
from tests.client.serving.test_decoding import drain
from tests.client.serving.test_merging import copies, served

CONFIG: dict[str, Any] = {
    "text_config": {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 50, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _files_of_llama_cpp_are_closed() -> Iterator[None]:
    """llama-cpp-python leaves /dev/null open for a class that is not used here."""
    yield
    left = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if left is not None:
            getattr(left, name).close()


def test_the_header_says_what_the_configuration_says() -> None:
    shape = llama_shape(CONFIG)
    assert (shape.layers, shape.hidden, shape.heads, shape.key_value_heads) == (2, 64, 4, 2)
    assert (shape.head_size, shape.rope_theta, shape.positions) == (16, 5e5, 4096)
    mistral = {"text_config": CONFIG["text_config"] | {"model_type": "mistral", "sliding_window": 1024}}
    assert llama_shape(mistral).positions == 1024


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, "linear"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ServingRefused, match=said):
        llama_shape({"text_config": CONFIG["text_config"] | change})


def test_equal_logits_are_no_distance_apart_and_a_shift_of_all_is_none() -> None:
    logits = np.random.default_rng(1).normal(size=(5, 30)).astype(np.float32)
    found = compare(logits, logits + 3)
    assert found.positions == 5 and found.same_first == 1
    assert found.largest < 1e-5 and abs(found.divergence) < 1e-9
    other = compare(logits, logits[:, ::-1])
    assert other.largest > 1 and other.divergence > 0.1 and other.same_first < 1


@pytest.mark.parametrize(
    "change",
    [
        {"positions": 0},
        {"largest": 0.02},
        {"divergence": 1e-4},
        {"same_first": 0.9},
        {"largest": float("nan")},
    ],
)
def test_the_gate_refuses_each_way_of_being_apart(change: dict[str, float]) -> None:
    good = Parity(100, 1e-3, 1e-9, 1.0)
    verify_parity(good, kind=GgufType.F32)
    with pytest.raises(ParityFailed):
        verify_parity(replace(good, **change), kind=GgufType.F32)  # type: ignore[arg-type]


def test_llama_cpp_without_merged_copies_is_refused() -> None:
    with pytest.raises(EngineFailed, match="merged"):
        open_decoder(talkative_source(gguf="f32"), PLAN, threads=1)


def test_the_file_holds_every_tensor_and_nothing_of_the_tower(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    merged = merged_copy(tmp_path)
    model, _ = load_base(merged)
    export_gguf(merged, tmp_path / "x.gguf", kind=GgufType.F32, name="made up")
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert len(tensors) == 3 + 9 * model.config.text_config.num_hidden_layers
    down = model.model.language_model.layers[1].mlp.down_proj.weight.numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, down)
    with (merged / "config.json").open("r+") as file:
        config = json.load(file)
        config["text_config"]["num_hidden_layers"] = 1
        file.seek(0)
        json.dump(config, file)
        file.truncate()
    with pytest.raises(BaseInvalid, match=r"layers\.1"):
        export_gguf(merged, tmp_path / "y.gguf", kind=GgufType.F32, name="made up")


def merged_copy(folder: Path, seed: int = 1) -> Path:
    return merge_release(talkative_source(seed).opened(), base=talkative_base(), into=folder / "merged")


@contextmanager
def llama(folder: Path, kind: GgufType = GgufType.F32) -> Iterator[Any]:
    """The talkative release in llama.cpp, with a batch of four."""
    pytest.importorskip("llama_cpp")
    source = talkative_source(merged=folder / "merged", gguf=kind.value)
    engine: Any = open_decoder(source, replace(PLAN, max_batch=4), threads=1)
    try:
        yield engine
    finally:
        engine.close()


def plain() -> BatchDecoder:
    model, words, _ = load_source(talkative_source(), PLAN)
    return decoder(model, words, max_batch=1)


def test_answers_equal_those_of_transformers_alone_and_in_company(tmp_path: Path) -> None:
    reference = plain()
    with llama(tmp_path) as engine:
        asks = [ask(n % 3, ("", "Cough.")[n % 2], max_new_tokens=8 + 5 * (n % 3)) for n in range(9)]
        for number, one in enumerate(asks):  # more than the batch holds: answers join as others leave
            reference.submit(number, one)
            engine.submit(number, one)
        engine.submit(99, ask(7))
        engine.cancel(99)
        expected, got = drain(reference), drain(engine)
        assert sorted(got) == list(range(9))
        for number in range(9):
            assert got[number].token_ids == expected[number].token_ids
            assert got[number].text == expected[number].text
            np.testing.assert_allclose(got[number].logprobs, expected[number].logprobs, atol=2e-2)
        assert (copies(tmp_path / "gguf")[0] / "parity.json").is_file()


def test_a_known_picture_begins_behind_its_image_and_a_resumed_answer_goes_on(tmp_path: Path) -> None:
    with llama(tmp_path) as engine:
        engine.submit(1, ask(5, max_new_tokens=12))
        first = drain(engine)[1]
        engine.submit(2, ask(5, max_new_tokens=12))
        again = drain(engine)[2]
        assert first.cached_tokens == 0 and again.cached_tokens > 16
        assert again.token_ids == first.token_ids
        engine.submit(3, replace(ask(5, max_new_tokens=12), written=first.token_ids[:5]))
        resumed = drain(engine)[3]
        assert resumed.token_ids == first.token_ids
        np.testing.assert_allclose(resumed.logprobs, first.logprobs, atol=1e-2)
        attention = engine.attention(ask(5), first.token_ids)
        assert attention.shape == (len(first.token_ids), 16)


def test_a_file_that_computes_otherwise_is_refused_and_not_kept(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    other = tmp_path / "other.gguf"
    export_gguf(merged_copy(tmp_path, seed=2), other, kind=GgufType.F32, name="another release")
    merged = merged_copy(tmp_path)
    model, words = load_base(merged)
    found = measure_parity(decoder(model, words, max_batch=1), model, other, base=merged, tokens=8)
    with pytest.raises(ParityFailed):
        verify_parity(found, kind=GgufType.F32)
    # eight bits are too few for weights as random as these: the gate sees it
    with pytest.raises(ParityFailed), llama(tmp_path, GgufType.Q8_0):
        pass
    assert copies(tmp_path / "gguf") == []


def test_what_is_no_model_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from client.serving.llama_cpp import LlamaCpp

    (tmp_path / "x.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(FedRadError, match=r"llama\.cpp loads"):
        LlamaCpp(tmp_path / "x.gguf", slots=1, positions=16)


@pytest.mark.slow
def test_served_answers_are_the_same_with_either_engine(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    one = served(tmp_path / "one")
    other = served(tmp_path / "other", "--llama-cpp", "f32")
    assert [value["text"] for value in other] == [value["text"] for value in one]
    assert [value["model"] for value in other] == [value["model"] for value in one]
