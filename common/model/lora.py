"""The adapter: which tensors are trainable, their one order, and their files.

The adapter is the projector (a full copy) and the LoRA factors on the language model, all float32. Its
canonical form is one flat float32 vector in the manifest's tensor order; its SHA-256 is the adapter's
name. Files are safetensors in PEFT's naming, so that plain transformers and peft load a release.
Guarantees: `read_adapter` accepts exactly the listed names, shapes and dtype and finite values, nothing
else. Everything here works on headers and NumPy arrays, so the server needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from common.config import AdapterSection, Strategy, TensorGroup, TensorSpec
from common.errors import AdapterInvalid, BaseInvalid
from common.files import write_atomic
from common.model.manifest import memory_name, read_safetensors_header, tensor_shapes

Vector = npt.NDArray[np.float32]
_PREFIX = "base_model.model."
_PROJECTOR = "model.multi_modal_projector."
_LANGUAGE_MODEL = "model.language_model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def adapter_tensors(base: Path, adapter: AdapterSection) -> tuple[TensorSpec, ...]:
    """List the trainable tensors of a base in canonical order: projector, then LoRA A and B by module.

    Raises BaseInvalid when the target expression matches nothing, or anything outside the language model.
    """
    shapes = tensor_shapes(base)
    specs = [
        TensorSpec(_PREFIX + name, shape, TensorGroup.PROJECTOR)
        for name, shape in sorted(shapes.items())
        if name.startswith(_PROJECTOR)
    ]
    if not specs:
        raise BaseInvalid(f"{base}: expected a multi_modal_projector, got none")
    matched = False
    pattern = re.compile(adapter.targets)
    for name in sorted(shapes, key=_natural):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(shapes[name]) != 2 or not pattern.fullmatch(module):
            continue
        if not module.startswith(_LANGUAGE_MODEL):
            raise BaseInvalid(
                f"adapter.targets: expected modules of the language model only, got {module}; "
                r"anchor the expression, for example '.*language_model.*\.(q_proj|v_proj)'"
            )
        matched = True
        out_features, in_features = shapes[name]
        specs.append(
            TensorSpec(f"{_PREFIX}{module}.lora_A.weight", (adapter.rank, in_features), TensorGroup.LORA_A)
        )
        specs.append(
            TensorSpec(f"{_PREFIX}{module}.lora_B.weight", (out_features, adapter.rank), TensorGroup.LORA_B)
        )
    if not matched:
        raise BaseInvalid(f"adapter.targets: expected a match in the base, got none for {adapter.targets!r}")
    return tuple(specs)


def vector_size(tensors: Iterable[TensorSpec]) -> int:
    """Count the adapter's values."""
    return sum(spec.size for spec in tensors)


def group_mask(tensors: Iterable[TensorSpec], groups: frozenset[TensorGroup]) -> npt.NDArray[np.bool_]:
    """Mark the vector's coordinates that belong to `groups`: bool [size]."""
    return np.concatenate([np.full(spec.size, spec.group in groups) for spec in tensors])


def initial_vector(base: Path, adapter: AdapterSection) -> Vector:
    """Make the adapter that a study starts from: the base's projector, A random, B zero.

    A is Kaiming-uniform as in PEFT (bound 1/√in_features), or orthonormal rows for strategy frozen-a
    (FFA-LoRA, arXiv 2403.12313), from NumPy's Philox seeded with `adapter.init_seed`.
    """
    generator = np.random.Generator(np.random.Philox(adapter.init_seed))
    projector = _read_projector(base)
    parts: list[Vector] = []
    for spec in adapter.tensors or adapter_tensors(base, adapter):
        if spec.group is TensorGroup.PROJECTOR:
            values = projector[spec.name.removeprefix(_PREFIX)]
        elif spec.group is TensorGroup.LORA_B:
            values = np.zeros(spec.shape, np.float32)
        elif adapter.strategy is Strategy.FROZEN_A:
            rank, width = spec.shape
            q, _ = np.linalg.qr(generator.standard_normal((width, rank)))
            values = q.T.astype(np.float32)
        else:
            bound = 1.0 / np.sqrt(spec.shape[1])
            values = generator.uniform(-bound, bound, spec.shape).astype(np.float32)
        if values.shape != spec.shape:
            raise AdapterInvalid(f"{spec.name}: expected shape {spec.shape}, got {values.shape}")
        parts.append(np.ascontiguousarray(values).reshape(-1))
    return np.concatenate(parts)


def vector_sha256(vector: Vector) -> str:
    """Name an adapter: SHA-256 of its little-endian float32 values in canonical order."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).hexdigest()


def vector_to_bytes(vector: npt.NDArray[Any]) -> bytes:
    """Encode a float32 vector as little-endian bytes."""
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def vector_from_bytes(data: bytes | memoryview, tensors: tuple[TensorSpec, ...]) -> Vector:
    """Decode an adapter vector; raises AdapterInvalid on a wrong length or a non-finite value."""
    expected = 4 * vector_size(tensors)
    if len(data) != expected:
        raise AdapterInvalid(f"adapter: expected {expected} bytes (the manifest's tensors), got {len(data)}")
    vector = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(vector).all():
        raise AdapterInvalid("adapter: expected finite values, got a NaN or an infinity")
    return vector


def split_vector(vector: Vector, tensors: tuple[TensorSpec, ...]) -> dict[str, Vector]:
    """Cut a vector into named tensors (views)."""
    if vector.shape != (vector_size(tensors),):
        raise AdapterInvalid(f"adapter: expected {vector_size(tensors)} values, got {vector.shape}")
    named, start = {}, 0
    for spec in tensors:
        named[spec.name] = vector[start : start + spec.size].reshape(spec.shape)
        start += spec.size
    return named


def write_adapter(
    directory: Path, vector: Vector, tensors: tuple[TensorSpec, ...], adapter: AdapterSection
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as plain peft reads them."""
    from safetensors.numpy import save

    write_atomic(directory / _WEIGHTS, save(split_vector(vector, tensors), metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": adapter.targets,
        "modules_to_save": ["multi_modal_projector"],
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    write_atomic(directory / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_adapter(directory: Path, tensors: tuple[TensorSpec, ...]) -> Vector:
    """Read an adapter file into a vector; raises AdapterInvalid on anything outside the allow-list."""
    path = directory / _WEIGHTS
    try:
        header = cast(dict[str, dict[str, Any]], read_safetensors_header(path))
    except BaseInvalid as error:
        raise AdapterInvalid(str(error)) from error
    wanted = {spec.name: spec for spec in tensors}
    for name in header:
        if name not in wanted:
            raise AdapterInvalid(f"{path}: tensor {name!r}: expected only the manifest's tensors")
    for name, spec in wanted.items():
        if name not in header:
            raise AdapterInvalid(f"{path}: tensor {name!r}: expected it in the file, got none")
        entry = header[name]
        if entry["dtype"] != "F32" or tuple(entry["shape"]) != spec.shape:
            raise AdapterInvalid(
                f"{path}: tensor {name!r}: expected F32 {list(spec.shape)}, "
                f"got {entry['dtype']} {entry['shape']}"
            )
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise AdapterInvalid(f"{path}: expected a whole safetensors file, got a damaged one") from error
    vector = np.concatenate([loaded[spec.name].reshape(-1) for spec in tensors])
    return vector_from_bytes(vector_to_bytes(vector), tensors)


def _read_projector(base: Path) -> dict[str, Vector]:
    found: dict[str, Vector] = {}
    for path in sorted(base.glob("*.safetensors")):
        header = cast(dict[str, dict[str, Any]], read_safetensors_header(path))
        with path.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            for name, entry in header.items():
                if not memory_name(name).startswith(_PROJECTOR):
                    continue
                low, high = entry["data_offsets"]
                handle.seek(start + low)
                raw = handle.read(high - low)
                found[memory_name(name)] = _decode(raw, str(entry["dtype"]), path).reshape(entry["shape"])
    return found


def _decode(raw: bytes, dtype: str, path: Path) -> Vector:
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise BaseInvalid(f"{path}: expected projector weights in F32, F16 or BF16, got {dtype}")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
