"""The privacy ledger: caps, idempotence, damage, kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import budget as budget_module
from client.budget import Budget, BudgetLimits, Charge, read_summary
from common.errors import (
    BudgetBusy,
    BudgetCorrupt,
    BudgetExceeded,
    BudgetMismatch,
    PlanInvalid,
    RoundAlreadyServed,
)
from common.privacy.mechanism import Mode, PrivacyPlan, View
from tests.client import budget_crash
from tests.common.privacy.checks import plan_of

AMPLE = BudgetLimits(epsilon=1000.0, delta=1e-5)
SEED = bytes(range(32))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def charge(
    budget: Budget,
    study: str = "s",
    *,
    round: int = 0,
    attempt: int = 0,
    plan: PrivacyPlan | None = None,
    **changes: Any,
) -> Charge:
    plan = plan or plan_of()
    fields: dict[str, Any] = {
        "request_sha256": sha(f"request {study} {round} {attempt}"),
        "data_sha256": sha("data"),
        "seed": hashlib.sha256(os.urandom(8)).digest(),
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.site_noise,
        "local_steps": plan.local_steps,
    }
    return budget.charge(study, round=round, attempt=attempt, **(fields | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budget.jsonl"


# --- charging ---------------------------------------------------------------------------------------------


def test_a_charge_is_on_disk_when_it_returns(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        charge(budget, round=3, attempt=1)
        last = json.loads(path.read_bytes().splitlines()[-1].rsplit(b" ", 1)[0])["entry"]
        assert (last["kind"], last["round"], last["attempt"]) == ("charge", 3, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_suffix(".seeds").stat().st_mode) == 0o600


def test_the_same_request_gets_the_same_seed_and_is_charged_once_across_restarts(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        first = charge(budget)
        again = charge(budget)
        assert (first.repeated, again.repeated) == (False, True)
        assert first.seed == again.seed
    with Budget.open(path, AMPLE) as budget:
        assert charge(budget) == Charge(first.seed, repeated=True)
        assert budget.summary().studies[0].charges == 1


def test_another_request_or_other_data_for_a_charged_round_is_refused(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        charge(budget)
        with pytest.raises(RoundAlreadyServed, match="another request"):
            charge(budget, request_sha256=sha("other"))
        with pytest.raises(RoundAlreadyServed, match="another data"):
            charge(budget, data_sha256=sha("other"))
        assert budget.summary().studies[0].charges == 1


def test_an_earlier_round_is_refused_after_a_later_one(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        charge(budget, round=2, attempt=1)
        for round, attempt in ((2, 0), (1, 5), (0, 0)):
            with pytest.raises(RoundAlreadyServed, match="later one"):
                charge(budget, round=round, attempt=attempt)
        charge(budget, round=2, attempt=2)


def test_seeds_of_old_rounds_are_erased_and_never_in_the_ledger(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        seeds = [charge(budget, round=r).seed for r in range(4)]
        with pytest.raises(RoundAlreadyServed, match="erased"):
            charge(budget, round=0)
        assert charge(budget, round=2).seed == seeds[2]
        assert charge(budget, round=3).seed == seeds[3]
    kept = path.with_suffix(".seeds").read_text()
    assert seeds[0].hex() not in kept and seeds[1].hex() not in kept
    assert all(seed.hex() not in path.read_text() for seed in seeds)


def test_a_mechanism_other_than_the_committed_one_is_refused(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        with pytest.raises(BudgetMismatch, match="no committed"):
            charge(budget)
        budget.commit("s", plan_of())
        for change in ({"sampling_rate": 0.06}, {"noise_multiplier": 0.9}, {"local_steps": 2}):
            with pytest.raises(BudgetMismatch, match="mechanism"):
                charge(budget, **change)
        with pytest.raises(BudgetMismatch, match="another plan"):
            budget.commit("s", plan_of(rounds=11))
        with pytest.raises(BudgetMismatch, match="plain"):
            budget.commit("p", plan_of(mode=Mode.PLAIN, site_noise=0.0, release_noise=0.0))
        budget.commit("s", plan_of())
        assert len(budget.summary().studies) == 1


# --- caps -------------------------------------------------------------------------------------------------


def test_a_study_stops_hard_at_its_plan(path: Path) -> None:
    plan = plan_of(rounds=2, spare_rounds=1)
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan)
        for attempt in range(3):
            charge(budget, attempt=attempt)
        before = path.read_bytes()
        with pytest.raises(BudgetExceeded, match="all of its 3"):
            charge(budget, attempt=3)
        assert path.read_bytes() == before
        assert budget.spent("s") == pytest.approx(plan.epsilon(View.SITE))


def test_studies_are_composed_and_the_one_too_many_is_refused(path: Path) -> None:
    plan = plan_of()
    alone = plan.epsilon(View.SITE)
    both = plan_of(rounds=20).epsilon(View.SITE)
    with Budget.open(path, BudgetLimits(epsilon=(alone + both) / 2, delta=1e-5)) as budget:
        budget.commit("a", plan)
        with pytest.raises(BudgetExceeded, match="would commit"):
            budget.commit("b", plan)
        charge(budget, "a")
        budget.end("a")  # gives back nine rounds
        budget.commit("b", plan)
        with pytest.raises(BudgetExceeded, match="ended"):
            charge(budget, "a", round=1)
        with pytest.raises(BudgetMismatch, match="ended"):
            budget.commit("a", plan)
        summary = budget.summary()
    assert summary.epsilon_committed == pytest.approx(plan_of(rounds=11).epsilon(View.SITE), rel=1e-3)
    assert summary.epsilon_spent == pytest.approx(plan_of(rounds=1).epsilon(View.SITE), rel=1e-3)


def test_limits_lowered_after_commitment_stop_the_next_charge(path: Path) -> None:
    plan = plan_of()
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan)
        charge(budget, round=0)
    two_rounds = plan_of(rounds=2).epsilon(View.SITE)
    with Budget.open(path, BudgetLimits(epsilon=two_rounds * 1.001, delta=1e-5)) as budget:
        charge(budget, round=1)
        with pytest.raises(BudgetExceeded, match="would bring"):
            charge(budget, round=2)
        assert charge(budget, round=1).repeated  # what is paid for can be recomputed
    with Budget.open(path, AMPLE) as budget:
        charge(budget, round=2)


def test_summary_says_spent_committed_and_left(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        for round in range(4):
            charge(budget, round=round)
        summary = budget.summary()
        assert read_summary(path, AMPLE) == summary  # also while it is open
    (row,) = summary.studies
    assert (row.charges, row.charges_left, row.open) == (4, 6, True)
    assert row.epsilon_spent == pytest.approx(plan_of(rounds=4).epsilon(View.SITE))
    assert row.epsilon_committed == pytest.approx(plan_of().epsilon(View.SITE))
    assert row.epsilon_left == row.epsilon_committed - row.epsilon_spent > 0
    assert summary.epsilon_left == pytest.approx(1000.0 - row.epsilon_committed)


def test_an_absent_ledger_reads_as_empty(path: Path) -> None:
    assert read_summary(path, AMPLE).studies == ()
    assert not path.exists()


def test_limits_must_be_finite() -> None:
    for epsilon, delta in ((0.0, 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PlanInvalid):
            BudgetLimits(epsilon=epsilon, delta=delta)


def test_a_charge_takes_under_50_ms_of_cpu(path: Path) -> None:
    with Budget.open(path, AMPLE) as budget:
        for study in ("a", "b", "c"):
            budget.commit(study, plan_of(rounds=500))
        start = time.process_time()
        for round in range(60):
            for study in ("a", "b", "c"):
                charge(budget, study, round=round)
        assert (time.process_time() - start) / 180 < 0.05


# --- damage -----------------------------------------------------------------------------------------------


def filled(path: Path, rounds: int = 3) -> bytes:
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        for round in range(rounds):
            charge(budget, round=round)
    return path.read_bytes()


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return filled(tmp_path_factory.mktemp("ledger") / "budget.jsonl", rounds=2)


@pytest.mark.parametrize("torn", [b'{"entry":{"kind":"cha', b"\0" * 300, b"{"])
def test_a_torn_tail_is_removed_and_the_rest_kept(path: Path, torn: bytes) -> None:
    whole = filled(path)
    path.write_bytes(whole + torn)
    with Budget.open(path, AMPLE) as budget:
        assert path.read_bytes() == whole
        assert budget.summary().studies[0].charges == 3
        charge(budget, round=3)
    assert path.read_bytes().startswith(whole)


def test_every_way_to_cut_the_last_line_loses_that_line_only(path: Path, two_rounds: bytes) -> None:
    whole = two_rounds
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in [*range(start, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with Budget.open(path, AMPLE) as budget:
            assert len(budget._accounts["s"].served) == 1
        assert path.read_bytes() == whole[:start]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_altered_byte_is_refused(two_rounds: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "budget.jsonl"
        whole = bytearray(two_rounds)
        place = data.draw(st.integers(0, len(whole) - 2))  # the last newline is a torn tail, not damage
        value = data.draw(st.integers(0, 255).filter(lambda v: v != whole[place]))
        whole[place] = value
        path.write_bytes(whole)
        with pytest.raises(BudgetCorrupt):
            Budget.open(path, AMPLE).close()
        assert path.read_bytes() == whole


def test_a_line_removed_repeated_or_moved_is_refused(path: Path) -> None:
    lines = filled(path).splitlines(keepends=True)
    for altered in (
        lines[1:],
        [lines[0], *lines[2:]],
        [*lines, lines[-1]],
        [lines[0], lines[2], lines[1], lines[3]],
    ):
        path.write_bytes(b"".join(altered))
        with pytest.raises(BudgetCorrupt):
            Budget.open(path, AMPLE)


def test_a_second_process_is_refused(path: Path) -> None:
    with Budget.open(path, AMPLE), pytest.raises(BudgetBusy):
        Budget.open(path, AMPLE)
    Budget.open(path, AMPLE).close()


def test_a_failed_write_stops_the_ledger_until_it_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, data[:10], offset)

    real: Callable[[int, bytes, int], int] = os.pwrite
    with Budget.open(path, AMPLE) as budget:
        budget.commit("s", plan_of())
        whole = path.read_bytes()
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(BudgetCorrupt, match="10 of"):
            charge(budget)
        monkeypatch.undo()
        with pytest.raises(BudgetCorrupt, match="open it again"):
            charge(budget)
    with Budget.open(path, AMPLE) as budget:
        assert path.read_bytes() == whole
        assert not charge(budget).repeated


def test_a_closed_ledger_takes_no_charge(path: Path) -> None:
    budget = Budget.open(path, AMPLE)
    budget.commit("s", plan_of())
    budget.close()
    with pytest.raises(BudgetCorrupt, match="closed"):
        charge(budget)


# --- kill -9 ----------------------------------------------------------------------------------------------


def test_kill_9_at_random_fifty_times_never_leaves_the_ledger_below_what_was_released(tmp_path: Path) -> None:
    budget_crash.check_ledger_covers_releases(budget_module, tmp_path, kills=50, seed=0)


def test_death_before_and_after_each_system_call_never_leaves_the_ledger_below_what_was_released(
    tmp_path: Path,
) -> None:
    budget_crash.check_ledger_survives_each_system_call(budget_module, tmp_path)


@pytest.mark.slow
def test_the_crash_worker_also_runs_as_a_program_of_its_own(tmp_path: Path) -> None:
    """One kill of a real process, not a fork, between charge and reply."""
    process = subprocess.Popen([sys.executable, "-m", "tests.client.budget_crash", str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and budget_crash.releases(tmp_path) == []:
            time.sleep(0.02)
        time.sleep(random.Random(1).uniform(0, 0.05))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert budget_crash.releases(tmp_path)
    budget_crash.verify_covered(budget_module, tmp_path)
