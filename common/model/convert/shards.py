"""Writing a converted checkpoint tensor by tensor: safetensors shards that appear whole, one after the other.

Guarantees: the layout follows from names, shapes and dtype alone, so a second run knows what the first wrote;
a shard under its final name is complete and on disk; memory holds one tensor at a time. Values are cast once,
low-rank updates are added in float32 before; a value that does not fit the dtype is an error that names its
tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConversionRefused
from common.files import sync_directory, write_atomic
from common.model.convert.keymap import Recipe, Recipes
from common.model.convert.stored import read_tensor

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
SHARD_BYTES = 2 << 30
_WIDTHS = {"float16": ("F16", 2), "float32": ("F32", 4)}
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors in it, in order."""

    file: str
    names: tuple[str, ...]


def plan_shards(recipes: Recipes, *, dtype: str, shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Lay tensors out in name order into files of at most `shard_bytes`, or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(recipes):
        size = math.prod(recipes[name].shape) * _WIDTHS[dtype][1]
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    count = len(groups)
    return tuple(
        Shard(f"model-{at:05d}-of-{count:05d}.safetensors", tuple(names))
        for at, names in enumerate(groups, start=1)
    )


def write_shards(
    folder: Path, recipes: Recipes, shards: tuple[Shard, ...], *, dtype: str, progress: Progress
) -> None:
    """Write the shards that are not there yet, and the index; raises ConversionRefused."""
    done, total = 0, len(recipes)
    for shard in shards:
        path = folder / shard.file
        if not path.is_file():
            for written, _ in enumerate(_write_shard(path, shard, recipes, dtype), start=1):
                progress("converting tensors", done + written, total)
        done += len(shard.names)
        progress("converting tensors", done, total)
    if len(shards) > 1:
        size = sum(math.prod(recipe.shape) for recipe in recipes.values()) * _WIDTHS[dtype][1]
        places = {name: shard.file for shard in shards for name in shard.names}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_atomic(folder / "model.safetensors.index.json", (json.dumps(index, indent=1) + "\n").encode())


def realise(recipe: Recipe, dtype: str, *, name: str) -> torch.Tensor:
    """Make one output tensor in `dtype` from its source; raises ConversionRefused for what does not fit."""
    import torch

    kind = getattr(torch, dtype)
    source = read_tensor(recipe.source)
    if recipe.rows:
        source = source[slice(*recipe.rows)]
    out = torch.empty(recipe.shape, dtype=kind)
    rows = source.shape[0]
    update = None
    if recipe.lora:
        update = read_tensor(recipe.lora.down).float(), read_tensor(recipe.lora.up).float()
    for start in range(
        0, rows, _BLOCK_ROWS
    ):  # in blocks: a float32 copy of the whole would double the memory
        block = source[start : start + _BLOCK_ROWS].float()
        if recipe.lora and update:
            down, up = update
            block = block.addmm(up[start : start + _BLOCK_ROWS], down, alpha=recipe.lora.scale)
        part = block.to(kind)
        if not torch.isfinite(part).all():
            raise ConversionRefused(f"tensor {name!r}: expected finite values that fit {dtype}, got others")
        out[start : start + len(part)] = part
    if recipe.spare_rows:
        total = torch.zeros(recipe.shape[1:], dtype=torch.float64)
        for start in range(0, rows, _BLOCK_ROWS):
            total += source[start : start + _BLOCK_ROWS].double().sum(0)
        out[rows:] = (total / rows).to(kind)
    return out


def _write_shard(path: Path, shard: Shard, recipes: Mapping[str, Recipe], dtype: str) -> Iterator[str]:
    code, width = _WIDTHS[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in shard.names:
        size = math.prod(recipes[name].shape) * width
        header[name] = {
            "dtype": code,
            "shape": list(recipes[name].shape),
            "data_offsets": [place, place + size],
        }
        place += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as handle:
            handle.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in shard.names:
                handle.write(realise(recipes[name], dtype, name=name).numpy().data)
                yield name
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
