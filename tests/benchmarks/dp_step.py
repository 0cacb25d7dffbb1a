"""The per-patient step against the non-private step and Opacus, on one Llava with LoRA in one process.

Batch 16, 128 tokens, rank 16. Every variant runs forward, per-sample losses, backward, and leaves one summed
gradient in float32 or better; the private ones clip it by patient. Noise and optimizer are the same for all
and left out. Times are CPU seconds of this process, the best of several interleaved rounds. Memory is the
peak of PyTorch's own allocations during one step; the engine's float64 totals, which stay, count too.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

BATCH, TOKENS, ROUNDS, CLIP = 16, 128, 7, 0.1


def run(progress: Callable[[str], None]) -> dict[str, float]:
    """`*_ratio`: CPU time over that of the non-private step; `dp_step_memory_ratio`: peak memory likewise."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps, trainable_values = _steps()
        for name, step in steps.items():
            progress(f"dp_step warm-up {name}")
            step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(ROUNDS):
            for name, step in steps.items():
                progress(f"dp_step {turn + 1}/{ROUNDS} {name}")
                start = time.process_time()
                step()
                times[name].append(time.process_time() - start)
        peaks = {name: _peak_bytes(steps[name]) for name in ("plain", "own")}
        peaks["own"] += 8 * trainable_values
    best = {name: min(values) for name, values in times.items()}
    return {
        "dp_step_ratio": best["own"] / best["plain"],
        "dp_step_memory_ratio": peaks["own"] / peaks["plain"],
        "opacus_hooks_ratio": best["hooks"] / best["plain"],
        "opacus_functorch_ratio": best["functorch"] / best["plain"],
        "opacus_ghost_ratio": best["ghost"] / best["plain"],
    }


def _steps() -> tuple[dict[str, Callable[[], Any]], int]:
    import torch
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    from client.gradients import PatientGradients, patient_loss, per_sample_loss
    from tests.client.llava import LlavaSize, llava_with_lora, random_batch, trainable

    size = LlavaSize(
        vocabulary=2048,
        hidden=256,
        layers=4,
        vision_hidden=192,
        image_pixels=84,
        rank=16,
        intermediate=688,
    )
    batch = random_batch(size, samples=BATCH, tokens=TOKENS)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    rows = torch.arange(BATCH)

    def losses(model: Any) -> Any:
        return per_sample_loss(model(**inputs).logits, batch["labels"])

    plain_model = llava_with_lora(size)

    def plain() -> None:
        losses(plain_model).mean().backward()
        plain_model.zero_grad(set_to_none=True)

    own_model = llava_with_lora(size)
    engine = PatientGradients(own_model, trainable(own_model))

    def own() -> None:
        with engine.microbatch(units=BATCH, row_to_unit=rows):
            patient_loss(losses(own_model), rows).backward()
        engine.accumulate(CLIP)

    def opacus(model: Any) -> Callable[[], None]:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            losses(model).sum().backward()
            norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters], 1).norm(dim=1)
            factors = (CLIP / (norms + 1e-6)).clamp(max=1.0)
            for p in parameters:
                p.grad = torch.einsum("i,i...", factors, p.grad_sample)
                p.grad_sample = None
            model.zero_grad(set_to_none=True)

        return step

    ghost_model: Any = GradSampleModuleFastGradientClipping(
        llava_with_lora(size), batch_first=True, loss_reduction="sum", max_grad_norm=CLIP, strict=False
    )

    def ghost() -> None:
        each = losses(ghost_model)
        each.sum().backward(retain_graph=True)
        ghost_model.zero_grad(set_to_none=True)
        factors = ghost_model.get_clipping_coef()
        ghost_model.disable_hooks()
        (factors * each).sum().backward()
        ghost_model.enable_hooks()
        ghost_model.zero_grad(set_to_none=True)

    hooks = GradSampleModule(llava_with_lora(size), batch_first=True, loss_reduction="sum", strict=False)
    functorch = GradSampleModule(
        llava_with_lora(size), batch_first=True, loss_reduction="sum", strict=False, force_functorch=True
    )
    steps: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "own": own,
        "hooks": opacus(hooks),
        "functorch": opacus(functorch),
        "ghost": ghost,
    }
    return steps, sum(p.numel() for _, p in trainable(own_model))


def _peak_bytes(step: Callable[[], Any]) -> int:
    """Peak of the running sum of all CPU allocations and frees of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e for e in events if e.name() == "[memory]"]
    level = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        level += change.nbytes()
        peak = max(peak, level)
    return peak
