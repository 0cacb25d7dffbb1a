"""CPU time of secure aggregation at one site and at the server, beside Flower's SecAgg+ on the same vector.

A site's figure is everything it does in a round (keys, shares, masking, hashing, reveal), the median of the
sites measured; the server's is everything too (checks, hashing and adding each upload, unmasking). With 10
sites all are run and the sum is checked; with 50, three sites mask for real and the other uploads repeat
theirs, which costs the server the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from client.secagg import SiteRound, SiteStage
from common.secagg import messages as m
from common.secagg.context import receipt_message
from common.secagg.masking import Vector
from tests.common.secagg.consortium import ADAPTER, consortium

VALUES = 40_000_000
Progress = Callable[[str], None]


class Stopwatch:
    """Adds up this thread's CPU seconds per name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[..., Any], *values: Any) -> Any:
        start = time.thread_time()
        result = step(*values)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start
        return result


def measure(
    progress: Progress, *, count: int, dropped: int, values: int, masking: int
) -> tuple[float, float]:
    """Run a round of `count` sites of which `dropped` never upload; returns CPU-s (site median, server)."""
    world, clock = consortium(count, length=values), Stopwatch()
    sites, server = {s: world.site(s) for s in world.sites}, world.server()
    vector = np.random.default_rng(1).integers(0, 2**32, values, dtype=np.uint32)
    total, out, buffer = np.zeros(values, np.uint32), np.empty(values, np.uint32), np.empty(values, np.uint32)
    total[:] = out[:] = 0  # touch the pages once, outside the clock
    for name, site in sites.items():
        keys = clock(name, site.advertise)
        clock("server", server.accept_keys, keys)
    key_set = clock("server", server.close_keys)
    for name, site in sites.items():
        shares = clock(name, site.deal, key_set)
        clock("server", server.accept_shares, shares)
    openings = clock("server", partial(server.close_shares, adapter=ADAPTER))
    survivors = world.sites[dropped:]
    measured = survivors[:masking]
    for at, name in enumerate(survivors):
        progress(f"secagg: {count} sites, upload {at + 1} of {len(survivors)}")
        site, opening = sites[name], openings[name]
        clock(name, partial(site.open, adapter=ADAPTER), opening)
        if name in measured:
            buffer[:] = vector
            upload = clock(name, site.mask, buffer)
        else:
            upload = repeat_upload(site, upload, world.signers[name])
        server.announce(upload)
        server.start_adding(name)
        clock("server", server.add, buffer, total)
    survivor_set = clock("server", server.close_uploads)
    progress(f"secagg: {count} sites, unmasking")
    for name in survivors:
        reveal = clock(name, sites[name].reveal, survivor_set)
        clock("server", server.accept_reveal, reveal)
    clock("server", server.unmask, total, out)
    if len(measured) == len(survivors):
        np.multiply(vector, np.uint32(len(survivors)), out=buffer)
        if not np.array_equal(out, buffer):
            raise ArithmeticError("the unmasked sum is not the plain sum")
    return statistics.median(clock.seconds[name] for name in measured), clock.seconds["server"]


def repeat_upload(site: SiteRound, upload: m.Upload, sign: Callable[[bytes], bytes]) -> m.Upload:
    """Let a site announce the vector that another one has masked."""
    signature = sign(receipt_message(upload.context, site=site.site, upload=upload.receipt.upload))
    repeated = replace(upload, receipt=m.Receipt(site.site, upload.receipt.upload, signature))
    site._upload, site.stage = repeated, SiteStage.MASKED
    return repeated


def measure_flower(progress: Progress, vector: Vector, *, count: int) -> float:
    """Return the CPU-s of one Flower SecAgg+ client for the same vector, by its own functions."""
    from flwr.app import ConfigRecord
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    peer: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    progress(f"secagg: Flower SecAgg+, {count} sites")
    settings = {
        Key.SAMPLE_NUMBER: count,
        Key.SHARE_NUMBER: count,
        Key.THRESHOLD: 2 * count // 3 + 1,
        Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32,
        Key.MAX_WEIGHT: 1000.0,
    }
    parameters = ndarrays_to_parameters([(vector.astype(np.float32) / np.float32(2**31)) - 1])
    states, clock = [peer.SecAggPlusState() for _ in range(count)], Stopwatch()
    publics: dict[str, tuple[bytes, bytes]] = {}
    for at, state in enumerate(states):
        state.nid = at + 1
        reply = clock(str(at), peer._setup, state, ConfigRecord(settings))
        publics[str(state.nid)] = (reply[Key.PUBLIC_KEY_1], reply[Key.PUBLIC_KEY_2])
    boxes: list[tuple[int, bytes]] = []
    for at, state in enumerate(states):
        reply = clock(str(at), peer._share_keys, state, publics)
        for target, box in zip(reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST], strict=True):
            if target == 1:
                boxes.append((state.nid, box))
    received = {Key.CIPHERTEXT_LIST: [b for _, b in boxes], Key.SOURCE_LIST: [s for s, _ in boxes]}
    clock("0", peer._collect_masked_vectors, states[0], received, 1000, parameters)
    unmask = {Key.ACTIVE_NODE_ID_LIST: list(range(1, count)), Key.DEAD_NODE_ID_LIST: [count]}
    clock("0", peer._unmask, states[0], unmask)
    return clock.seconds["0"]


def growth(progress: Progress) -> list[tuple[int, int, float, float]]:
    """Measure (sites, values, site CPU-s, server CPU-s), one dropout, for the curve in the docs."""
    rows = []
    for count, values in (
        (5, VALUES),
        (10, VALUES),
        (20, VALUES),
        (50, VALUES),
        (10, 4_000_000),
        (10, 400_000),
    ):
        site, server = measure(progress, count=count, dropped=1, values=values, masking=2)
        rows.append((count, values, site, server))
    return rows


def run(progress: Progress) -> dict[str, float]:
    """Measure 10 sites with one dropout, 50 with three, and Flower's client with 10, at 40 million values."""
    site_10, server_10 = measure(progress, count=10, dropped=1, values=VALUES, masking=9)
    site_50, server_50 = measure(progress, count=50, dropped=3, values=VALUES, masking=3)
    vector = np.random.default_rng(1).integers(0, 2**32, VALUES, dtype=np.uint32)
    return {
        "secagg_site_cpu_s_40m_10": round(site_10, 3),
        "secagg_server_cpu_s_40m_10": round(server_10, 3),
        "secagg_site_cpu_s_40m_50": round(site_50, 3),
        "secagg_server_cpu_s_40m_50": round(server_50, 3),
        "flower_secagg_site_cpu_s_40m_10": round(measure_flower(progress, vector, count=10), 3),
    }
