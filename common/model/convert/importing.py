"""Importing a foreign model as a base: plan, write shard by shard, describe, pin, and only then appear.

Guarantees: the directory appears whole or not at all; an interrupted import goes on at the first shard that
is missing, if sources and settings are the same; every source and output file is named with its SHA-256 in
`origin.json`, and `verify_import` checks the outputs against it. The weights stay at the site, and whether it
may use them is between it and their licences, which the model card names.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.canonical import canonical_json, sha256_hex
from common.config import FileHash
from common.errors import BaseHashMismatch, BaseInvalid, ConversionRefused
from common.files import sync_directory, write_atomic
from common.model.convert.keymap import Recipes
from common.model.convert.kinds import LICENCES, Conversion, Kind, detect_kind, plan_conversion
from common.model.convert.shards import SHARD_BYTES, plan_shards, write_shards
from common.model.manifest import hash_base

Progress = Callable[[str, int, int], None]
CONVERTER = 1
ORIGIN = "origin.json"


@dataclass(frozen=True)
class ImportedBase:
    """A converted base: `sha256` names all its files, as two sites compare them."""

    directory: Path
    kind: str
    sha256: str
    files: tuple[FileHash, ...]


def import_base(
    source: Path,
    out: Path,
    *,
    kind: Kind | None = None,
    language: Path | None = None,
    vision: Path | None = None,
    dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> ImportedBase:
    """Convert `source` into the new directory `out`; `kind` None detects it.

    Raises ConversionRefused for a source that is not what it should be, BaseInvalid for an `out` that exists.
    """
    if out.exists():
        raise BaseInvalid(f"{out}: expected no directory here yet, got one")
    if not source.is_dir():
        raise ConversionRefused(f"{source}: expected a folder with the published files, got none")
    progress("reading headers", 0, 1)
    conversion = plan_conversion(source, kind or detect_kind(source), language=language, vision=vision)
    progress("reading headers", 1, 1)
    work = out.with_name(f".{out.name}.partial")
    with _held(work):
        _resume(work, conversion, dtype=dtype, shard_bytes=shard_bytes)
        _verify_space(work, conversion.recipes, dtype)
        shards = plan_shards(conversion.recipes, dtype=dtype, shard_bytes=shard_bytes)
        write_shards(work, conversion.recipes, shards, dtype=dtype, progress=progress)
        _write_settings(work, conversion, dtype)
        files = _describe(work, conversion, dtype, progress)
        for name in (".plan.json", ".lock"):
            (work / name).unlink()
        os.replace(work, out)
        sync_directory(out.parent)
    return ImportedBase(out, conversion.kind.value, base_sha256(files), files)


def verify_import(directory: Path, *, progress: Progress = lambda what, done, total: None) -> ImportedBase:
    """Check an imported base against its `origin.json`; raises BaseInvalid or BaseHashMismatch."""
    try:
        origin = json.loads((directory / ORIGIN).read_text())
        named = {str(entry["path"]): FileHash(**entry) for entry in origin["files"]}
        kind = str(origin["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseInvalid(f"{directory / ORIGIN}: expected the record of an import, got none") from error
    files = hash_base(directory, progress=lambda what: progress(what, 0, 1))
    for file in files:
        if file.path == ORIGIN:
            continue
        known = named.pop(file.path, None)
        if known is None:
            raise BaseInvalid(f"{directory / file.path}: expected only files of the import, got another")
        if known != file:
            raise BaseHashMismatch(
                f"{directory / file.path}: expected {known.bytes} bytes with SHA-256 {known.sha256[:16]}…, "
                f"got {file.bytes} with {file.sha256[:16]}…"
            )
    if named:
        raise BaseInvalid(f"{directory / min(named)}: expected this file of the import, got none")
    return ImportedBase(directory, kind, base_sha256(files), files)


def base_sha256(files: tuple[FileHash, ...]) -> str:
    """One hash for all files of a base, to read to one another."""
    return sha256_hex(canonical_json([asdict(file) for file in files]))


# --- inside -----------------------------------------------------------------------------------------------


@contextmanager
def _held(work: Path) -> Iterator[None]:
    """Make the working directory and keep other imports out of it."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BaseInvalid(f"{work}: expected no other import into it, got one running") from error
        yield
    finally:
        os.close(descriptor)


def _resume(work: Path, conversion: Conversion, *, dtype: str, shard_bytes: int) -> None:
    """Keep what an earlier run of the same plan wrote, drop anything else."""
    stats = [(path, path.stat()) for path in conversion.sources]
    plan = canonical_json(
        {
            "converter": CONVERTER,
            "kind": conversion.kind.value,
            "dtype": dtype,
            "shard_bytes": shard_bytes,
            "sources": [[str(path), stat.st_size, str(stat.st_mtime_ns)] for path, stat in stats],
        }
    )
    path = work / ".plan.json"
    if not path.is_file() or path.read_bytes() != plan:
        for old in work.iterdir():
            if old.name != ".lock":
                old.unlink()
        write_atomic(path, plan)
    for old in work.glob(".*.partial"):
        old.unlink()


def _verify_space(work: Path, recipes: Recipes, dtype: str) -> None:
    width = {"float16": 2, "float32": 4}[dtype]
    there = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    needed = sum(math.prod(recipe.shape) for recipe in recipes.values()) * width - there
    free = shutil.disk_usage(work).free
    if free < needed + (64 << 20):
        raise ConversionRefused(f"{work}: expected {needed >> 20} MiB of free disk, got {free >> 20} MiB")


def _write_settings(work: Path, conversion: Conversion, dtype: str) -> None:
    files: dict[str, Any] = {"config.json": conversion.config | {"dtype": dtype}} | conversion.files
    for path in conversion.copied:
        write_atomic(work / path.name, path.read_bytes())
    for name, value in files.items():
        write_atomic(work / name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
    if conversion.vocabulary:
        conversion.vocabulary.tokenizer.save_pretrained(work)


def _describe(work: Path, conversion: Conversion, dtype: str, progress: Progress) -> tuple[FileHash, ...]:
    """Write `origin.json` and the model card: where everything came from, and under which licence."""
    sources: list[dict[str, Any]] = []
    for path in conversion.sources:
        progress("hashing sources", len(sources), len(conversion.sources))
        with path.open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        name = f"{path.parent.name}/{path.name}"
        sources.append({"file": name, "bytes": path.stat().st_size, "sha256": sha256})
    progress("hashing sources", len(sources), len(sources))
    (work / ORIGIN).unlink(missing_ok=True)
    files = hash_base(work, progress=lambda what: progress(what, 0, 1))
    origin = {
        "schema": 1,
        "kind": conversion.kind.value,
        "converter": CONVERTER,
        "dtype": dtype,
        "licences": list(LICENCES[conversion.kind]),
        "sources": sources,
        "files": [asdict(file) for file in files],
    }
    encoded = (json.dumps(origin, indent=1) + "\n").encode()
    write_atomic(work / ORIGIN, encoded)
    write_atomic(work / "README.md", _card(origin).encode())
    return tuple(sorted((*files, FileHash(ORIGIN, len(encoded), sha256_hex(encoded))), key=lambda f: f.path))


def _card(origin: dict[str, Any]) -> str:
    rows = "\n".join(f"| `{s['file']}` | {s['bytes']:,} | `{s['sha256']}` |" for s in origin["sources"])
    notes = "\n".join(f"- {line}" for line in origin["licences"])
    merged = " Its LoRA adapter is merged into the language model." if origin["kind"] == "llava-rad" else ""
    return f"""# Base model converted from {origin["kind"]}

Converted by `fedrad-site base import` (converter {origin["converter"]}) to a Hugging Face Llava directory in
{origin["dtype"]}.{merged} Rows for new tokens hold the mean of the others.

## Licences of the sources
{notes}

The weights stay at this site; conversion changes no licence.

## Sources
| file | bytes | SHA-256 |
|---|---|---|
{rows}

## Limits
Not a medical device. What it writes is a draft for a radiologist. FedRad has not evaluated these weights:
`fedrad-site evaluate` does, on your own studies.
"""
