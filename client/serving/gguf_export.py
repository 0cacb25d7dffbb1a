"""The language model of a merged release as a GGUF file, as llama.cpp reads it.

Guarantees: a file is written only for what llama.cpp's architecture `llama` computes (Llama and Mistral with
plain rotary positions and no biases); anything else is refused by name. One tensor is in memory at a time.
The file holds no vocabulary: ids go in and come out, and the base's own tokenizer stays in charge. Vision
tower and projector stay with transformers: their picture tokens go in as embeddings. Whether the file
computes the same is not said here but measured: `gguf_parity`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.serving.plan import GgufType
from common.errors import BaseInvalid, ServingRefused
from common.model.manifest import memory_name, tensor_shapes

Array = NDArray[np.float32]
_PREFIX = "model.language_model."
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama that its GGUF header carries."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_theta: float


def llama_shape(config: dict[str, Any]) -> LlamaShape:
    """Read a Llava's text configuration; raises ServingRefused for what llama.cpp's `llama` is not."""
    text = config.get("text_config", {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    turning = rope.get("rope_type") or rope.get("type") or "default"
    hidden, heads = int(text.get("hidden_size", 4096)), int(text.get("num_attention_heads", 32))
    head_size = int(text.get("head_dim") or hidden // heads)
    positions, window = int(text.get("max_position_embeddings", 2048)), text.get("sliding_window")
    for what, got in (
        ("a Llama or Mistral", text.get("model_type") not in ("llama", "mistral") and text.get("model_type")),
        ("plain rotary positions", turning != "default" and turning),
        ("SiLU", text.get("hidden_act", "silu") != "silu" and text["hidden_act"]),
        ("no biases", (text.get("attention_bias") or text.get("mlp_bias")) and "biases"),
    ):
        if got:
            raise ServingRefused(f"llama.cpp: expected {what} in the base's language model, got {got}")
    return LlamaShape(
        layers=int(text.get("num_hidden_layers", 32)),
        hidden=hidden,
        inner=int(text.get("intermediate_size", 11_008)),
        heads=heads,
        key_value_heads=int(text.get("num_key_value_heads", heads)),
        head_size=head_size,
        vocabulary=int(text.get("vocab_size", 32_000)),
        positions=min(positions, int(window)) if window else positions,
        epsilon=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 10_000.0))),
    )


def export_gguf(merged: Path, out: Path, *, kind: GgufType, name: str) -> LlamaShape:
    """Write a merged checkpoint's language model to `out`; returns its shape.

    Raises ServingRefused or BaseInvalid. `name` goes into the header, for whoever finds the file.
    """
    import gguf

    shape = llama_shape(json.loads((merged / "config.json").read_bytes()))
    writer = gguf.GGUFWriter(out, "llama")
    try:
        writer.add_name(name)
        writer.add_block_count(shape.layers)
        writer.add_context_length(shape.positions)
        writer.add_embedding_length(shape.hidden)
        writer.add_feed_forward_length(shape.inner)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.key_value_heads)
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
        writer.add_rope_dimension_count(shape.head_size)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_layer_norm_rms_eps(shape.epsilon)
        writer.add_vocab_size(shape.vocabulary)
        writer.add_tokenizer_model("none")
        writer.add_file_type(_file_type(kind))
        placed = list(_places(merged, shape))
        for place in placed:
            data_type = _data_type(kind, place.shape)
            rows = gguf.quants.quant_shape_to_byte_shape(place.shape, data_type)
            bytes_per_row = {"F32": 4, "F16": 2}.get(data_type.name, 1)
            size = int(np.prod(rows)) if bytes_per_row == 1 else int(np.prod(place.shape)) * bytes_per_row
            raw = data_type.name not in ("F32", "F16")
            writer.add_tensor_info(
                place.name,
                rows if raw else place.shape,
                np.dtype(np.uint8 if raw else np.float16 if data_type.name == "F16" else np.float32),
                size,
                raw_dtype=data_type if raw else None,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place in placed:
            writer.write_tensor_data(gguf.quants.quantize(place.read(), _data_type(kind, place.shape)))
    finally:
        writer.close()
    return shape


@dataclass(frozen=True)
class _Place:
    """One tensor: where it is read, and what it is called and looks like in the file."""

    name: str
    source: Path
    key: str
    shape: tuple[int, ...]
    rotated_heads: int

    def read(self) -> Array:
        from safetensors import safe_open

        with safe_open(self.source, framework="np") as file:
            array: Array = file.get_tensor(self.key).astype(np.float32)
        if not self.rotated_heads:
            return array
        # llama.cpp turns pairs of neighbours, transformers halves: the rows of each head are interleaved
        halves = array.reshape(self.rotated_heads, 2, -1, array.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _places(merged: Path, shape: LlamaShape) -> Iterator[_Place]:
    """Find every tensor of the language model; raises BaseInvalid for an unknown or a missing one."""
    from safetensors import safe_open

    known = tensor_shapes(merged)
    where: dict[str, tuple[Path, str]] = {}
    for path in sorted(merged.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            where |= {memory_name(key): (path, key) for key in file.keys()}  # noqa: SIM118
    wanted = {f"{_PREFIX}embed_tokens.weight": "token_embd", f"{_PREFIX}norm.weight": "output_norm"}
    if "lm_head.weight" in known:  # else the embedding is read for it, in both
        wanted["lm_head.weight"] = "output"
    for layer in range(shape.layers):
        for theirs, ours in _NAMES.items():
            wanted[f"{_PREFIX}layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}"
    language = {key for key in known if key.startswith(_PREFIX)}
    for key in sorted((language - wanted.keys()) | (wanted.keys() - known.keys())):
        raise BaseInvalid(f"{merged}: expected the tensors of a Llama, got {key} besides or not at all")
    for key, name in wanted.items():
        heads = shape.heads if name.endswith("attn_q") else shape.key_value_heads
        rotated = heads if name.endswith(("attn_q", "attn_k")) else 0
        path, stored = where[key]
        yield _Place(f"{name}.weight", path, stored, known[key], rotated)


def _data_type(kind: GgufType, shape: tuple[int, ...]) -> Any:
    import gguf

    if len(shape) == 1 or (kind is GgufType.Q8_0 and shape[-1] % 32):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[kind.name]


def _file_type(kind: GgufType) -> int:
    import gguf

    names = {GgufType.F32: "ALL_F32", GgufType.F16: "MOSTLY_F16", GgufType.Q8_0: "MOSTLY_Q8_0"}
    return int(gguf.LlamaFileType[names[kind]])
