"""Prepared data of one site: `pairs.jsonl`, PNG images, `card.json` and `checksums.json` in one folder.

Guarantees: `read_pairs` returns only pairs whose fields, images and splits are valid, or raises a named
error with file and line; `parse_pair(format_pair(p)) == p`; a folder written by `write_dataset` appears
whole or not at all, and the same records and card give the same bytes. It does not look inside images
(`check.py` does) and does not de-identify: what it is given is what it stores.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import hmac
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from common.canonical import canonical_json
from common.errors import (
    DatasetExists,
    DatasetInvalid,
    ImageMissing,
    ImagePathEscapes,
    PairInvalid,
    SplitLeaks,
    StudyDuplicated,
)
from common.files import sync_directory, write_atomic

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
DEFAULT_FRACTIONS: Mapping[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}

MAX_LINE_BYTES = 1 << 20
MAX_TEXT_CHARS = 32_768
MAX_IMAGES = 16
_FIELDS = ("patient", "study", "images", "view", "indication", "findings", "impression", "split")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IMAGE_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,250}\.png")


@dataclass(frozen=True, slots=True)
class Pair:
    """One study: its images (relative PNG paths) and the sections of its report."""

    patient: str
    study: str
    images: tuple[str, ...]
    view: str
    indication: str
    findings: str
    impression: str
    split: Split


def split_of(patient: str, *, key: bytes, fractions: Mapping[Split, float] = DEFAULT_FRACTIONS) -> Split:
    """Return the split of a patient: HMAC-SHA-256 under the site's key, read as a number in [0, 1).

    `fractions` names all three splits and sums to 1; raises ValueError if not, or for a key under 16 bytes.
    """
    if len(key) < 16:
        raise ValueError(f"expected a split key of at least 16 bytes, got {len(key)}")
    if (
        set(fractions) != set(SPLITS)
        or abs(sum(fractions.values()) - 1) > 1e-9
        or min(fractions.values()) < 0
    ):
        raise ValueError(f"expected fractions of {SPLITS} that sum to 1, got {dict(fractions)}")
    digest = hmac.new(key, b"fedrad split\x00" + patient.encode(), hashlib.sha256).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split in SPLITS:
        position -= fractions[split]
        if position < 0:
            return split
    return next(split for split in reversed(SPLITS) if fractions[split] > 0)


def format_pair(pair: Pair) -> bytes:
    """Encode a pair as one canonical JSON line, newline included."""
    return canonical_json({name: _plain(getattr(pair, name)) for name in _FIELDS}) + b"\n"


def parse_pair(line: bytes) -> Pair:
    """Decode one line of `pairs.jsonl`.

    Raises PairInvalid for an unknown, missing or mistyped field, ImagePathEscapes for a path that leaves.
    """
    if len(line) > MAX_LINE_BYTES:
        raise PairInvalid(f"expected at most {MAX_LINE_BYTES} bytes on a line, got {len(line)}")
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicate_keys)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PairInvalid(f"expected one JSON object, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise PairInvalid(f"expected one JSON object, got {type(value).__name__}")
    if unknown := sorted(set(value) - set(_FIELDS)):
        raise PairInvalid(f"unknown field {unknown[0][:40]!r}, expected {', '.join(_FIELDS)}")
    if missing := [name for name in _FIELDS if name not in value]:
        raise PairInvalid(f"missing field {missing[0]!r}")
    for name in _FIELDS:
        if name != "images":
            _verify_text(name, value[name])
    for name in ("patient", "study"):
        if not _IDENTIFIER.fullmatch(value[name]):
            raise PairInvalid(f"field {name!r}: expected 1 to 128 of A-Z a-z 0-9 . _ -")
    if value["split"] not in SPLITS:
        raise PairInvalid(f"field 'split': expected one of {', '.join(SPLITS)}")
    images = value["images"]
    if not isinstance(images, list) or not 1 <= len(images) <= MAX_IMAGES:
        raise PairInvalid(f"field 'images': expected a list of 1 to {MAX_IMAGES} paths")
    for image in images:
        verify_image_path(image)
    if len(set(images)) != len(images):
        raise PairInvalid("field 'images': expected different paths, got one twice")
    return Pair(**{**value, "images": tuple(images)})


def verify_image_path(path: object) -> None:
    """Raise ImagePathEscapes unless `path` is a plain relative POSIX path to a PNG below its folder."""
    if (
        not isinstance(path, str)
        or not _IMAGE_PATH.fullmatch(path)
        or any(part.startswith(".") for part in path.split("/"))
        or str(PurePosixPath(path)) != path
    ):
        raise ImagePathEscapes("expected a relative path to a .png inside the folder, without '..' or links")


def read_pairs(directory: Path) -> tuple[Pair, ...]:
    """Read and verify `pairs.jsonl` of a prepared data folder, in file order.

    Raises DatasetInvalid (PairInvalid, StudyDuplicated, ImagePathEscapes, ImageMissing, SplitLeaks) naming
    the file and line number.
    """
    return tuple(iter_pairs(directory))


def iter_pairs(directory: Path) -> Iterator[Pair]:
    """Stream what `read_pairs` returns; memory grows only with identifiers."""
    file = directory / "pairs.jsonl"
    if not file.is_file() or file.is_symlink():
        raise DatasetInvalid(f"expected a prepared data folder, found no file {file}")
    studies: dict[str, int] = {}
    split_by_patient: dict[str, tuple[Split, int]] = {}
    images: dict[str, int] = {}
    with file.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES + 1), b""), start=1):
            where = f"{file}:{number}"
            try:
                pair = parse_pair(line)
            except DatasetInvalid as error:
                raise type(error)(f"{where}: {error}") from error
            if (first := studies.setdefault(pair.study, number)) != number:
                raise StudyDuplicated(f"{where}: study already on line {first}")
            split, first = split_by_patient.setdefault(pair.patient, (pair.split, number))
            if split != pair.split:
                raise SplitLeaks(f"{where}: patient is in {pair.split!r} here, in {split!r} on line {first}")
            for image in pair.images:
                if (first := images.setdefault(image, number)) != number:
                    raise PairInvalid(f"{where}: image already used on line {first}")
                _verify_image_file(directory, image, where)
            yield pair
    if not studies:
        raise DatasetInvalid(f"{file}: expected at least one pair, got none")


def write_dataset(
    directory: Path,
    records: Iterable[tuple[Pair, Sequence[bytes]]],
    *,
    card: Mapping[str, Any],
    replace: bool = False,
) -> None:
    """Write a whole prepared data folder: images (PNG bytes, one per path), pairs, card and checksums.

    Everything goes to a staging folder beside `directory` that is renamed at the end. The card gains
    `schema` and bucketed `counts`. Raises DatasetExists when `directory` is there and not `replace`.
    """
    refuse_existing(directory, replace=replace)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, mode=0o700)
    try:

        def stored() -> Iterator[Pair]:
            for pair, contents in records:
                if len(contents) != len(pair.images):
                    raise PairInvalid(f"expected {len(pair.images)} image contents, got {len(contents)}")
                for name, content in zip(pair.images, contents, strict=True):
                    store_image(staging, name, content)
                yield pair

        seal_dataset(staging, directory, stored(), card=card, replace=replace)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def store_image(staging: Path, name: str, content: bytes) -> None:
    """Write PNG bytes to a path in a staging folder; raises PairInvalid when they are no PNG."""
    verify_image_path(name)
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise PairInvalid("expected PNG bytes for an image")
    path = staging / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def seal_dataset(
    staging: Path, directory: Path, pairs: Iterable[Pair], *, card: Mapping[str, Any], replace: bool = False
) -> None:
    """Write pairs, card and checksums into a staging folder that holds the images, and rename it.

    The result is read back in full before the rename, so an invalid folder never appears. Any other file
    in the staging folder becomes part of the dataset and of its checksums.
    """
    studies = dict.fromkeys(SPLITS, 0)
    patients: dict[Split, set[str]] = {split: set() for split in SPLITS}
    with (staging / "pairs.jsonl").open("wb") as handle:
        for pair in pairs:
            handle.write(format_pair(pair))
            studies[pair.split] += 1
            patients[pair.split].add(pair.patient)
    counts = {
        "studies": {split: bucket(studies[split]) for split in SPLITS},
        "patients": {split: bucket(len(patients[split])) for split in SPLITS},
    }
    write_atomic(staging / "card.json", _pretty({**card, "schema": 1, "counts": counts}))
    for _ in iter_pairs(staging):
        pass
    sums = {name: file_sha256(staging / name) for name in dataset_files(staging) if name != "checksums.json"}
    write_atomic(staging / "checksums.json", _pretty(sums))
    os.sync()
    publish(staging, directory, replace=replace)


def publish(staging: Path, directory: Path, *, replace: bool) -> None:
    """Rename a finished staging folder to its name; with `replace`, exchange the two in one system call."""
    refuse_existing(directory, replace=replace)
    if directory.is_dir() and any(directory.iterdir()):
        _exchange(staging, directory)
        sync_directory(directory.parent)
        shutil.rmtree(staging)
    else:
        os.rename(staging, directory)
        sync_directory(directory.parent)


def refuse_existing(directory: Path, *, replace: bool) -> None:
    """Raise DatasetExists unless `directory` is absent, empty, or a dataset that may be replaced."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise DatasetExists(f"expected a folder or nothing at {directory}, got another kind of file")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / "pairs.jsonl").is_file():
            raise DatasetExists(f"{directory} is not empty and holds no prepared data; choose another folder")
        if not replace:
            raise DatasetExists(f"{directory} already holds prepared data; choose another folder")


def read_card(directory: Path) -> dict[str, Any]:
    """Read `card.json`; raises DatasetInvalid when it is missing or no JSON object."""
    return _read_object(directory / "card.json")


def read_checksums(directory: Path) -> dict[str, str]:
    """Read `checksums.json`: relative path → SHA-256 of the file."""
    return _read_object(directory / "checksums.json")


def dataset_files(directory: Path) -> list[str]:
    """List every file below a folder as sorted relative POSIX paths; links are listed, never followed."""
    found: list[str] = []
    for folder, _, names in os.walk(directory):
        relative = Path(folder).relative_to(directory)
        found.extend((relative / name).as_posix() for name in names)
    return sorted(found)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def bucket(count: int) -> str:
    """Coarsen a count so that a card names no one: 0, 1-9, 10-19, 20-49, 50-99, 100-199 ..."""
    if count < 0:
        raise ValueError(f"expected a count, got {count}")
    if count < 10:
        return "0" if count == 0 else "1-9"
    scale = 10 ** (len(str(count)) - 1)
    low, high = {1: (1, 2)}.get(count // scale, (2, 5) if count // scale < 5 else (5, 10))
    return f"{low * scale}-{high * scale - 1}"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _pretty(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _no_duplicate_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) != len(items):
        raise PairInvalid("expected each field once, got one twice")
    return value


def _verify_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise PairInvalid(f"field {name!r}: expected a string, got {type(value).__name__}")
    if len(value) > MAX_TEXT_CHARS:
        raise PairInvalid(f"field {name!r}: expected at most {MAX_TEXT_CHARS} characters, got {len(value)}")


def _verify_image_file(directory: Path, image: str, where: str) -> None:
    path = directory
    for part in image.split("/"):
        path = path / part
        if path.is_symlink():
            raise ImagePathEscapes(f"{where}: expected plain folders and files, got a link at {image}")
    if not path.is_file():
        raise ImageMissing(f"{where}: expected an image at {image}, found none")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetInvalid(f"expected a file {path}, found none") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DatasetInvalid(f"{path}: expected a JSON object, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise DatasetInvalid(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _exchange(one: Path, other: Path) -> None:
    """Swap two paths atomically (Linux renameat2, RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(other))
        aside = other.with_name(f".{other.name}.{os.getpid()}.replaced")
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)
