"""Which release an engine runs, from which base: what a worker process is told, and the model it makes of it.

Guarantees: the release's signature and the base's hashes are verified before a weight is used; the base's
files are only read. Merged copies: see `merging`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.serving.engine import ModelVersion
from common.errors import EngineFailed
from common.model.manifest import verify_base
from common.model.release import Release, open_release

if TYPE_CHECKING:
    from client.serving.decoding import BatchDecoder
    from client.serving.plan import EnginePlan


@dataclass(frozen=True)
class ReleaseSource:
    """A release folder and its base; `version` is its number in the site's model store, 0 for a folder.

    `merged` is a directory for merged copies, or None to keep the adapter beside the base; `gguf` is how
    llama.cpp's file is stored (`GgufType`, of a merged copy), or empty for transformers.
    """

    release: Path
    base: Path
    version: int = 0
    operator_key: str | None = None
    allow_unprotected: bool = False
    merged: Path | None = None
    gguf: str = ""

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
        from client.serving.merging import merge_release

        directory = merge_release(release, base=source.base, into=source.merged)
        model, tokenizer = _load(directory, plan)
        return model, tokenizer, release
    from common.model.loading import attach_adapter

    base, tokenizer = _load(source.base, plan)
    adapted = attach_adapter(base, tokenizer, source.base, release.study.adapter)
    adapted.write_vector(release.adapter)
    return adapted.model, tokenizer, release


def open_decoder(
    source: ReleaseSource, plan: EnginePlan, *, threads: int, default_tokens: int | None = None
) -> BatchDecoder:
    """Load a release and make what writes with it: with transformers, or with llama.cpp.

    Raises as `load_source`, and ParityFailed or ServingRefused where llama.cpp is asked for.
    """
    from client.serving.decoding import BatchDecoder
    from common.model.prompts import prompt_template

    release = source.opened()
    told: dict[str, Any] = {
        "version": version_of(release, version=source.version),
        "template": prompt_template(source.base),
        "default_tokens": default_tokens or release.study.training.max_new_tokens,
        "feature_bytes": plan.feature_bytes,
    }
    if not source.gguf:
        model, tokenizer, _ = load_source(source, plan)
        batch: dict[str, Any] = {"max_batch": plan.max_batch, "prefix_bytes": plan.prefix_bytes}
        return BatchDecoder(model, tokenizer, **told, **batch)
    from client.serving.llama_decoding import LlamaDecoder, gguf_copy
    from client.serving.merging import merge_release
    from client.serving.plan import GgufType

    if source.merged is None:
        raise EngineFailed("expected a directory for merged copies with llama.cpp, got none")
    verify_base(source.base, release.study.base.files)
    path = gguf_copy(  # before the model is loaded: the gate needs memory of its own
        merge_release(release, base=source.base, into=source.merged),
        into=source.merged.with_name("gguf"),
        kind=GgufType(source.gguf),
        make_decoder=lambda base, words: BatchDecoder(base, words, **told, max_batch=1, prefix_bytes=0),
    )
    model, tokenizer, _ = load_source(source, plan)
    more: dict[str, Any] = {"threads": threads, "on_card": plan.device != "cpu", "max_batch": plan.max_batch}
    return LlamaDecoder(path, model, tokenizer, **told, **more)


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
