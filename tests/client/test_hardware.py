from __future__ import annotations

import pytest

from client.hardware import (
    GIB,
    BaseSize,
    Card,
    Precision,
    Wheel,
    check_architecture,
    check_driver,
    choose_plan,
    largest_card,
    measure_base,
    plan_memory,
    wheel_for,
)

V100_16 = Card("Tesla V100-SXM2-16GB", (7, 0), 16_935_682_048, "580.95.05")
V100_32 = Card("Tesla V100-SXM2-32GB", (7, 0), 34_079_899_648, "580.95.05")
T4 = Card("Tesla T4", (7, 5), 15_828_320_256, "580.95.05")
H200 = Card("NVIDIA H200", (9, 0), 150_754_820_096, "580.95.05")
P100 = Card("Tesla P100-PCIE-16GB", (6, 0), 17_066_885_120, "580.95.05")

# As in ../shared/notes/v100.md: the cu126 build has Volta, CUDA 13 builds begin with Turing.
CU126 = Wheel("2.13.0+cu126", "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CU130 = Wheel("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"))
CPU = Wheel("2.13.0+cpu", "", ())
PTX = Wheel("x", "12.6", ("sm_75", "sm_80", "compute_80"))

# LLaVA-Rad and LLaVA-Med v1.5 are of this size: a 7B language model, a ViT tower, a two-layer projector.
SEVEN_B = BaseSize(
    name="llava-7b", language=6_476_271_616, embeddings=262_144_000, vision=303_507_456, projector=20_979_712,
    layers=32, hidden=4096, inner=11_008, vocabulary=32_000, key_values=2 * 4096,
)  # fmt: skip


@pytest.mark.parametrize(
    ("card", "wheel", "holds"),
    [
        (V100_16, CU126, True), (V100_32, CU126, True), (V100_16, CU130, False), (V100_32, CU130, False),
        (T4, CU126, True), (T4, CU130, True), (H200, CU126, True), (H200, CU130, True), (H200, CPU, False),
        (P100, CU130, False), (P100, CU126, False), (H200, PTX, True), (V100_16, PTX, False),
    ],
)  # fmt: skip
def test_a_wheel_runs_on_a_card_that_it_was_built_for(card: Card, wheel: Wheel, holds: bool) -> None:
    assert check_architecture(card, wheel).holds is holds


def test_a_v100_with_a_cuda_13_wheel_is_told_which_wheel_to_take() -> None:
    verdict = check_architecture(V100_16, CU130)
    assert "sm_70" in verdict.seen
    assert "cu126" in verdict.todo
    assert "torch==2.10.0" in verdict.todo


def test_code_of_an_older_card_of_the_same_family_runs_and_of_a_newer_one_does_not() -> None:
    only_70 = Wheel("x", "12.6", ("sm_70",))
    only_75 = Wheel("x", "12.6", ("sm_75",))
    assert check_architecture(T4, only_70).holds
    assert not check_architecture(V100_16, only_75).holds
    assert not check_architecture(H200, Wheel("x", "12.6", ("sm_80",))).holds


def test_ptx_is_compiled_for_a_newer_card() -> None:
    verdict = check_architecture(H200, Wheel("x", "12.6", ("sm_70", "compute_80")))
    assert verdict.holds
    assert "compiled from compute_80" in verdict.seen
    assert "compiled" not in check_architecture(H200, Wheel("x", "12.6", ("compute_80", "sm_90"))).seen


def test_architectures_with_a_suffix_are_understood() -> None:
    """`a` is for one capability alone, `f` for its family (CUDA's compilation guide)."""
    newer = Card("a newer one", (10, 3), 1 << 37)
    for text, on_h200, on_newer in (
        ("sm_90a", True, False), ("compute_90a", True, False), ("compute_90", True, True),
        ("sm_100f", False, True), ("compute_100f", False, True), ("sm_100a", False, False),
    ):  # fmt: skip
        wheel = Wheel("x", "13.0", (text,))
        found = (check_architecture(H200, wheel).holds, check_architecture(newer, wheel).holds)
        assert found == (on_h200, on_newer), text
    assert not check_architecture(H200, Wheel("x", "13.0", ("gfx90a",))).holds


@pytest.mark.parametrize(
    ("card", "words"),
    [(V100_16, "cu126"), (T4, "cu130"), (H200, "cu130"), (None, "CPU"), (P100, "not supported")],
)
def test_each_card_has_its_wheel(card: Card | None, words: str) -> None:
    assert words in wheel_for(card)


@pytest.mark.parametrize(
    ("driver", "wheel", "card", "holds"),
    [
        ("580.95.05", CU126, V100_16, True), ("535.104", CU126, V100_16, True), ("535.104", CU130, T4, False),
        ("580.65", CU130, T4, True), ("590.10", CU126, V100_16, False), ("590.10", CU130, T4, True),
        ("", CU126, V100_16, False), ("470.1", CU126, V100_16, False),
    ],
)  # fmt: skip
def test_a_driver_is_new_enough_for_cuda_and_not_too_new_for_volta(
    driver: str, wheel: Wheel, card: Card, holds: bool
) -> None:
    from dataclasses import replace

    verdict = check_driver(replace(card, driver=driver), wheel)
    assert verdict.holds is holds
    assert bool(verdict.todo) is not holds


@pytest.mark.parametrize(
    ("card", "precision", "trains"),
    [
        (V100_32, Precision.FLOAT16, True),
        (V100_16, Precision.NF4, True),
        (T4, Precision.NF4, True),
        (H200, Precision.FLOAT16, True),
    ],
)
def test_a_7b_base_trains_in_float16_on_32_gb_and_in_nf4_on_16_gb(
    card: Card, precision: Precision, trains: bool
) -> None:
    plan = choose_plan(SEVEN_B, card)
    assert (plan.precision, plan.trains, plan.infers) == (precision, trains, True)


def test_computed_memory_of_a_7b_base_is_in_the_range_of_the_notes() -> None:
    """17 to 22 GB for LoRA on float16, 8 to 10 GB on NF4 (batch 1, 2,048 tokens, checkpointing)."""
    half = plan_memory(SEVEN_B, precision=Precision.FLOAT16, available=32 * GIB)
    quantised = plan_memory(SEVEN_B, precision=Precision.NF4, available=16 * GIB)
    assert 17e9 < half.training < 22e9
    assert 7.5e9 < quantised.training < 10e9
    assert 13.6e9 < half.inference < 17e9


def test_without_a_card_the_cpu_computes_in_float32() -> None:
    plan = choose_plan(SEVEN_B, None, host_bytes=64 * GIB)
    assert plan.precision is Precision.FLOAT32
    assert plan.trains
    assert not choose_plan(SEVEN_B, None, host_bytes=8 * GIB).infers


def test_a_card_before_volta_is_not_used() -> None:
    assert choose_plan(SEVEN_B, P100, host_bytes=64 * GIB).precision is Precision.FLOAT32


def test_a_small_base_trains_in_float16_on_16_gb() -> None:
    small = BaseSize("small", 4 * 10**8, 5 * 10**7, 9 * 10**7, 2 * 10**6, 24, 960, 2560, 49_152, 640)
    assert choose_plan(small, T4).precision is Precision.FLOAT16


def test_the_tiny_base_is_measured_from_its_files() -> None:
    import json

    from common.model.manifest import tensor_shapes
    from common.model.tiny import tiny_base_directory

    directory = tiny_base_directory()
    size = measure_base("tiny", json.loads((directory / "config.json").read_text()), tensor_shapes(directory))
    total = sum(int(__import__("math").prod(shape)) for shape in tensor_shapes(directory).values())
    assert size.weights == total
    assert min(size.language, size.embeddings, size.vision, size.projector) > 0
    assert choose_plan(size, None, host_bytes=4 * GIB).trains


def test_the_largest_card_is_planned_for() -> None:
    assert largest_card([V100_16, V100_32]) is V100_32
    assert largest_card([P100, V100_16]) is V100_16
    assert largest_card([]) is None


@pytest.mark.parametrize("card", [V100_16, V100_32, T4, H200])
def test_drafting_takes_the_precision_that_the_doctor_names(card: Card) -> None:
    from client.serving.plan import Device, plan_engine

    device = Device("cuda", card.memory_bytes, card.capability, card.name)
    engine = plan_engine(
        device, weights=SEVEN_B.weights, kv_bytes_per_token=2 * SEVEN_B.layers * SEVEN_B.key_values
    )
    plan = choose_plan(SEVEN_B, card)
    assert (engine.quantization == "nf4") is (plan.precision is Precision.NF4)
