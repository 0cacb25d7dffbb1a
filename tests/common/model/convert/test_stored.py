"""Foreign files are read without running them; what does not fit is refused by name."""

import json
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.errors import BaseInvalid, ConversionRefused
from common.model.convert.importing import import_base
from common.model.convert.stored import open_file, open_folder, read_tensor
from tests.common.model.convert.foreign import Size, write_llava_med, write_llava_rad


def test_torch_files_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    shared = torch.arange(40.0)
    values = {
        "plain": torch.randn(3, 5),
        "half": torch.randn(4).half(),
        "brain": torch.randn(4, 2).bfloat16(),
        "turned": torch.randn(3, 7).T,
        "part": shared[10:20],
        "other": shared[20:30].view(2, 5),
        "whole": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(values, tmp_path / "a.bin")
    found = open_file(tmp_path / "a.bin")
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert torch.equal(read_tensor(found[name]), tensor), name
        assert read_tensor(found[name]).dtype == tensor.dtype


def test_training_state_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    optimizer = {"lr": np.float64(0.1), "m": [torch.ones(2)], "state": defaultdict(dict, {0: {"step": 3}})}
    state = {"state_dict": {"w": torch.ones(2)}, "optimizer": optimizer, "args": Namespace(epochs=3)}
    torch.save(state, tmp_path / "a.pt")
    assert list(open_file(tmp_path / "a.pt", inside="state_dict")) == ["w"]


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FEDRAD_TEST_BOMB"],)


@pytest.mark.parametrize("place", ["value", "instead"])
def test_a_pickle_that_names_code_is_refused_and_not_run(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDRAD_TEST_BOMB", str(tmp_path / "ran"))
    torch.save({"w": torch.ones(2), "x": _Bomb()} if place == "value" else _Bomb(), tmp_path / "a.bin")
    with pytest.raises(ConversionRefused, match="mkdir"):
        open_file(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(_Bomb()))  # the form before zip files
    with pytest.raises(ConversionRefused, match="zip file"):
        open_file(tmp_path / "b.bin")
    assert not (tmp_path / "ran").exists()


def _rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], tuple[str, bytes]], **how: Any
) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **how) as new:
        for info in old.infolist():
            new.writestr(*change(info.filename, old.read(info)))


def test_torch_files_with_other_contents_than_they_say_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.bin"
    torch.save({"w": torch.ones(100)}, good)

    def cut(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data[:-4] if "/data/" in name else data

    _rewritten(good, tmp_path / "short.bin", cut)
    with pytest.raises(ConversionRefused, match="inside its storage"):
        open_file(tmp_path / "short.bin")
    _rewritten(good, tmp_path / "packed.bin", lambda n, d: (n, d), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionRefused, match="uncompressed"):
        open_file(tmp_path / "packed.bin")
    _rewritten(good, tmp_path / "big.bin", lambda n, d: (n, b"big" if n.endswith("byteorder") else d))
    with pytest.raises(ConversionRefused, match="little-endian"):
        open_file(tmp_path / "big.bin")
    (tmp_path / "torn.bin").write_bytes(good.read_bytes()[:-30])
    with pytest.raises(ConversionRefused, match="zip file"):
        open_file(tmp_path / "torn.bin")
    torch.save({"w": torch.ones(1).expand(1000, 1000)}, tmp_path / "stretched.bin")
    with pytest.raises(ConversionRefused, match="gaps or repeats"):
        open_file(tmp_path / "stretched.bin")
    torch.save([torch.ones(2)], tmp_path / "list.bin")
    with pytest.raises(ConversionRefused, match="dictionary of tensors"):
        open_file(tmp_path / "list.bin")


def _safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "fit shape and file"),
        ({"w": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}, "fit shape and file"),
        ({"w": {"dtype": "F8", "shape": [16], "data_offsets": [0, 16]}}, "expected a dtype"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            "overlapping",
        ),
    ],
)
def test_safetensors_that_lie_about_their_bytes_are_refused(
    header: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _safetensors(tmp_path / "a.safetensors", header, bytes(16))
    with pytest.raises(ConversionRefused, match=message):
        open_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "absent.safetensors", "run.py", ""],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(shard: str, tmp_path: Path) -> None:
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", inside / "sub" / "a.safetensors"):
        save_file({"w": torch.ones(2)}, place)
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ConversionRefused, match="weights file of this folder"):
        open_folder(inside)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2), "x": torch.ones(2)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(ConversionRefused, match="'x': expected file and index to agree"):
        open_folder(tmp_path)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(ConversionRefused, match="file names by tensor name"):
        open_folder(tmp_path)


@pytest.fixture(scope="module")
def med_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("med") / "source"
    write_llava_med(folder, Size())
    return folder


Tensors = dict[str, torch.Tensor]


def _extra(tensors: Tensors) -> None:
    tensors["model.layers.0.backdoor.weight"] = torch.ones(2)


def _foreign(tensors: Tensors) -> None:
    tensors["payload"] = torch.ones(2)


def _missing(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def _reshaped(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(7)


def _integers(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(128, dtype=torch.int64)


def _not_finite(tensors: Tensors) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def _too_large(tensors: Tensors) -> None:
    tensors["model.norm.weight"][3] = 1e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_extra, r"layers\.0\.backdoor\.weight'?: expected none of this name"),
        (_foreign, "'payload'"),
        (_missing, r"model\.norm\.weight'?: expected it in the source"),
        (_reshaped, r"model\.norm\.weight'?: expected \(128,\), got \(7,\)"),
        (_integers, r"model\.norm\.weight'?: expected floats, got I64"),
        (_not_finite, r"model\.norm\.weight'?: expected finite values"),
        (_too_large, r"model\.norm\.weight'?: expected finite values"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(
    change: Callable[[Tensors], None], message: str, med_source: Path, tmp_path: Path
) -> None:
    tensors: Tensors = {}
    for path in med_source.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((med_source / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionRefused, match=message):
        import_base(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert not (tmp_path.parent / f"{tmp_path.name}-out").exists()


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    write_llava_rad(tmp_path / "s", Size(layers=1, eyes_layers=2))
    path = tmp_path / "s" / "adapter_model.bin"
    adapter = torch.load(path, weights_only=True)
    name = next(name for name in adapter if "lora_A" in name)
    torch.save({key: value for key, value in adapter.items() if key != name}, path)
    with pytest.raises(ConversionRefused, match="both halves"):
        import_base(tmp_path / "s", tmp_path / "out")
    torch.save(adapter | {name: torch.ones(4, 3)}, path)
    with pytest.raises(ConversionRefused, match="expected an update of shape"):
        import_base(tmp_path / "s", tmp_path / "out")
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    (tmp_path / "s" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConversionRefused, match="plain LoRA"):
        import_base(tmp_path / "s", tmp_path / "out")
    (tmp_path / "s" / "biomedclipcxr_518_checkpoint.pt").unlink()
    with pytest.raises(ConversionRefused, match="expected this file"):
        import_base(tmp_path / "s", tmp_path / "out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_and_nothing_else_happens(data: st.DataObject, tmp_path: Path) -> None:
    """A few bytes changed anywhere, or another pickle: tensors that fit the file, or a named refusal."""
    good = tmp_path / "good.bin"
    if not good.exists():
        torch.save({"w": torch.ones(8), "x": torch.ones(2, 3).half()}, good)
        save_file({"w": torch.ones(8)}, tmp_path / "good.safetensors")
    suffix = data.draw(st.sampled_from([".bin", ".safetensors", "pickle"]))
    path = tmp_path / ("bad.safetensors" if suffix == ".safetensors" else "bad.bin")
    if suffix == "pickle":
        pickled = data.draw(st.binary(max_size=80))
        _rewritten(good, path, lambda name, old: (name, pickled if name.endswith("data.pkl") else old))
    else:
        raw = bytearray((tmp_path / f"good{suffix}").read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
    try:
        found = open_file(path)
    except (ConversionRefused, BaseInvalid):
        return
    for stored in found.values():
        read_tensor(stored)
