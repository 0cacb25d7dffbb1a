"""How an engine runs on the device at hand: a pure decision from what the device is.

Nothing here ran on a GPU of the Volta kind; the figures behind the limits are in docs/serving.md.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What was found: `cpu` or `cuda`, its memory, and the CUDA capability (major, minor)."""

    kind: str
    memory_bytes: int
    capability: tuple[int, int] = (0, 0)
    name: str = ""


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
        "cuda:0",
        "float16",
        "nf4" if quantized else "none",
        "sdpa",
        rows,
        left // 4,
        min(256 << 20, left // 16),
        why,
    )


def find_device() -> Device:
    """Look at this machine's first GPU, or its CPU; a GPU that this torch was not built for is not one."""
    import os

    import torch

    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(0)
        built = {one.removeprefix("sm_") for one in torch.cuda.get_arch_list() if one.startswith("sm_")}
        if f"{capability[0]}{capability[1]}" in built or any(
            one[:-1] == str(capability[0]) and int(one[-1]) <= capability[1] for one in built
        ):
            facts = torch.cuda.get_device_properties(0)
            return Device("cuda", int(facts.total_memory), capability, str(facts.name))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory, name="CPU")
