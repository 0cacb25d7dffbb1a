"""The base's files: one flipped byte, a missing or extra file, anything that can hold code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.errors import BaseHashMismatch, BaseInvalid
from common.model.manifest import hash_base, memory_name, read_safetensors_header, tensor_shapes, verify_base
from common.model.tiny import tiny_base_directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    copy = tmp_path / "base"
    shutil.copytree(tiny_base_directory(), copy)
    return copy


def test_an_untouched_base_verifies(base: Path) -> None:
    verify_base(base, hash_base(tiny_base_directory()))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "fedrad.json"])
def test_one_flipped_byte_names_the_file(base: Path, name: str) -> None:
    data = bytearray((base / name).read_bytes())
    at = data.index(b"v") if name == "config.json" else len(data) // 2
    data[at] ^= 1
    (base / name).write_bytes(data)
    if name == "config.json":  # may be no JSON any more: refused before its hash is compared
        with pytest.raises((BaseHashMismatch, BaseInvalid), match=name):
            verify_base(base, hash_base(tiny_base_directory()))
        return
    with pytest.raises(BaseHashMismatch, match=name):
        verify_base(base, hash_base(tiny_base_directory()))


def test_a_missing_file_is_named(base: Path) -> None:
    (base / "generation_config.json").unlink()
    with pytest.raises(BaseInvalid, match=r"generation_config\.json.*got none"):
        verify_base(base, hash_base(tiny_base_directory()))


def test_an_extra_file_is_named(base: Path) -> None:
    (base / "added_tokens.json").write_text("{}")
    with pytest.raises(BaseInvalid, match=r"added_tokens\.json.*extra"):
        verify_base(base, hash_base(tiny_base_directory()))


def test_an_extra_file_in_a_folder_is_named(base: Path) -> None:
    (base / "sub").mkdir()
    (base / "sub" / "x.json").write_text("{}")
    with pytest.raises(BaseInvalid, match=r"sub/x\.json"):
        verify_base(base, hash_base(tiny_base_directory()))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "modeling.py", "w.pkl", "ops.so"])
def test_a_file_that_can_hold_code_is_refused(base: Path, name: str) -> None:
    (base / name).write_bytes(b"\x80\x04")
    with pytest.raises(BaseInvalid, match="can hold code"):
        hash_base(base)


def test_an_unknown_kind_of_file_is_refused(base: Path) -> None:
    (base / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseInvalid, match="gguf"):
        hash_base(base)


def test_a_readme_changes_nothing(base: Path) -> None:
    (base / "README.md").write_text("words")
    assert hash_base(base) == hash_base(tiny_base_directory())


def test_a_directory_that_is_none_or_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseInvalid):
        hash_base(tmp_path / "nowhere")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "gpt2"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseInvalid, match="gpt2"):
        hash_base(base)
    (base / "config.json").write_text("{")
    with pytest.raises(BaseInvalid, match="configuration"):
        hash_base(base)


def test_shapes_are_those_of_the_loaded_model() -> None:
    from common.model.loading import load_base

    model, _ = load_base(tiny_base_directory())
    named = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = tensor_shapes(tiny_base_directory())
    assert shapes.items() <= named.items()


def test_both_namings_of_llava_map_to_the_one_in_memory() -> None:
    assert memory_name("language_model.model.norm.weight") == "model.language_model.norm.weight"
    assert memory_name("language_model.lm_head.weight") == "lm_head.weight"
    assert memory_name("vision_tower.vision_model.x") == "model.vision_tower.x"
    assert memory_name("model.language_model.norm.weight") == "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b'{"x":1}', b'{"x":{}}', b"[" * 100_000]
    + [b'{"x":{"dtype":"F32","shape":%b,"data_offsets":[0,4]}}' % s for s in (b"1", b"[-1]", b'["1"]')],
)  # fmt: skip
def test_a_safetensors_header_that_is_none_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(BaseInvalid):
        read_safetensors_header(path)
    path.write_bytes(b"\xff" * 8)
    with pytest.raises(BaseInvalid):
        read_safetensors_header(path)


def test_a_base_without_weights_is_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseInvalid, match="safetensors"):
        tensor_shapes(base)
