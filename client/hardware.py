"""What a card, a driver and a torch build can do together, and how a base fits: pure decisions.

Facts go in, a decision and its reason come out; `client/doctor_facts.py` looks at the machine. Sources: the
wheels' own architecture lists, NVIDIA's driver tables, and memory computed from the base's real tensors.
Nothing here ran on a Volta card: memory is computed (see `plan_memory`), and speed is not predicted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

GIB = 1 << 30
AGENT_TRAINS_ON_CARD = (
    False  # client/models.py loads float32 on the CPU; drafting (client/serving) uses the card
)
VOLTA = (7, 0)
_CONTEXT_BYTES = 3 * GIB // 4  # CUDA context, cuBLAS workspaces and fragmentation of the caching allocator
_NF4_BYTES = 0.516  # per weight with double quantisation: 4 bits, 8 bits per 64, 32 bits per 256 of those
_LORA_SHARE = 0.01  # of the language model's weights, where no study says which tensors are trained
_LAST_VOLTA_DRIVER = 580


class Precision(StrEnum):
    """How the frozen base's language model lies in memory; trainables are always float32."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    NF4 = "nf4"


@dataclass(frozen=True)
class Card:
    """A GPU: its CUDA capability, memory, and the driver's version such as 580.95.05."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    driver: str = ""


@dataclass(frozen=True)
class Wheel:
    """A torch build: `cuda` is its CUDA version or empty, `architectures` such as sm_70 or compute_90."""

    version: str
    cuda: str
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class BaseSize:
    """A base's weights by part, and the widths that its activations follow from."""

    name: str
    language: int
    embeddings: int
    vision: int
    projector: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    key_values: int

    @property
    def weights(self) -> int:
        return self.language + self.embeddings + self.vision + self.projector


@dataclass(frozen=True)
class Verdict:
    """Whether something holds, what was seen and what to do; `todo` is empty where it holds."""

    holds: bool
    seen: str
    todo: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """What a base needs on a card, in bytes, and whether that fits.

    `training` is for one patient at a time with activation checkpointing, `inference` for one answer.
    """

    precision: Precision
    training: int
    inference: int
    available: int
    trainable: int

    @property
    def trains(self) -> bool:
        return self.training <= self.available

    @property
    def infers(self) -> bool:
        return self.inference <= self.available


def check_architecture(card: Card, wheel: Wheel) -> Verdict:
    """Say whether a torch build runs on a card: the one decision, for the doctor, the plans and serving.

    It holds from Volta on, where the build has code for the card itself, for an older one of its family, or
    PTX (compute_…) that the driver compiles. A suffix `a` binds code to its own capability, `f` to its
    family. Without any, torch fails with "no kernel image is available for execution on the device".
    """
    seen = f"{card.name} is sm_{card.capability[0]}{card.capability[1]}; torch {wheel.version} has "
    seen += ", ".join(wheel.architectures) or "no CUDA code"
    if card.capability < VOLTA:
        return Verdict(False, seen, f"install {wheel_for(card)}")
    parsed = [(_parse_architecture(text), text) for text in wheel.architectures]
    fitting = [(one, text) for one, text in parsed if one is not None and one.runs_on(card.capability)]
    if any(not one.compiled_later for one, _ in fitting):
        return Verdict(True, seen)
    if fitting:
        return Verdict(True, f"{seen}; compiled from {fitting[-1][1]} on first use")
    return Verdict(False, seen, f"install {wheel_for(card)}")


def wheel_for(card: Card | None) -> str:
    """Name the torch build for a card, as docs/site-guide.md pins it."""
    if card is None:
        return "torch 2.13.0 for the CPU: pip install 'fedrad[site,cpu]' with the cpu index of PyTorch"
    if card.capability < VOLTA:
        return "nothing: cards before Volta (V100) are not supported; use the CPU"
    if card.capability < (7, 5):
        return (
            "torch 2.13.0 from the cu126 index (pip install 'fedrad[site,volta]' --extra-index-url "
            "https://download.pytorch.org/whl/cu126), or torch==2.10.0 from PyPI behind a PyPI-only mirror: "
            "CUDA 13 builds have no Volta"
        )
    return "torch 2.13.0 for CUDA 13 (pip install 'fedrad[site,cu130]')"


def check_driver(card: Card, wheel: Wheel) -> Verdict:
    """Say whether the driver is new enough for the build's CUDA, and not too new for the card."""
    branch = _leading_number(card.driver)
    cuda = _leading_number(wheel.cuda)
    seen = f"driver {card.driver or 'unknown'} with CUDA {wheel.cuda or 'none'} of torch"
    if branch is None:
        return Verdict(False, seen, "install NVIDIA's driver: `nvidia-smi` must answer")
    if card.capability < (7, 5) and branch > _LAST_VOLTA_DRIVER:
        return Verdict(
            False, seen, f"install driver branch {_LAST_VOLTA_DRIVER}: it is the last one for {card.name}"
        )
    least = {12: 525, 13: 580}.get(cuda or 0, 0)
    if branch < least:
        return Verdict(False, seen, f"install driver {least} or later: CUDA {wheel.cuda} needs it")
    return Verdict(True, seen)


def measure_base(name: str, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> BaseSize:
    """Measure a Llava base from its configuration and its tensors' shapes (common/model/manifest.py)."""
    parts = {"language": 0, "embeddings": 0, "vision": 0, "projector": 0}
    for tensor, shape in shapes.items():
        size = 1
        for dimension in shape:
            size *= dimension
        parts[_part_of(tensor)] += size
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    hidden = int(text.get("hidden_size", 4096))
    heads = int(text.get("num_attention_heads", 32))
    grouped = int(text.get("num_key_value_heads", heads))
    return BaseSize(
        name=name,
        **parts,
        layers=int(text.get("num_hidden_layers", 32)),
        hidden=hidden,
        inner=int(text.get("intermediate_size", 4 * hidden)),
        vocabulary=int(text.get("vocab_size", 32_000)),
        key_values=2 * int(text.get("head_dim") or hidden // heads) * grouped,
    )


def plan_memory(
    base: BaseSize, *, precision: Precision, available: int, tokens: int = 2048, trainable: int | None = None
) -> MemoryPlan:
    """Compute what a base needs at a precision, for sequences of `tokens`.

    Weights, three float32 copies of the trainables (value, one patient's gradient, the sum), the kept inputs
    of all layers, the working set of one layer, logits in float32 with their gradient, the CUDA context.
    """
    wide = 4 if precision is Precision.FLOAT32 else 2
    linear = int(base.language * (_NF4_BYTES if precision is Precision.NF4 else wide))
    weights = linear + wide * (base.embeddings + base.vision + base.projector)
    if trainable is None:
        trainable = base.projector + int(_LORA_SHARE * base.language)
    kept = base.layers * tokens * base.hidden * wide
    layer = tokens * (10 * base.hidden + 6 * base.inner + 2 * base.key_values) * wide
    logits = 2 * tokens * base.vocabulary * 4
    cache = base.layers * tokens * base.key_values * wide
    overhead = _CONTEXT_BYTES if available else 0
    return MemoryPlan(
        precision=precision,
        training=weights + 12 * trainable + kept + layer + logits + overhead,
        inference=weights + 4 * trainable + cache + layer // 4 + overhead,
        available=available,
        trainable=trainable,
    )


def choose_plan(
    base: BaseSize,
    card: Card | None,
    *,
    host_bytes: int = 0,
    tokens: int = 2048,
    trainable: int | None = None,
) -> MemoryPlan:
    """Choose the precision for a base: float16 where training fits, else NF4, else the CPU's float32.

    float16 and not bfloat16, on newer cards too: below capability 8 there is none (torch's
    `is_bf16_supported` counts emulation), and all sites of a study should compute alike.
    """
    if card is None or card.capability < VOLTA:
        return plan_memory(
            base, precision=Precision.FLOAT32, available=host_bytes, tokens=tokens, trainable=trainable
        )
    half = plan_memory(
        base, precision=Precision.FLOAT16, available=card.memory_bytes, tokens=tokens, trainable=trainable
    )
    if half.trains:
        return half
    quantised = plan_memory(
        base, precision=Precision.NF4, available=card.memory_bytes, tokens=tokens, trainable=trainable
    )
    return quantised if quantised.trains or not half.infers else half


def largest_card(cards: Iterable[Card]) -> Card | None:
    """The card to use: of those from Volta on the one with the most memory; None without a card."""
    return max(cards, key=lambda card: (card.capability >= VOLTA, card.memory_bytes), default=None)


def _part_of(tensor: str) -> str:
    if "vision_tower" in tensor or "vision_model" in tensor:
        return "vision"
    if "multi_modal_projector" in tensor:
        return "projector"
    return "embeddings" if "embed_tokens" in tensor or "lm_head" in tensor else "language"


@dataclass(frozen=True)
class _Architecture:
    compiled_later: bool
    built: tuple[int, int]
    suffix: str

    def runs_on(self, capability: tuple[int, int]) -> bool:
        if self.suffix == "a":
            return self.built == capability
        anywhere_newer = self.compiled_later and not self.suffix
        return self.built <= capability and (anywhere_newer or self.built[0] == capability[0])


def _parse_architecture(text: str) -> _Architecture | None:
    found = re.fullmatch(r"(sm|compute)_(\d{1,2})(\d)([af]?)", text)
    return _Architecture(found[1] == "compute", (int(found[2]), int(found[3])), found[4]) if found else None


def _leading_number(version: str) -> int | None:
    found = re.match(r"\d+", version)
    return int(found[0]) if found else None
