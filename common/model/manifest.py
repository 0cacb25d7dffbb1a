"""The files of a frozen base model: which there are, what they hash to, which tensors they hold.

Guarantees: `verify_base` passes only when the directory holds exactly the pinned files, byte for byte,
so a site that computes with it computes with the model the consortium signed. Nothing is unpickled and
no code is run. It does not judge whether the weights are any good, or licensed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from common.config import FileHash
from common.errors import BaseHashMismatch, BaseInvalid

_READ_BYTES = 1 << 22
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_IGNORED = {"README.md", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes"}
_REFUSED = (".bin", ".pt", ".pth", ".pkl", ".py", ".ckpt", ".h5", ".so")


def hash_base(directory: Path, *, progress: Callable[[str], None] | None = None) -> tuple[FileHash, ...]:
    """List and hash the files of a Llava checkpoint directory, sorted by path; raises BaseInvalid."""
    if not directory.is_dir():
        raise BaseInvalid(f"{directory}: expected a Llava checkpoint directory, got none")
    files = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if path.is_dir() or relative in _IGNORED or any(part.startswith(".") for part in path.parts[-1:]):
            continue
        if path.suffix in _REFUSED:
            raise BaseInvalid(f"{path}: expected safetensors and JSON only, got a file that can hold code")
        if path.suffix not in _SUFFIXES:
            raise BaseInvalid(f"{path}: expected one of {', '.join(_SUFFIXES)}, got {path.suffix or 'none'}")
        if progress:
            progress(f"hashing {relative}")
        files.append(FileHash(relative, path.stat().st_size, _sha256_file(path)))
    _verify_llava(directory)
    return tuple(files)


def verify_base(directory: Path, pinned: tuple[FileHash, ...]) -> None:
    """Raise BaseHashMismatch or BaseInvalid unless the directory holds exactly the pinned files."""
    found = {file.path: file for file in hash_base(directory)}
    for file in pinned:
        got = found.pop(file.path, None)
        if got is None:
            raise BaseInvalid(f"{directory / file.path}: expected this file of the base, got none")
        if got != file:
            raise BaseHashMismatch(
                f"{directory / file.path}: expected {file.bytes} bytes with SHA-256 {file.sha256[:16]}…, "
                f"got {got.bytes} bytes with {got.sha256[:16]}…; the base was altered or is another one"
            )
    if found:
        raise BaseInvalid(f"{directory / min(found)}: expected only the pinned files, got an extra one")


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Read the names (as in memory, `model.language_model…`) and shapes of all tensors from the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in read_safetensors_header(path).items():
            shapes[memory_name(name)] = tuple(cast(list[int], entry["shape"]))
    if not shapes:
        raise BaseInvalid(f"{directory}: expected *.safetensors files, got none")
    return shapes


def memory_name(name: str) -> str:
    """Map a tensor's name on disk to its name in memory (Llava checkpoints keep the older naming)."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def read_safetensors_header(path: Path) -> dict[str, dict[str, object]]:
    """Read the header of a safetensors file (name → dtype, shape, data_offsets); raises BaseInvalid."""
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > 100_000_000:
                raise BaseInvalid(f"{path}: expected a safetensors header, got a length of {length}")
            header = json.loads(handle.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseInvalid(f"{path}: expected a safetensors file, got {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise BaseInvalid(f"{path}: expected a safetensors header, got {type(header).__name__}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_tensor_entry(entry):
            raise BaseInvalid(f"{path}: tensor {name[:80]!r}: expected dtype, shape and data_offsets")
    return header


def _is_tensor_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
        and isinstance(entry["shape"], list)
        and isinstance(entry["data_offsets"], list)
        and len(entry["data_offsets"]) == 2
        and all(type(number) is int and number >= 0 for number in entry["shape"] + entry["data_offsets"])
    )


def _verify_llava(directory: Path) -> None:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BaseInvalid(f"{directory / 'config.json'}: expected a model configuration, got none") from error
    if config.get("model_type") != "llava":
        raise BaseInvalid(
            f"{directory / 'config.json'}: expected model_type 'llava', got {config.get('model_type')!r}"
        )


def _sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
