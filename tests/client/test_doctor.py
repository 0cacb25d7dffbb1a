from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client.doctor import (
    BaseFacts,
    CertificateFacts,
    DataFacts,
    Finding,
    MachineFacts,
    ServerFacts,
    SiteFacts,
    State,
    check_certificate,
    check_clock,
    check_server,
    examine,
    worst,
)
from client.hardware import GIB, Card, Wheel
from tests.client.test_hardware import CPU, CU126, CU130, H200, SEVEN_B, T4, V100_16, V100_32

ROOT = Path(__file__).parents[2]
PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0", "flwr": "1.41.0"}
NOW = 1_800_000_000.0
WELL = SiteFacts(
    now_unix_s=NOW,
    machine=MachineFacts(
        python="3.11.7", packages=PACKAGES, cards=(V100_32,), wheel=CU126, kernel="ok",
        memory_bytes=128 * GIB, disk_free_bytes={"/srv": 200 * GIB},
    ),
    site="north",
    certificate=CertificateFacts(NOW - 86_400, NOW + 6 * 86_400, NOW + 3.6 * 86_400),
    server=ServerFacts(
        "fedrad.example.org:443", "", ("192.0.2.7",), date_unix_s=NOW, asked_unix_s=NOW, took_s=0.2
    ),
    data=DataFacts("/srv/data", patients="500-999"),
    bases=(BaseFacts("llava-rad", "/srv/base", SEVEN_B, pinned_by=("chest",)),),
)  # fmt: skip


def machine(**changes: object) -> SiteFacts:
    return replace(WELL, machine=replace(WELL.machine, **changes))  # type: ignore[arg-type]


def named(facts: SiteFacts, check: str, *, gpu: bool = False) -> Finding:
    (finding,) = [one for one in examine(facts, gpu_required=gpu) if one.check == check]
    return finding


def test_a_well_site_has_nothing_to_repair() -> None:
    findings = examine(WELL)
    assert worst(findings) is State.OK, [one for one in findings if one.state is not State.OK]
    assert not [one for one in findings if one.todo]


def test_whatever_is_not_well_comes_with_what_to_do() -> None:
    broken = [
        machine(cards=(), wheel=CPU), machine(wheel=CU130), machine(wheel=CPU), machine(wheel=None),
        machine(kernel="RuntimeError"), machine(disk_free_bytes={"/srv": GIB}), machine(python="3.9.1"),
        machine(packages={**PACKAGES, "flwr": "1.30.0"}), machine(packages={**PACKAGES, "torch": ""}),
        replace(WELL, home_problem="x"), replace(WELL, key_problems=("x",)),
        replace(WELL, budget_problem="x"),
        replace(WELL, enrolment_problem="x"), replace(WELL, data=DataFacts("/d", "DatasetInvalid")),
        replace(WELL, data=DataFacts("/d", image_missing=True)),
        replace(WELL, bases=(BaseFacts("b", "/b", problem="BaseHashMismatch"),)),
    ]  # fmt: skip
    for facts in broken:
        findings = examine(facts, gpu_required=True)
        assert worst(findings) is State.FAIL
        assert all(one.todo for one in findings if one.state is not State.OK), findings


def test_a_damaged_case_is_a_warning_that_names_its_file() -> None:
    assert named(replace(WELL, damaged_cases=()), "worklist").state is State.OK
    finding = named(replace(WELL, damaged_cases=("expected a whole 0/case.json",)), "worklist")
    assert finding.state is State.WARN and "0/case.json" in finding.todo
    assert not [one for one in examine(WELL) if one.check == "worklist"]


@pytest.mark.parametrize(
    ("card", "wheel", "torch", "words"),
    [
        (V100_16, CU126, State.OK, "nf4"),
        (V100_32, CU126, State.OK, "float16"),
        (V100_16, CU130, State.FAIL, "float32 on the CPU"),
        (V100_32, CPU, State.WARN, "float32 on the CPU"),
        (T4, CU130, State.OK, "nf4"),
        (H200, CU130, State.OK, "float16"),
    ],
)
def test_each_card_with_each_wheel_is_judged(card: Card, wheel: Wheel, torch: State, words: str) -> None:
    facts = machine(cards=(card,), wheel=wheel)
    assert named(facts, "torch").state is torch
    assert words in named(facts, "memory llava-7b").seen


def test_without_a_card_the_cpu_is_named_and_a_failure_only_where_one_is_required() -> None:
    facts = machine(cards=(), wheel=CPU)
    assert named(facts, "gpu").state is State.OK
    assert named(facts, "gpu", gpu=True).state is State.FAIL
    assert "float32 on the CPU" in named(facts, "memory llava-7b").seen


def test_rounds_are_said_to_run_on_the_cpu_while_the_agent_does_so() -> None:
    assert "agent computes its rounds on the CPU" in named(WELL, "rounds llava-7b").seen
    assert named(machine(memory_bytes=16 * GIB), "rounds llava-7b").state is State.FAIL


def test_a_driver_too_new_for_volta_is_named() -> None:
    finding = named(machine(cards=(replace(V100_32, driver="590.10"),)), "driver")
    assert finding.state is State.FAIL
    assert "580" in finding.todo


@pytest.mark.parametrize(
    ("ahead_s", "state"),
    [
        (0, State.OK),
        (-40, State.OK),
        (90, State.WARN),
        (-90, State.WARN),
        (3600, State.FAIL),
        (-3600, State.FAIL),
    ],
)
def test_a_clock_is_judged_both_ways(ahead_s: float, state: State) -> None:
    finding = check_clock(ahead_s)
    assert finding.state is state
    if state is not State.OK:
        assert ("ahead" if ahead_s > 0 else "behind") in finding.seen


@pytest.mark.parametrize(
    ("facts", "state", "words"),
    [
        (CertificateFacts(NOW - 10, NOW + 7 * 86_400, NOW + 4 * 86_400), State.OK, "valid until"),
        (CertificateFacts(NOW - 9 * 86_400, NOW - 1, NOW - 2 * 86_400), State.FAIL, "ended"),
        (CertificateFacts(NOW + 3600, NOW + 7 * 86_400, NOW + 4 * 86_400), State.FAIL, "not valid yet"),
        (CertificateFacts(NOW - 6 * 86_400, NOW + 3600, NOW - 86_400), State.WARN, "overdue"),
        (CertificateFacts(NOW - 5 * 86_400, NOW + 2 * 86_400, NOW - 90_000), State.WARN, "overdue"),
        (CertificateFacts(NOW - 10, NOW + 86_400 * 7, NOW + 1, False), State.FAIL, "another TLS key"),
    ],
)
def test_a_certificate_is_judged_by_its_life_and_key(
    facts: CertificateFacts, state: State, words: str
) -> None:
    finding = check_certificate(facts, now_unix_s=NOW)
    assert finding.state is state
    assert words in finding.seen


@pytest.mark.parametrize(
    ("step", "checks", "todo"),
    [
        ("dns", ["dns"], "DNS"), ("proxy", ["dns", "proxy"], "CONNECT"),
        ("connect", ["dns", "proxy", "connection"], "nothing inbound"),
        ("tls", ["dns", "proxy", "connection", "tls"], "clock"),
        ("answer", ["dns", "proxy", "connection", "tls", "server"], "operator"),
    ],
)  # fmt: skip
def test_the_first_step_that_fails_is_named_and_the_later_ones_are_not(
    step: str, checks: list[str], todo: str
) -> None:
    findings = check_server(ServerFacts("f:443", "proxy:3128", ("192.0.2.7",), step, "no"))
    assert [one.check for one in findings] == checks
    assert [one.state for one in findings] == [State.OK] * (len(checks) - 1) + [State.FAIL]
    assert todo in findings[-1].todo


def test_a_site_that_is_not_enrolled_still_hears_of_its_machine() -> None:
    facts = replace(WELL, home_problem="SiteHomeInvalid: none")
    assert {"software", "gpu", "driver", "torch", "disk", "site"} <= {one.check for one in examine(facts)}


def test_the_command_prints_one_document_and_its_exit_code_says_whether_to_repair(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client.cli", "doctor", "--json", "--home", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    value = json.loads(done.stdout)
    assert done.returncode == 1
    assert value["state"] == "fail"
    assert {"check", "state", "seen", "todo"} == set(value["findings"][0])
    assert [one["check"] for one in value["findings"] if one["state"] == "fail"][-1] == "site"


def test_data_that_this_user_may_not_read_is_told_apart() -> None:
    facts = replace(WELL, data=DataFacts("/d", "PermissionError"))
    assert "read the folder" in named(facts, "data").todo
