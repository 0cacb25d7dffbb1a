"""What this machine does with a release: tokens per second, seconds per report, memory, and the bus's limit.

Writing one answer reads the language model once per token, so memory bandwidth over its bytes bounds the
tokens per second of one answer; several at once share the reading. The bandwidth of a CPU is measured with a
sum over a large array, that of a GPU with copies in its memory.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from client.serving.engine import Ask, Options, Result, Token

if TYPE_CHECKING:
    from client.serving.decoding import BatchDecoder
    from client.serving.source import ReleaseSource

Progress = Callable[[str, int, int], None]


def measure(
    source: ReleaseSource, *, reports: int, tokens: int, threads: int, use_card: bool, progress: Progress
) -> dict[str, Any]:
    """Load the release in this process and write made-up studies, one by one and all at once."""
    import torch

    from client.serving.canary import canary_pictures
    from client.serving.launch import engine_plan
    from client.serving.merging import merge_bytes
    from client.serving.picture import prepared
    from client.serving.plan import find_device
    from client.serving.source import open_decoder
    from common.model.images import read_processor

    torch.set_num_threads(threads)
    plan = engine_plan(source, max_batch=min(8, reports), use_card=use_card)
    started = time.monotonic()
    engine = open_decoder(source, plan, threads=threads, default_tokens=tokens)
    loaded_s = time.monotonic() - started
    processor = read_processor(source.base)
    pixels = [prepared(picture, processor) for picture in canary_pictures()]
    options = Options(max_new_tokens=tokens, stop_loops=False)

    def asks(name: str) -> list[Ask]:
        return [Ask(f"{name}-{i}", pixels[i % len(pixels)], "cough", options) for i in range(reports)]

    _write(engine, asks("warm")[:1])
    alone = []
    for done, ask in enumerate(asks("alone")):
        alone.append(_write(engine, [ask]))
        progress("one by one", done + 1, reports)
    together = _write(engine, asks("together"))
    again = [_write(engine, [ask]) for ask in asks("alone")[-8:]]
    first_new, first_again = (statistics.median(one["first_s"] for one in some) for some in (alone, again))
    weights = engine.bytes_per_token
    peak = _peak(plan.device)  # before the bus is measured, which takes memory of its own
    bandwidth = _bandwidth(plan.device)
    written = sum(one["tokens"] for one in alone)
    seconds = sum(one["seconds"] for one in alone)
    return {
        "device": find_device(use_card=use_card).name,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "threads": threads,
        "engine": f"llama.cpp {source.gguf}" if source.gguf else "transformers",
        "merged_copy_bytes": 0 if source.merged is None else merge_bytes(source.base),
        "load_s": round(loaded_s, 2),
        "weights_bytes": weights,
        "tokens_per_s_1": written / seconds,
        "tokens_per_cpu_s_1": written / sum(one["cpu_s"] for one in alone),
        "tokens_per_cpu_s_batch": together["tokens"] / together["cpu_s"],
        "tokens_per_s_batch": together["tokens"] / together["seconds"],
        "batch": plan.max_batch,
        "seconds_per_report": seconds / reports,
        "tokens_per_report": written / reports,
        "first_token_s": first_new,
        "first_token_known_image_s": first_again,
        "peak_memory_bytes": peak,
        "memory_bandwidth_bytes_per_s": bandwidth,
        "bandwidth_limit_tokens_per_s": bandwidth / weights,
    }


def bench_text(value: dict[str, Any]) -> str:
    """Say a measurement in lines."""
    limit, got = value["bandwidth_limit_tokens_per_s"], value["tokens_per_s_1"]
    known, peak = value["first_token_known_image_s"], value["peak_memory_bytes"] / 2**30
    weights, bus = value["weights_bytes"], value["memory_bandwidth_bytes_per_s"]
    threads = f", {value['threads']} thread(s)" if value["device"] == "CPU" else ""
    many = value["tokens_per_cpu_s_batch"]
    packed = "" if value["quantization"] == "none" else f" and {value['quantization']}"
    lines = [
        f"{value['engine']}, {value['device']}{threads}, {value['dtype']}{packed}",
        f"one report    {got:8.1f} tokens/s; the memory bus allows {limit:.1f} ({100 * got / limit:.0f} %)",
        f"memory bus    {bus / 1e9:8.1f} GB/s measured; each token reads {weights / 1e6:.1f} MB of weights",
        f"{value['batch']} at once     {value['tokens_per_s_batch']:8.1f} tokens/s",
        f"a CPU-second  {value['tokens_per_cpu_s_1']:8.1f} tokens, {many:.1f} together",
        f"report        {value['seconds_per_report']:8.2f} s, {value['tokens_per_report']:.0f} tokens",
        f"first token   {value['first_token_s']:8.3f} s, {known:.3f} s for a known image",
        f"peak memory   {peak:8.2f} GiB, loaded in {value['load_s']:.1f} s",
    ]
    if value["merged_copy_bytes"]:
        lines.append(f"merged copy   {value['merged_copy_bytes'] / 1e6:8.1f} MB of disk")
    return "\n".join(lines)


def _write(engine: BatchDecoder, asks: list[Ask]) -> dict[str, float]:
    started, cpu, first_s, tokens = time.monotonic(), time.process_time(), 0.0, 0
    for number, ask in enumerate(asks):
        engine.submit(number, ask)
    while not engine.idle:
        for _, event in engine.step():
            if isinstance(event, Token):
                first_s = first_s or time.monotonic() - started
            elif isinstance(event, Result):
                tokens += len(event.token_ids)
    cpu_s = time.process_time() - cpu
    return {"seconds": time.monotonic() - started, "cpu_s": cpu_s, "first_s": first_s, "tokens": tokens}


def _bandwidth(device: str) -> float:
    """Measure how many bytes per second the device's memory gives, the best of five."""
    import torch

    size = 64 << 20
    held = torch.ones(size, device=device)
    best = 0.0
    for _ in range(5):
        _settle(device)
        started = time.perf_counter()
        if device == "cpu":
            held.sum()
            moved = held.numel() * 4
        else:
            held.clone()
            moved = held.numel() * 8
        _settle(device)
        best = max(best, moved / (time.perf_counter() - started))
    return best


def _settle(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _peak(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    return int(torch.cuda.max_memory_allocated())
