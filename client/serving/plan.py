"""How an engine runs on the device at hand: a pure decision from what the device is.

Nothing here ran on a GPU of the Volta kind; the figures behind the limits are in docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from client.hardware import VOLTA, Card, Wheel, check_architecture, largest_card
from common.errors import ServingRefused

_GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What is computed on: `cpu` or `cuda` number `index`, its memory, and the CUDA capability."""

    kind: str
    memory_bytes: int
    capability: tuple[int, int] = (0, 0)
    name: str = ""
    index: int = 0


class GgufType(StrEnum):
    """How llama.cpp's file stores matrices; vectors are always float32."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


@dataclass(frozen=True)
class EnginePlan:
    """`dtype` of the base's weights and `quantization` (`none` or `nf4`); caches in bytes."""

    device: str
    dtype: str
    quantization: str
    attention: str
    max_batch: int
    prefix_bytes: int
    feature_bytes: int
    why: str


def plan_engine(device: Device, *, weights: int, kv_bytes_per_token: int, max_batch: int = 8) -> EnginePlan:
    """Choose precision and caches for a base of that many weights.

    fp32 on a CPU. On a GPU float16, as below capability 8 there is no bf16 (V100) and above it changes
    nothing for a released adapter; NF4 where float16 weights leave under a third of the memory free.
    `kv_bytes_per_token` is that of one answer in float16 (half of what float32 takes).
    """
    if device.kind == "cpu":
        spare = min(2 * _GIB, max(64 << 20, device.memory_bytes // 8))
        return EnginePlan(
            "cpu", "float32", "none", "sdpa", max_batch, spare, spare // 4, "a CPU computes in float32"
        )
    half = 2 * weights
    quantized = half > device.memory_bytes * 2 // 3
    held = int(0.6 * weights) if quantized else half
    left = max(0, device.memory_bytes - held - _GIB)
    rows = max(1, min(max_batch, left // 2 // max(1, 2048 * kv_bytes_per_token)))
    why = f"{half / _GIB:.1f} GiB of float16 weights on {device.memory_bytes / _GIB:.0f} GiB"
    return EnginePlan(
        f"cuda:{device.index}",
        "float16",
        "nf4" if quantized else "none",
        "sdpa",
        rows,
        left // 4,
        min(256 << 20, left // 16),
        why,
    )


def choose_device(cards: Sequence[Card], wheel: Wheel, *, host_bytes: int, use_card: bool = True) -> Device:
    """Choose the largest card from Volta on, or the CPU where there is none.

    `cards` are in torch's order. Raises ServingRefused for a card that this torch build has no code for:
    drafting on the CPU beside a card is slow by far, so it is done only when told (`use_card` False).
    """
    card = largest_card(cards) if use_card else None
    if card is None or card.capability < VOLTA:
        return Device("cpu", host_bytes, name="CPU")
    verdict = check_architecture(card, wheel)
    if not verdict.holds:
        raise ServingRefused(f"{verdict.seen}: {verdict.todo}; or draft on the CPU with --cpu")
    return Device("cuda", card.memory_bytes, card.capability, card.name, list(cards).index(card))


def find_device(*, use_card: bool = True) -> Device:
    """Look at this machine's cards and its memory; raises ServingRefused, see `choose_device`."""
    import os

    import torch

    cards = []
    if use_card and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            cards.append(Card(str(facts.name), (facts.major, facts.minor), int(facts.total_memory)))
    wheel = Wheel(str(torch.__version__), torch.version.cuda or "", tuple(torch.cuda.get_arch_list()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return choose_device(cards, wheel, host_bytes=memory, use_card=use_card)
