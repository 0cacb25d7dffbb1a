"""Precision and caches follow from the device; listening and users from what was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client.doctor import MachineFacts, State, check_gpu
from client.hardware import Card, Wheel
from client.serving.launch import Launch, Tls, is_loopback, verify_listening
from client.serving.limits import RateLimit
from client.serving.plan import Device, choose_device, find_device, plan_engine
from client.serving.source import ReleaseSource, format_source, parse_source
from common.errors import ServingRefused, TooManyRequests

GIB = 1 << 30
SEVEN_B, KV = 7_000_000_000, 512 << 10


@pytest.mark.parametrize(
    ("device", "dtype", "quantization"),
    [
        (Device("cpu", 16 * GIB), "float32", "none"),
        (Device("cuda", 32 * GIB, (7, 0)), "float16", "none"),
        (Device("cuda", 16 * GIB, (7, 0)), "float16", "nf4"),
        (Device("cuda", 16 * GIB, (7, 5)), "float16", "nf4"),
        (Device("cuda", 80 * GIB, (9, 0)), "float16", "none"),
    ],
)
def test_seven_billion_weights_are_planned_by_the_card(device: Device, dtype: str, quantization: str) -> None:
    plan = plan_engine(device, weights=SEVEN_B, kv_bytes_per_token=KV)
    assert (plan.dtype, plan.quantization, plan.attention) == (dtype, quantization, "sdpa")
    held = 4 * SEVEN_B if dtype == "float32" else 2 * SEVEN_B if quantization == "none" else 0.6 * SEVEN_B
    if device.kind == "cuda":
        rows = plan.max_batch * 2048 * KV
        assert plan.max_batch >= 1
        assert held + rows + plan.prefix_bytes + plan.feature_bytes < device.memory_bytes


V100_16 = Card("Tesla V100-SXM2-16GB", (7, 0), 16 * GIB)
V100_32 = Card("Tesla V100-SXM2-32GB", (7, 0), 32 * GIB)
H100 = Card("NVIDIA H100", (9, 0), 80 * GIB)
P100 = Card("Tesla P100-PCIE-16GB", (6, 0), 16 * GIB)
CU126 = Wheel("2.13.0+cu126", "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CU130 = Wheel("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"))
PTX = Wheel("x", "12.6", ("sm_70", "sm_80", "compute_80"))
CPU_ONLY = Wheel("2.13.0+cpu", "", ())


@pytest.mark.parametrize(
    ("cards", "wheel", "device"),
    [
        ([V100_16], CU126, Device("cuda", 16 * GIB, (7, 0), V100_16.name)),
        ([V100_16, V100_32], CU126, Device("cuda", 32 * GIB, (7, 0), V100_32.name, 1)),
        ([H100], CU130, Device("cuda", 80 * GIB, (9, 0), H100.name)),
        ([H100], PTX, Device("cuda", 80 * GIB, (9, 0), H100.name)),
        ([P100, V100_16], CU126, Device("cuda", 16 * GIB, (7, 0), V100_16.name, 1)),
        ([P100], CU126, Device("cpu", 64 * GIB, name="CPU")),
        ([], CPU_ONLY, Device("cpu", 64 * GIB, name="CPU")),
    ],
)
def test_drafting_takes_the_card_that_the_doctor_takes(
    cards: list[Card], wheel: Wheel, device: Device
) -> None:
    assert choose_device(cards, wheel, host_bytes=64 * GIB) == device
    machine = MachineFacts("3.11.9", {}, tuple(cards), wheel, memory_bytes=64 * GIB)
    failed = [one for one in check_gpu(machine) if one.check == "torch" and one.state is State.FAIL]
    assert bool(failed) is (device.kind == "cpu" and bool(cards))
    if device.kind == "cuda":
        assert plan_engine(device, weights=10**8, kv_bytes_per_token=KV).device == f"cuda:{device.index}"


@pytest.mark.parametrize("wheel", [CU130, Wheel("x", "12.6", ("sm_80", "compute_75"))])
def test_a_v100_with_a_build_without_volta_is_refused_and_not_left_idle(wheel: Wheel) -> None:
    with pytest.raises(ServingRefused, match=r"sm_70.*cu126.*--cpu"):
        choose_device([V100_16], wheel, host_bytes=64 * GIB)
    told = choose_device([V100_16], wheel, host_bytes=64 * GIB, use_card=False)
    assert told.kind == "cpu"


def test_this_machine_has_a_device() -> None:
    assert find_device(use_card=False).kind == "cpu"
    assert find_device(use_card=False).memory_bytes > GIB // 4


def test_a_source_crosses_to_the_worker_and_back() -> None:
    for merged in (None, Path("/m")):
        source = ReleaseSource(Path("/r"), Path("/b"), 3, "ab", True, merged)
        assert parse_source(format_source(source)) == source


LAUNCH = Launch(folder=Path("/h"), source=ReleaseSource(Path("/r"), Path("/b")))
TLS = Tls(Path("c"), Path("k"))


@pytest.mark.parametrize(
    ("changes", "has_tokens", "said"),
    [
        ({"host": "0.0.0.0"}, True, "loopback address"),  # noqa: S104
        ({"host": "10.0.0.5", "beyond_loopback": True}, True, "TLS"),
        ({"host": "10.0.0.5", "beyond_loopback": True, "tls": TLS}, False, "users"),
        ({"host": "10.0.0.5", "beyond_loopback": True, "tls": TLS, "open_to": "x"}, True, "--open"),
    ],
)
def test_listening_beyond_loopback_needs_to_be_asked_for_in_full(
    changes: dict[str, object], has_tokens: bool, said: str
) -> None:
    with pytest.raises(ServingRefused, match=said):
        verify_listening(replace(LAUNCH, **changes), has_tokens=has_tokens)  # type: ignore[arg-type]


def test_what_was_asked_for_in_full_may_listen() -> None:
    verify_listening(LAUNCH, has_tokens=False)
    verify_listening(replace(LAUNCH, host="::1", open_to="local"), has_tokens=False)
    wide = replace(LAUNCH, host="10.0.0.5", beyond_loopback=True, tls=TLS)
    verify_listening(wide, has_tokens=True)
    verify_listening(replace(wide, tls=replace(TLS, client_ca=Path("ca"))), has_tokens=False)
    assert [is_loopback(h) for h in ("127.0.0.9", "localhost", "::1", "10.0.0.1", "host")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_user_who_asks_too_fast_waits_and_others_do_not() -> None:
    limit = RateLimit(per_minute=60, burst=3)
    for _ in range(3):
        limit.take("a", now_s=0.0)
    with pytest.raises(TooManyRequests, match="ask again in 1 s"):
        limit.take("a", now_s=0.1)
    limit.take("b", now_s=0.1)
    limit.take("a", now_s=1.2)
    with pytest.raises(TooManyRequests):
        limit.take("a", now_s=1.3)
