"""The model in memory: the frozen base with its adapter attached, addressed as one flat vector.

Guarantees: only the manifest's tensors are trainable and all of them are float32; the base is opened
offline, from safetensors only, without remote code. It does not verify hashes (`manifest.verify_base`
does, before) and knows nothing of data.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import AdapterSection, TensorSpec
from common.errors import AdapterInvalid, BaseInvalid
from common.model.lora import Vector, split_vector, vector_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdaptedModel:
    """A base with its adapter: `model` is a PeftModel in eval mode, `parameters` in manifest order."""

    model: Any
    tokenizer: Any
    directory: Path
    tensors: tuple[TensorSpec, ...]
    parameters: tuple[tuple[str, torch.nn.Parameter], ...]

    def write_vector(self, vector: Vector) -> None:
        """Set the adapter's values in place from a flat float32 vector."""
        import torch

        named = split_vector(vector, self.tensors)
        with torch.no_grad():
            for name, parameter in self.parameters:
                parameter.copy_(torch.from_numpy(np.array(named[name])))

    def read_vector(self) -> Vector:
        """Return the adapter's values as a flat float32 vector."""
        parts = [p.detach().cpu().numpy().reshape(-1) for _, p in self.parameters]
        return np.concatenate(parts).astype(np.float32)


def load_base(directory: Path, *, dtype: str = "float32") -> tuple[Any, Any]:
    """Load model and tokenizer of a Llava checkpoint directory, frozen and in eval mode.

    `dtype` is float32 or float16. Raises BaseInvalid.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype not in ("float32", "float16"):
        raise BaseInvalid(f"dtype: expected float32 or float16, got {dtype!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = LlavaForConditionalGeneration.from_pretrained(
                directory, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseInvalid(f"{directory}: expected a Llava checkpoint, got {type(error).__name__}") from error
    model.requires_grad_(False)
    return model.eval(), tokenizer


def load_adapted(directory: Path, adapter: AdapterSection, *, dtype: str = "float32") -> AdaptedModel:
    """Load a base and attach a fresh adapter (PEFT LoRA plus a float32 copy of the projector)."""
    base, tokenizer = load_base(directory, dtype=dtype)
    return attach_adapter(base, tokenizer, directory, adapter)


def attach_adapter(base: Any, tokenizer: Any, directory: Path, adapter: AdapterSection) -> AdaptedModel:
    """Attach a fresh adapter to a loaded base, on the device where the base is; raises AdapterInvalid."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=adapter.targets,
        modules_to_save=["multi_modal_projector"],
    )
    with _quiet():
        model = get_peft_model(base, config)
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
            named[_file_name(name)] = parameter
    _verify_names(named, adapter.tensors)
    ordered = tuple((spec.name, named[spec.name]) for spec in adapter.tensors)
    return AdaptedModel(model.eval(), tokenizer, directory, adapter.tensors, ordered)


def _verify_names(named: dict[str, Any], tensors: tuple[TensorSpec, ...]) -> None:
    wanted = {spec.name: spec.shape for spec in tensors}
    for name in sorted(wanted.keys() ^ named.keys()):
        side = "in the model" if name in wanted else "in the manifest"
        raise AdapterInvalid(f"tensor {name!r}: expected it {side} too, got none")
    for name, shape in wanted.items():
        if tuple(named[name].shape) != shape:
            raise AdapterInvalid(
                f"tensor {name!r}: expected shape {shape}, got {tuple(named[name].shape)} in the model"
            )
    if not vector_size(tensors):
        raise AdapterInvalid("adapter: expected at least one tensor, got none")


def _file_name(parameter_name: str) -> str:
    return parameter_name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
