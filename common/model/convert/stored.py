"""Tensors where they lie: name, dtype, shape and place in a file, for safetensors and for torch's zip files.

Guarantees: opening reads headers only; `read_tensor` reads one tensor's bytes and nothing else, so a source
of any size costs the memory of its largest tensor. No code in a file is run: a torch pickle is read by an
unpickler that knows tensors and dictionaries and refuses every other name. Offsets, shapes and sizes are
checked against the file, and an index can name files of its own folder only. It does not judge the values.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConversionRefused
from common.model.manifest import read_safetensors_header

if TYPE_CHECKING:
    import torch

_MAX_PICKLE_BYTES = 64 << 20
_MAX_INDEX_BYTES = 16 << 20
_MAX_TENSORS = 100_000
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.(?:safetensors|bin)")
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# What Python's zipfile raises for files that are none, or are cut, encrypted or of another version.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: `offset` in bytes from the file's start, `stride` in elements."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * _DTYPES[self.dtype][1]


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read one tensor, contiguous, in its stored dtype; raises ConversionRefused for a short file."""
    import torch

    with stored.path.open("rb") as handle:
        handle.seek(stored.offset)
        data = bytearray(stored.extent)
        if handle.readinto(data) != stored.extent:
            raise ConversionRefused(f"{stored.path}: expected {stored.extent} bytes of a tensor, got fewer")
    kind = getattr(torch, _DTYPES[stored.dtype][0])
    if not data:
        return torch.empty(stored.shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind).as_strided(stored.shape, stored.stride).contiguous()


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint folder: its shard index, or its only weights file."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            return _open_index(folder / name)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return open_file(folder / name)
    raise ConversionRefused(f"{folder}: expected model.safetensors, pytorch_model.bin or an index of shards")


def open_file(path: Path, *, inside: str = "") -> dict[str, StoredTensor]:
    """List the tensors of a .safetensors, .bin or .pt file; `inside` names a nested dictionary."""
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return open_torch_zip(path, inside=inside)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file; overlapping, escaping or short ranges are refused."""
    header = read_safetensors_header(path)
    with path.open("rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
    size = path.stat().st_size - start
    tensors: dict[str, StoredTensor] = {}
    places: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape = str(entry["dtype"]), tuple(_whole(entry["shape"]))
        first, last = _whole(entry["data_offsets"])
        if dtype not in _DTYPES:
            raise ConversionRefused(f"{path}: {name[:80]}: expected a dtype of {', '.join(_DTYPES)}")
        if last - first != math.prod(shape) * _DTYPES[dtype][1] or last > size:
            raise ConversionRefused(
                f"{path}: {name[:80]}: expected bytes that fit shape and file, got others"
            )
        places.append((first, last))
        tensors[name] = StoredTensor(path, dtype, shape, _contiguous(shape), start + first)
    places.sort()
    if any(end > begin for (_, end), (begin, _) in pairwise(places)):
        raise ConversionRefused(f"{path}: expected tensors side by side, got overlapping ones")
    return tensors


def open_torch_zip(path: Path, *, inside: str = "") -> dict[str, StoredTensor]:
    """List the tensors of a file written by torch.save (zip format), without running what it pickles.

    The top object, or its entry `inside`, must be a dictionary by name; entries that are no tensors are left
    out. Raises ConversionRefused for the older format and for a pickle that names anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive, inside)
    except _DAMAGE as error:
        raise ConversionRefused(
            f"{path}: expected a zip file of torch.save, got {type(error).__name__}; a file of torch before "
            "1.6 must be saved again by someone who trusts it"
        ) from error


# --- torch's zip files ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Opaque:
    """Stands for a value that is not needed: takes anything, is nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _StorageType:
    name: str


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    (first,) = _whole([offset])
    return _View(storage, first, tuple(_whole(shape)), tuple(_whole(stride)))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    return {}


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    # Training state beside the weights (epochs, learning rates): read past, never made.
    ("numpy.core.multiarray", "scalar"): _Opaque,
    ("numpy._core.multiarray", "scalar"): _Opaque,
    ("numpy", "dtype"): _Opaque,
    ("_codecs", "encode"): _Opaque,
    ("argparse", "Namespace"): _Opaque,
    ("collections", "defaultdict"): _dictionary,
    ("builtins", "dict"): _dictionary,
    ("__builtin__", "dict"): _dictionary,
}


class _Inert(pickle.Unpickler):
    """Unpickles tensors as places in a file; any other name is refused before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        try:
            return _KNOWN[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module[:60]}.{name[:60]}") from None

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _StorageType(name), str(key), str(), int(elements)):
                return _Storage(_STORAGES[name], key, elements)
        raise pickle.UnpicklingError("a reference that is no storage")


def _read_archive(path: Path, archive: zipfile.ZipFile, inside: str) -> dict[str, StoredTensor]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in members:
            raise ConversionRefused(f"{path}: expected each entry once, got {name[:80]!r} twice")
        members[name] = info
    pickled = members.get("data.pkl")
    if pickled is None or pickled.file_size > _MAX_PICKLE_BYTES:
        raise ConversionRefused(f"{path}: expected data.pkl of at most {_MAX_PICKLE_BYTES} bytes")
    order = members.get("byteorder")
    if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
        raise ConversionRefused(f"{path}: expected little-endian values")
    try:
        top = _Inert(io.BytesIO(archive.read(pickled))).load()
    except ConversionRefused:
        raise
    except Exception as error:
        raise ConversionRefused(f"{path}: expected tensors by name only, got {error}") from error
    values = top.get(inside, top) if inside and isinstance(top, dict) else top
    if not isinstance(values, dict) or len(values) > _MAX_TENSORS:
        raise ConversionRefused(f"{path}: expected a dictionary of tensors, got {type(values).__name__}")
    place = _places(path, members)
    tensors = {}
    for name, view in values.items():
        if isinstance(view, _View):
            tensors[str(name)] = _stored(path, str(name), view, place)
    return tensors


def _places(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> Callable[[str], tuple[int, int]]:
    """Return a function from a storage's key to its offset in the file and its size in bytes."""

    def place(key: str) -> tuple[int, int]:
        info = members.get(f"data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ConversionRefused(f"{path}: expected an uncompressed entry data/{key[:40]}")
        with path.open("rb") as handle:
            handle.seek(info.header_offset)
            magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(handle.read(_LOCAL_HEADER.size))
        if magic != b"PK\x03\x04":
            raise ConversionRefused(f"{path}: expected a zip entry for data/{key[:40]}")
        return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes, info.file_size

    return place


def _stored(path: Path, name: str, view: _View, place: Callable[[str], tuple[int, int]]) -> StoredTensor:
    if len(view.shape) != len(view.stride):
        raise ConversionRefused(f"{path}: {name[:80]}: expected a stride for every dimension")
    width = _DTYPES[view.storage.dtype][1]
    start, size = place(view.storage.key)
    stored = StoredTensor(path, view.storage.dtype, view.shape, view.stride, start + view.offset * width)
    if view.offset * width + stored.extent > size or stored.offset + stored.extent > path.stat().st_size:
        raise ConversionRefused(f"{path}: {name[:80]}: expected a tensor inside its storage")
    if stored.extent != math.prod(view.shape) * width:
        raise ConversionRefused(f"{path}: {name[:80]}: expected a dense tensor, got gaps or repeats")
    return stored


# --- indexes ----------------------------------------------------------------------------------------------


def _open_index(index: Path) -> dict[str, StoredTensor]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ConversionRefused(f"{index}: expected at most {_MAX_INDEX_BYTES} bytes")
    try:
        places = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionRefused(f"{index}: expected an index with weight_map") from error
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ConversionRefused(f"{index}: weight_map: expected file names by tensor name")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if not _SHARD.fullmatch(shard) or not path.is_file():
            raise ConversionRefused(f"{index}: expected a weights file of this folder, got {shard[:80]!r}")
        found = open_file(path)
        wanted = {name for name, place in places.items() if place == shard}
        if found.keys() != wanted:
            wrong = sorted(found.keys() ^ wanted)[0]
            raise ConversionRefused(f"{path}: tensor {wrong[:80]!r}: expected file and index to agree")
        tensors |= found
    return tensors


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def _whole(values: Any) -> list[int]:
    numbers = list(values)
    if len(numbers) > 8 or not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ConversionRefused("expected sizes and offsets that are whole numbers")
    return numbers
