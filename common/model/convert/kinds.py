"""What each published model consists of: its files, configuration, prompt and licence, as one plan.

`plan_conversion` reads configurations, headers and the tokenizer only. LLaVA-Rad's LoRA adapter is merged
into the language model: a base is what later adapters start from. Guarantees: the plan names exactly the
tensors that the model of its configuration has; nothing is fetched. It does not check what the weights are
worth.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.errors import ConversionRefused
from common.model.convert import keymap
from common.model.convert.keymap import Recipes, Tensors
from common.model.convert.stored import open_file, open_folder
from common.model.convert.vocabulary import Vocabulary, read_vocabulary
from common.model.images import processor_config
from common.model.prompts import LLAVA_RAD_TEMPLATE

_MAX_CONFIG_BYTES = 1 << 20
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
MISTRAL_PROMPT = (
    "[INST] <image>\nProvide a description of the findings in the radiology image given the following "
    "indication: {indication} [/INST]"
)
MISTRAL_QUESTION = "[INST] <image>\n{question} [/INST]"
VICUNA_QUESTION = LLAVA_RAD_TEMPLATE.partition("<image>")[0] + "<image>\n{question} ASSISTANT:"
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_parameters", "sliding_window", "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
_COPIED = ("chat_template.jinja", "fedrad.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Kind(StrEnum):
    """Which published form a source has."""

    LLAVA_RAD = "llava-rad"
    LLAVA_MED = "llava-med"
    LLAVA_HF = "llava-hf"


LICENCES: Mapping[Kind, tuple[str, ...]] = {
    Kind.LLAVA_RAD: (
        "LLaVA-Rad weights: Microsoft Research licence (non-commercial research; no redistribution).",
        "Vicuna-7B v1.5: Llama 2 Community Licence.",
    ),
    Kind.LLAVA_MED: (
        "LLaVA-Med v1.5: for research; its authors intend no clinical use.",
        "Mistral-7B-Instruct v0.2: Apache-2.0. CLIP ViT-L/14 336 px: MIT.",
    ),
    Kind.LLAVA_HF: ("See the licence of the source.",),
}


@dataclass(frozen=True)
class Conversion:
    """All that decides the output; `files` are JSON files by name, `sources` the files read."""

    kind: Kind
    config: dict[str, Any]
    recipes: Recipes
    vocabulary: Vocabulary | None  # None: the tokenizer's files are copied
    files: dict[str, Any]
    sources: tuple[Path, ...]
    copied: tuple[Path, ...] = field(default=())


def detect_kind(source: Path) -> Kind:
    """Tell a source folder's kind by its files; raises ConversionRefused."""
    if (source / "adapter_config.json").is_file() and _projector_file(source):
        return Kind.LLAVA_RAD
    config = _read_json(source / "config.json")
    if config.get("model_type") == "llava" and "vision_config" in config:
        return Kind.LLAVA_HF
    if "mm_projector_type" in config and not (source / "adapter_config.json").is_file():
        return Kind.LLAVA_MED
    raise ConversionRefused(
        f"{source}: expected LLaVA-Rad's files, LLaVA-Med v1.5 or an HF Llava; name one with --kind"
    )


def plan_conversion(
    source: Path, kind: Kind, *, language: Path | None = None, vision: Path | None = None
) -> Conversion:
    """Plan a conversion; `language` and `vision` say where those parts are when not in `source`.

    Raises ConversionRefused naming the file or tensor that is missing, unknown or of another shape.
    """
    if kind is Kind.LLAVA_RAD:
        conversion = _plan_rad(source, language or source / "vicuna-7b-v1.5", vision)
    elif kind is Kind.LLAVA_MED:
        conversion = _plan_med(source, vision)
    else:
        conversion = _plan_hf(source)
    keymap.verify_recipes(conversion.recipes, model_shapes(conversion.config))
    return conversion


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the tensors (names on disk) of the Llava of a configuration, without allocating it."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConversionRefused(f"config.json: expected a Llava configuration ({error})") from error
    names = dict(model.state_dict())
    if config.get("tie_word_embeddings"):
        names.pop("lm_head.weight")
    return {keymap.disk_name(name): tuple(tensor.shape) for name, tensor in names.items()}


# --- LLaVA-Rad --------------------------------------------------------------------------------------------


def _plan_rad(source: Path, language: Path, vision: Path | None) -> Conversion:
    adapter_config = _read_json(source / "adapter_config.json")
    adapter = next(
        (
            source / name
            for name in ("adapter_model.safetensors", "adapter_model.bin")
            if (source / name).is_file()
        ),
        source / "adapter_model.bin",
    )
    projector, tower = _projector_file(source), vision or source / "biomedclipcxr_518_checkpoint.pt"
    for path in (adapter, projector or source / "non_lora_trainables.bin", tower, language / "config.json"):
        if not path.is_file():
            raise ConversionRefused(f"{path}: expected this file of LLaVA-Rad or Vicuna, got none")
    if projector is None:
        raise ConversionRefused(f"{source}: expected non_lora_trainables.bin")
    own = _own_config(source)
    words = read_vocabulary(language)
    text = _text_config(language / "config.json", "llama")
    weights = open_folder(language)
    spare = _grown(text, words, weights)
    recipes = keymap.language_recipes(weights, spare_rows=spare)
    recipes = keymap.with_lora(recipes, open_file(adapter), scale=_lora_scale(adapter_config))
    recipes |= keymap.projector_recipes(open_file(projector))
    tensors = open_file(tower, inside="state_dict")
    recipes |= keymap.dinov2_recipes(tensors)
    eyes = _dinov2_config(recipes)
    look = source / "biomedclipcxr_518.json"
    given = _read_json(look).get("preprocess_cfg", {}) if look.is_file() else {}
    return Conversion(
        kind=Kind.LLAVA_RAD,
        config=_llava_config(text, eyes, words, layer=int(own.get("mm_vision_select_layer", -2))),
        recipes=recipes,
        vocabulary=words,
        files={
            "preprocessor_config.json": _processing(
                eyes["image_size"],
                given.get("mean", _CLIP_MEAN),
                given.get("std", _CLIP_STD),
            ),
            "fedrad.json": {"prompt": LLAVA_RAD_TEMPLATE, "question": VICUNA_QUESTION},
        },
        sources=_files(recipes) + _present(source, language),
    )


def _lora_scale(config: Mapping[str, Any]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(rank, int) or rank < 1:
        raise ConversionRefused("adapter_config.json: expected a LoRA adapter with its rank")
    if not isinstance(alpha, int | float) or any(
        config.get(name) for name in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out")
    ):
        raise ConversionRefused("adapter_config.json: expected plain LoRA: one rank, one alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _projector_file(source: Path) -> Path | None:
    names = ("non_lora_trainables.bin", "mm_projector.bin", "mm_projector.safetensors")
    return next((source / name for name in names if (source / name).is_file()), None)


def _dinov2_config(recipes: Recipes) -> dict[str, Any]:
    from transformers import Dinov2Config

    try:
        position = recipes["vision_tower.embeddings.position_embeddings"].shape
        patch = recipes["vision_tower.embeddings.patch_embeddings.projection.weight"].shape[-1]
        wide = recipes["vision_tower.encoder.layer.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ConversionRefused(f"vision tower: expected {error.args[0]}, got none") from error
    size = position[-1]
    config = Dinov2Config(
        hidden_size=size,
        num_hidden_layers=_layers(recipes, r"vision_tower\.encoder\.layer\.(\d+)\..*"),
        num_attention_heads=max(1, size // 64),
        mlp_ratio=wide // size,
        image_size=math.isqrt(position[1] - 1) * patch,
        patch_size=patch,
        use_mask_token=False,
    )
    return dict(config.to_dict())


# --- LLaVA-Med v1.5 ---------------------------------------------------------------------------------------


def _plan_med(source: Path, vision: Path | None) -> Conversion:
    own = _own_config(source)
    words = read_vocabulary(source)
    text = _text_config(
        source / "config.json", "mistral" if "mistral" in str(own.get("model_type")) else "llama"
    )
    inner = "model.vision_tower.vision_tower."
    projector, seen, language = keymap.split_by_prefix(open_folder(source), "model.mm_projector.", inner)
    recipes = keymap.language_recipes(language, spare_rows=_grown(text, words, language))
    recipes |= keymap.projector_recipes(projector)
    if seen:
        recipes |= keymap.clip_recipes(seen, prefix=inner)
    elif vision:
        recipes |= keymap.clip_recipes(open_folder(vision), prefix="")
    else:
        raise ConversionRefused(f"{source}: expected the vision tower in the weights, or --vision")
    eyes = _clip_config(recipes)
    return Conversion(
        kind=Kind.LLAVA_MED,
        config=_llava_config(text, eyes, words, layer=int(own.get("mm_vision_select_layer", -2))),
        recipes=recipes,
        vocabulary=words,
        files={
            "preprocessor_config.json": _processing(eyes["image_size"], _CLIP_MEAN, _CLIP_STD),
            "fedrad.json": (
                {"prompt": MISTRAL_PROMPT, "question": MISTRAL_QUESTION}
                if text["model_type"] == "mistral"
                else {"prompt": LLAVA_RAD_TEMPLATE, "question": VICUNA_QUESTION}
            ),
        },
        sources=_files(recipes) + _present(source),
    )


def _clip_config(recipes: Recipes) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    try:
        patches = recipes["vision_tower.embeddings.patch_embedding.weight"].shape
        positions = recipes["vision_tower.embeddings.position_embedding.weight"].shape[0]
        wide = recipes["vision_tower.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ConversionRefused(f"vision tower: expected {error.args[0]}, got none") from error
    config = CLIPVisionConfig(
        hidden_size=patches[0],
        intermediate_size=wide,
        num_hidden_layers=_layers(recipes, r"vision_tower\.encoder\.layers\.(\d+)\..*"),
        num_attention_heads=max(1, patches[0] // 64),
        image_size=math.isqrt(positions - 1) * patches[-1],
        patch_size=patches[-1],
    )
    return dict(config.to_dict())


# --- HF Llava ---------------------------------------------------------------------------------------------


def _plan_hf(source: Path) -> Conversion:
    config = _read_json(source / "config.json")
    if config.get("model_type") != "llava":
        raise ConversionRefused(f"{source / 'config.json'}: expected model_type 'llava'")
    config.pop("auto_map", None)
    # A Llava's own tokenizer knows its image mark already; its files are taken as they are.
    words = None if (source / "tokenizer.json").is_file() else read_vocabulary(source)
    image = config.get("image_token_index", config.get("image_token_id"))
    if words and words.image_id != image:
        raise ConversionRefused(f"{source}: expected <image> to be token {image}, got {words.image_id}")
    looks = _read_json(source / "preprocessor_config.json")
    recipes = keymap.llava_recipes(open_folder(source))
    return Conversion(
        kind=Kind.LLAVA_HF,
        config=config,
        recipes=recipes,
        vocabulary=words,
        files={"preprocessor_config.json": looks},
        sources=_files(recipes) + _present(source),
        copied=tuple(
            source / name for name in (*_COPIED, *(() if words else _TOKENIZER)) if (source / name).is_file()
        ),
    )


# --- shared -----------------------------------------------------------------------------------------------


def _text_config(path: Path, model_type: str) -> dict[str, Any]:
    from transformers import LlamaConfig, MistralConfig

    given = _read_json(path)
    if given.get("rope_scaling"):
        raise ConversionRefused(f"{path}: rope_scaling: expected none, got {str(given['rope_scaling'])[:80]}")
    fields = {name: given[name] for name in _TEXT_FIELDS if name in given}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if type(fields.get(name)) is not int or not 0 < fields[name] <= 1 << 20:
            raise ConversionRefused(f"{path}: {name}: expected a positive number, got {fields.get(name)!r}")
    try:
        config = MistralConfig(**fields) if model_type == "mistral" else LlamaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConversionRefused(f"{path}: expected a {model_type} configuration") from error
    return dict(config.to_dict())


def _grown(text: dict[str, Any], words: Vocabulary, weights: Tensors) -> int:
    """Make room in the text configuration for the added tokens; returns the rows to append."""
    table = weights.get("model.embed_tokens.weight")
    if table is None or table.shape[0] < len(words.tokenizer) - words.added:
        raise ConversionRefused("model.embed_tokens.weight: expected a row for every token of the tokenizer")
    needed = max(0, len(words.tokenizer) - table.shape[0])
    rows = keymap.spare_rows(table.shape[0], needed) if needed else 0
    text["vocab_size"] = table.shape[0] + rows
    return rows


def _llava_config(
    text: dict[str, Any], eyes: dict[str, Any], words: Vocabulary, *, layer: int
) -> dict[str, Any]:
    from transformers import LlavaConfig

    text = text | {"pad_token_id": words.pad_id, "architectures": None}
    config = LlavaConfig(
        vision_config=eyes,
        text_config=text,
        image_token_index=words.image_id,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        image_seq_length=(eyes["image_size"] // eyes["patch_size"]) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),
    )
    return dict(config.to_dict()) | {"architectures": ["LlavaForConditionalGeneration"]}


def _own_config(source: Path) -> dict[str, Any]:
    """Read what LLaVA adds to a language model's configuration; raises ConversionRefused for another kind."""
    path = source / "config.json"
    own = _read_json(path)
    if (
        own.get("mm_vision_select_feature", "patch") != "patch"
        or own.get("mm_projector_type") != "mlp2x_gelu"
    ):
        raise ConversionRefused(f"{path}: expected patch features and an mlp2x_gelu projector")
    return own


def _processing(size: int, mean: Any, std: Any) -> dict[str, Any]:
    return processor_config(size, mean=mean, std=std) | {
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
    }


def _layers(recipes: Recipes, pattern: str) -> int:
    return len({match[1] for name in recipes if (match := re.fullmatch(pattern, name))})


def _files(recipes: Recipes) -> tuple[Path, ...]:
    paths: set[Path] = set()
    for recipe in recipes.values():
        paths.add(recipe.source.path)
        if recipe.lora:
            paths |= {recipe.lora.down.path, recipe.lora.up.path}
    return tuple(sorted(paths))


def _present(*folders: Path) -> tuple[Path, ...]:
    names = (
        "config.json",
        "adapter_config.json",
        "biomedclipcxr_518.json",
        "tokenizer.json",
        "tokenizer.model",
    )
    return tuple(folder / name for folder in folders for name in names if (folder / name).is_file())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConversionRefused(f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionRefused(f"{path}: expected a JSON object, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise ConversionRefused(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
