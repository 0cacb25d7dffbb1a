"""Random models in the published forms of LLaVA-Rad and LLaVA-Med v1.5, written as their authors' tools do.

The language models, the LoRA adapter and the CLIP tower are saved by transformers, peft and torch; only the
names that those projects gave their parts are spelt out here.
"""

from __future__ import annotations

import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

LINEARS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Size:
    """Widths of a model; the defaults are small."""

    hidden: int = 128
    wide: int = 256
    heads: int = 2
    kv_heads: int = 2
    layers: int = 2
    vocabulary: int = 300
    eyes: int = 128
    eyes_layers: int = 3
    eyes_wide: int = 512
    pixels: int = 56
    rank: int = 4


RAD_TRUE = Size(4096, 11008, 32, 32, 1, 32000, 768, 2, 3072, 518, 64)
MED_TRUE = Size(4096, 14336, 32, 8, 1, 32000, 1024, 2, 4096, 336)


def write_llava_rad(
    folder: Path, size: Size, *, kind: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Write adapter, projector, tower and `vicuna-7b-v1.5/`; returns the same model, LoRA merged."""
    torch.manual_seed(1)
    text = LlamaConfig(**_text(size))
    eyes = Dinov2Config(
        hidden_size=size.eyes,
        num_hidden_layers=size.eyes_layers,
        num_attention_heads=size.eyes // 64,
        mlp_ratio=size.eyes_wide // size.eyes,
        image_size=size.pixels,
        patch_size=14,
        use_mask_token=False,
        layerscale_value=0.3,
    )
    model = _llava(text, eyes, size)
    _round(model, kind)
    vicuna = folder / "vicuna-7b-v1.5"
    vicuna.mkdir(parents=True)
    language = LlamaForCausalLM(text)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    language.to(kind)
    _write_bins(vicuna, language.state_dict())
    (vicuna / "config.json").write_text(json.dumps(text.to_dict() | {"model_type": "llama"}))
    (vicuna / "tokenizer.model").write_bytes(pieces_file(size.vocabulary))

    config = LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=LINEARS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(language.float(), config)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(folder, safe_serialization=False)
        merged = tuned.merge_and_unload()
    model.model.language_model.load_state_dict(merged.model.state_dict())
    projector = {
        f"base_model.model.model.mm_projector.{at}.{part}": getattr(layer, part).detach().to(kind)
        for at, layer in (
            (0, model.model.multi_modal_projector.linear_1),
            (2, model.model.multi_modal_projector.linear_2),
        )
        for part in ("weight", "bias")
    }
    torch.save(projector, folder / "non_lora_trainables.bin")
    tower = {
        f"module.{name}": tensor.to(kind)
        for name, tensor in open_clip_names(model.model.vision_tower.state_dict()).items()
    }
    tower["module.text.transformer.embeddings.weight"] = torch.ones(3)
    tower["module.logit_scale"] = torch.tensor(1.0)
    torch.save(
        {"epoch": 7, "state_dict": tower, "optimizer": {"lr": 0.1}},
        folder / "biomedclipcxr_518_checkpoint.pt",
    )
    own = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(own | {"mm_vision_tower": "biomedclip_cxr_518"}))
    return model


def write_llava_med(
    folder: Path, size: Size, *, kind: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Write sharded safetensors with Mistral, projector and CLIP tower; returns the same model."""
    torch.manual_seed(2)
    text = MistralConfig(**_text(size), rope_theta=1e6, sliding_window=None)
    eyes = CLIPVisionConfig(
        hidden_size=size.eyes,
        intermediate_size=size.eyes_wide,
        num_hidden_layers=size.eyes_layers,
        num_attention_heads=size.eyes // 64,
        image_size=size.pixels,
        patch_size=14,
    )
    model = _llava(text, eyes, size)
    _round(model, kind)
    folder.mkdir(parents=True)
    language = MistralForCausalLM(text)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    tensors = {name: tensor.to(kind) for name, tensor in language.state_dict().items()}
    for at, layer in (
        (0, model.model.multi_modal_projector.linear_1),
        (2, model.model.multi_modal_projector.linear_2),
    ):
        for part in ("weight", "bias"):
            tensors[f"model.mm_projector.{at}.{part}"] = getattr(layer, part).detach().to(kind)
    for name, tensor in model.model.vision_tower.state_dict().items():
        tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor.to(kind)
    write_safetensors_shards(folder, tensors, shards=3)
    own = text.to_dict() | {
        "model_type": "llava_mistral",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "tokenizer.model").write_bytes(pieces_file(size.vocabulary))
    return model


def write_safetensors_shards(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int) -> None:
    """Write tensors into numbered files with an index."""
    names = sorted(tensors)
    places: dict[str, str] = {}
    for at in range(shards):
        file = f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
        part = names[at::shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an HF Dinov2 state to open_clip's trunk, with q, k and v in one tensor."""
    named: dict[str, torch.Tensor] = {}
    for original, tensor in state.items():
        name = original
        for new, old in (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("encoder.layer.", "blocks."),
            ("layernorm.", "norm."),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("attention.o_proj", "attn.proj"),
        ):
            name = name.replace(new, old)
        if ".attention.q_proj." in name:
            parts = [state[original.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            named["visual.trunk." + name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif ".attention.k_proj." not in name and ".attention.v_proj." not in name:
            named["visual.trunk." + name] = tensor
    return named


def pieces_file(count: int) -> bytes:
    """A SentencePiece model with `count` entries: control tokens, bytes, letters, a few merges, fillers."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] if count > 290 else []
    normal = ["▁", *"abcdefghijklmnop", "▁a", "ab", "▁ab", "no", "▁no"]
    normal += [f"▁filler{at}" for at in range(count)]
    pieces += [(text, -float(at), 1) for at, text in enumerate(normal)]
    return b"".join(_field(1, _piece(*piece)) for piece in pieces[:count])


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])


def _field(number: int, data: bytes) -> bytes:
    length, encoded = len(data), b""
    while length > 127:
        encoded += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([length]) + data


def _text(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.wide,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
    }


def _llava(text: Any, eyes: Any, size: Size) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=eyes.to_dict(),
        text_config=text.to_dict(),
        image_token_index=size.vocabulary,  # the published models have no row for it
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.1)
    return model


def _round(model: Any, kind: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind).float()


def _write_bins(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    places: dict[str, str] = {}
    for at in (1, 2):
        file = f"pytorch_model-{at:05d}-of-00002.bin"
        part = names[at - 1 :: 2]
        torch.save({name: state[name].clone() for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
