"""Which tensor of a foreign checkpoint becomes which tensor of a Llava directory: pure maps by name.

Facts, none of their code: LLaVA-Rad is Vicuna (`model.layers…`), a LoRA adapter
(`base_model.model.model.layers…`), a projector (`…mm_projector.0/.2`) and open_clip's tower
(`module.visual.trunk…`, a DINOv2-style ViT with fused qkv); LLaVA-Med v1.5 is Mistral with
`model.mm_projector…` and `model.vision_tower.vision_tower.vision_model…`.

Guarantees: every output has exactly one recipe; a source tensor that no rule names raises ConversionRefused
with its name, as does one that is missing or has another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.errors import ConversionRefused
from common.model.convert.stored import StoredTensor
from common.model.manifest import memory_name

VOCABULARY_MULTIPLE = 64
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank update: scale * up @ down, [out, r] @ [r, in]."""

    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one output tensor is made: a slice of rows, plus an update, plus rows filled with the mean row."""

    source: StoredTensor
    rows: tuple[int, int] | None = None
    lora: Lora | None = None
    spare_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.rows[1] - self.rows[0] if self.rows else self.source.shape[0]
        return (first + self.spare_rows, *self.source.shape[1:])


Recipes = dict[str, Recipe]

_TOWER_DROPPED = re.compile(
    r"text\..*|visual\.head\..*|logit_scale|logit_bias|visual\.trunk\.(?:attn_pool|head)\..*"
)
_TOWER_RULES = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (r"(?:fc_)?norm\.(weight|bias)", r"layernorm.\1"),  # unused: features come from the layer before
    (r"blocks\.(\d+)\.(norm[12])\.(weight|bias)", r"encoder.layer.\1.\2.\3"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"encoder.layer.\1.mlp.\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
)
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_PROJECTOR = re.compile(r"(?:base_model\.)?(?:model\.)*mm_projector\.([02])\.(weight|bias)")
_LANGUAGE = re.compile(r"model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\..+)|(lm_head\.weight)")
_LORA = re.compile(
    r"base_model\.model\.(?:model\.)?(layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_([AB])(?:\.default)?\.weight"
)
_BUFFER = re.compile(r".*\.(?:rotary_emb\.inv_freq|position_ids)")


def dinov2_recipes(tensors: Tensors) -> Recipes:
    """Map open_clip's DINOv2-style tower to HF Dinov2 on disk; qkv is split, text and heads are left out."""
    recipes: Recipes = {}
    for raw, stored in tensors.items():
        name = raw.removeprefix("module.")
        if _TOWER_DROPPED.fullmatch(name):
            continue
        trunk = name.removeprefix("visual.trunk.")
        fused = _QKV.fullmatch(trunk) if trunk != name else None
        if fused:
            third = stored.shape[0] // 3
            if stored.shape[0] != 3 * third:
                raise ConversionRefused(f"{raw[:100]}: expected three equal parts, got {stored.shape}")
            for at, part in enumerate(("query", "key", "value")):
                target = f"vision_tower.encoder.layer.{fused[1]}.attention.attention.{part}.{fused[2]}"
                _put(recipes, target, Recipe(stored, rows=(at * third, (at + 1) * third)))
            continue
        found = [re.sub(rule, made, trunk) for rule, made in _TOWER_RULES if re.fullmatch(rule, trunk)]
        if trunk == name or not found:
            raise _unknown(raw, "a vision tower of open_clip")
        _put(recipes, f"vision_tower.{found[0]}", Recipe(stored))
    return recipes


def clip_recipes(tensors: Tensors, *, prefix: str) -> Recipes:
    """Map an HF CLIP vision model under `prefix` (as `vision_model.…`) to the tower on disk."""
    recipes: Recipes = {}
    for raw, stored in tensors.items():
        name = raw.removeprefix(prefix)
        if _BUFFER.fullmatch(name) or re.match(
            r"(?:text_model|text_projection|visual_projection|logit_)", name
        ):
            continue
        if not name.startswith("vision_model."):
            raise _unknown(raw, "a CLIP vision tower")
        _put(recipes, "vision_tower." + name.removeprefix("vision_model."), Recipe(stored))
    return recipes


def projector_recipes(tensors: Tensors) -> Recipes:
    """Map `mm_projector.0/.2` (two layers, GELU between) to `linear_1/linear_2`."""
    recipes: Recipes = {}
    for raw, stored in tensors.items():
        match = _PROJECTOR.fullmatch(raw)
        if not match:
            raise _unknown(raw, "a two-layer projector")
        layer = {"0": "linear_1", "2": "linear_2"}[match[1]]
        _put(recipes, f"multi_modal_projector.{layer}.{match[2]}", Recipe(stored))
    return recipes


def language_recipes(tensors: Tensors, *, spare_rows: int) -> Recipes:
    """Map a Llama or Mistral to `language_model.…`; embeddings and head get `spare_rows` for new tokens."""
    recipes: Recipes = {}
    for raw, stored in tensors.items():
        if _BUFFER.fullmatch(raw):
            continue
        match = _LANGUAGE.fullmatch(raw)
        if not match:
            raise _unknown(raw, "a Llama or Mistral")
        target = f"language_model.model.{match[1]}" if match[1] else "language_model.lm_head.weight"
        wide = raw in ("model.embed_tokens.weight", "lm_head.weight")
        _put(recipes, target, Recipe(stored, spare_rows=spare_rows if wide else 0))
    return recipes


def with_lora(recipes: Recipes, adapter: Tensors, *, scale: float) -> Recipes:
    """Add a LoRA adapter's updates to the language model's recipes; raises for parts without a partner."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    for raw, stored in adapter.items():
        match = _LORA.fullmatch(raw)
        if not match:
            raise _unknown(raw, "a LoRA adapter of the language model")
        halves.setdefault(f"language_model.model.{match[1]}.weight", {})[match[2]] = stored
    merged = dict(recipes)
    for target, pair in halves.items():
        if target not in merged or pair.keys() != {"A", "B"}:
            raise ConversionRefused(f"{target}: expected a weight with both halves of its LoRA update")
        down, up, shape = pair["A"], pair["B"], merged[target].shape
        if len(down.shape) != 2 or down.shape[0] != up.shape[-1] or (up.shape[0], down.shape[1]) != shape:
            raise ConversionRefused(
                f"{target}: expected an update of shape {shape}, got {up.shape} x {down.shape}"
            )
        merged[target] = replace(merged[target], lora=Lora(down, up, scale))
    return merged


def llava_recipes(tensors: Tensors) -> Recipes:
    """Take an HF Llava's tensors as they are, under the names on disk."""
    recipes: Recipes = {}
    for raw, stored in tensors.items():
        if not _BUFFER.fullmatch(raw):
            _put(recipes, disk_name(memory_name(raw)), Recipe(stored))
    return recipes


def disk_name(name: str) -> str:
    """Map a Llava tensor's name in memory to its name on disk, as `save_pretrained` does."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            name = old + name[len(new) :]
            break
    if name.startswith("vision_tower.encoder.layer."):
        for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            name = name.replace(f".attention.{new}.", f".attention.attention.{old}.")
        name = name.replace(".attention.o_proj.", ".attention.output.dense.")
    return name


def spare_rows(rows: int, added: int) -> int:
    """Rows to append for `added` tokens so that the vocabulary stays a multiple of 64."""
    return -(-(rows + added) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE - rows


def split_by_prefix(tensors: Tensors, *prefixes: str) -> list[dict[str, StoredTensor]]:
    """Split tensors into those under each prefix, and at the end the rest."""
    groups: list[dict[str, StoredTensor]] = [{} for _ in (*prefixes, "")]
    for name, stored in tensors.items():
        at = next((at for at, prefix in enumerate(prefixes) if name.startswith(prefix)), len(prefixes))
        groups[at][name] = stored
    return groups


def verify_recipes(recipes: Recipes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConversionRefused unless the recipes make exactly the tensors `shapes`, by name on disk."""
    for name in sorted(recipes.keys() | shapes.keys()):
        if name not in shapes:
            raise ConversionRefused(
                f"tensor {name[:120]!r}: expected none of this name in the model, got one"
            )
        if name not in recipes:
            raise ConversionRefused(f"tensor {name[:120]!r}: expected it in the source, got none")
        if recipes[name].shape != shapes[name]:
            raise ConversionRefused(f"tensor {name!r}: expected {shapes[name]}, got {recipes[name].shape}")
        if recipes[name].source.dtype not in ("F32", "F16", "BF16"):
            raise ConversionRefused(f"tensor {name!r}: expected floats, got {recipes[name].source.dtype}")


def _put(recipes: Recipes, name: str, recipe: Recipe) -> None:
    if name in recipes:
        raise ConversionRefused(f"tensor {name[:120]!r}: expected one source for it, got two")
    recipes[name] = recipe


def _unknown(name: str, what: str) -> ConversionRefused:
    return ConversionRefused(f"tensor {name[:120]!r}: expected one of {what}, got this name")
