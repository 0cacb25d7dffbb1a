"""Which release an engine runs, from which base: what a worker process is told, and the model it makes of it.

Guarantees: the release's signature and the base's hashes are verified before a weight is used; the base's
files are only read. A merged model lives in a fresh directory beside it, named by release and base.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.serving.engine import ModelVersion
from common.canonical import sha256_hex
from common.errors import BaseInvalid, EngineFailed
from common.files import sync_directory, write_atomic
from common.model.manifest import verify_base
from common.model.release import Release, open_release

if TYPE_CHECKING:
    from client.serving.plan import EnginePlan


@dataclass(frozen=True)
class ReleaseSource:
    """A release folder and its base; `version` is its number in the site's model store, 0 for a folder.

    `merged` is a directory for merged copies, or None to keep the adapter beside the base.
    """

    release: Path
    base: Path
    version: int = 0
    operator_key: str | None = None
    allow_unprotected: bool = False
    merged: Path | None = None

    def opened(self) -> Release:
        """Verify and read the release; raises ReleaseInvalid, SignatureInvalid or AdapterInvalid."""
        return open_release(
            self.release, operator_key=self.operator_key, allow_unprotected=self.allow_unprotected
        )


def format_source(source: ReleaseSource) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(source).items()}


def parse_source(value: dict[str, Any]) -> ReleaseSource:
    paths = {name: Path(value[name]) for name in ("release", "base")}
    merged = None if value["merged"] is None else Path(value["merged"])
    return ReleaseSource(**(value | paths | {"merged": merged}))


def version_of(release: Release, *, version: int) -> ModelVersion:
    """Say what every answer of this release names."""
    note, study = release.note, release.study
    claimed = note.mode != "plain" and not note.seeded
    return ModelVersion(
        version=version,
        study=note.study,
        study_id=study.study.id,
        round=note.round,
        adapter_sha256=note.adapter_sha256,
        base=study.base.name,
        mode=note.mode,
        release_epsilon=(note.release_epsilon or None) if claimed else None,
        delta=note.delta,
        protected=claimed,
    )


def load_source(source: ReleaseSource, plan: EnginePlan) -> tuple[Any, Any, Release]:
    """Verify, load and place a release on its base: model, tokenizer and the release.

    Raises ReleaseInvalid, BaseHashMismatch, BaseInvalid or EngineFailed.
    """
    release = source.opened()
    verify_base(source.base, release.study.base.files)
    if source.merged is not None:
        directory = merge_release(release, base=source.base, into=source.merged)
        model, tokenizer = _load(directory, plan)
        return model, tokenizer, release
    from common.model.loading import attach_adapter

    base, tokenizer = _load(source.base, plan)
    adapted = attach_adapter(base, tokenizer, source.base, release.study.adapter)
    adapted.write_vector(release.adapter)
    return adapted.model, tokenizer, release


def merge_release(release: Release, *, base: Path, into: Path) -> Path:
    """Write base and adapter as one checkpoint into a fresh directory, or find it there; returns it.

    The sum is taken once, in float32, from the base's own files, which stay as they are: repeated merging
    in place drifts. The copy appears whole or not at all, and is checked by hash when it is found.
    """
    import torch

    from common.model.loading import load_adapted

    pinned = sha256_hex(repr(release.study.base.files).encode())[:12]
    final = into / f"{release.note.adapter_sha256[:24]}-{pinned}"
    if final.is_dir():
        _verify_merged(final)
        return final
    staging = into / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        adapted = load_adapted(base, release.study.adapter)
        adapted.write_vector(release.adapter)
        with torch.no_grad():
            merged = adapted.model.merge_and_unload()
        merged.save_pretrained(staging)
        for path in base.iterdir():
            if path.is_file() and not (staging / path.name).exists() and not _is_weights(path):
                shutil.copyfile(path, staging / path.name)
        hashes = {path.name: _file_sha256(path) for path in sorted(staging.iterdir())}
        write_atomic(staging / "merged.json", json.dumps(hashes, indent=1).encode())
        os.replace(staging, final)
        sync_directory(into)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def _verify_merged(directory: Path) -> None:
    try:
        hashes = json.loads((directory / "merged.json").read_text())
        wrong = [name for name, expected in hashes.items() if _file_sha256(directory / name) != expected]
    except (OSError, ValueError, AttributeError) as error:
        raise BaseInvalid(f"{directory}: expected a merged copy, got a damaged one; remove it") from error
    if wrong:
        raise BaseInvalid(f"{directory / wrong[0]}: expected the merged file, got another; remove the copy")


def _load(directory: Path, plan: EnginePlan) -> tuple[Any, Any]:
    from common.model.loading import load_base

    if plan.quantization == "nf4":
        return _load_nf4(directory, plan)
    model, tokenizer = load_base(directory, dtype=plan.dtype)
    return model.to(plan.device), tokenizer


def _load_nf4(directory: Path, plan: EnginePlan) -> tuple[Any, Any]:
    """Load the language model's linears as 4-bit NF4 (bitsandbytes); tower, projector and head stay fp16."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineFailed("expected bitsandbytes for 4-bit weights, got none; install the extra volta")
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        directory,
        dtype=torch.float16,
        local_files_only=True,
        use_safetensors=True,
        device_map={"": plan.device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float16,
            llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
        ),
    )
    model.requires_grad_(False)
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _is_weights(path: Path) -> bool:
    return path.suffix in {".safetensors", ".bin", ".pt", ".pth"} or path.name.endswith(".index.json")


def _file_sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
