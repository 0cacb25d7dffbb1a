"""An agent's step around the ledger, to be killed at any instant: charge, touch data, release, next round.

`check_ledger_covers_releases` is what the ledger must pass and its mutants must fail.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.common.privacy.checks import plan_of

ROUNDS = 20_000
_DATA = hashlib.sha256(b"data").hexdigest()


def work(budget_module: Any, directory: Path, *, until: int = ROUNDS) -> None:
    """Serve rounds: each is charged, computed from its seed, released, and then the next comes."""
    plan = plan_of(rounds=ROUNDS, site_noise=50.0, release_noise=50.0)
    limits = budget_module.BudgetLimits(epsilon=100.0, delta=1e-5)
    with budget_module.Budget.open(directory / "budget.jsonl", limits) as budget:
        budget.commit("s", plan)
        done = releases(directory)
        while len(done) < until:
            round = done[-1][0] + 1 if done else 0
            request = hashlib.sha256(b"request %d" % round).hexdigest()
            charge = budget.charge(
                "s",
                round=round,
                attempt=0,
                request_sha256=request,
                data_sha256=_DATA,
                seed=os.urandom(32),
                sampling_rate=plan.sampling_rate,
                noise_multiplier=plan.site_noise,
            )
            time.sleep(random.SystemRandom().uniform(0, 0.0005))  # data is touched
            done.append((round, hashlib.sha256(charge.seed).hexdigest()))
            with (directory / "released").open("ab") as out:
                out.write(b"%d %s\n" % (round, done[-1][1].encode()))


def releases(directory: Path, *, repair: bool = True) -> list[tuple[int, str]]:
    """(round, hash of its seed) of all that was released; a line cut by the kill was not."""
    path = directory / "released"
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].decode().splitlines()
    if repair and len(data) != data.rfind(b"\n") + 1:
        path.write_bytes(data[: data.rfind(b"\n") + 1])
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def verify_covered(budget_module: Any, directory: Path) -> int:
    """Every release has its charge, with that seed; no round was released under two seeds."""
    limits = budget_module.BudgetLimits(epsilon=100.0, delta=1e-5)
    with budget_module.Budget.open(directory / "budget.jsonl", limits) as budget:
        served = budget._accounts["s"].served if "s" in budget._accounts else {}
    out = releases(directory)
    for round, seed_sha256 in out:
        charged = served.get((round, 0))
        assert charged is not None, f"round {round} was released and is not in the ledger"
        assert charged["seed_sha256"] == seed_sha256, f"round {round} was released under another seed"
    assert len({round for round, _ in out}) == len(out), "a round was served twice"
    return len(out)


def check_ledger_covers_releases(budget_module: Any, directory: Path, *, kills: int, seed: int) -> None:
    """Kill the worker `kills` times at random instants; after each, the ledger must cover the releases."""
    draw = random.Random(seed)
    for _ in range(kills):
        before = len(releases(directory))
        child = _fork(lambda: work(budget_module, directory))
        deadline = time.monotonic() + 30
        while len(releases(directory, repair=False)) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert verify_covered(budget_module, directory) > before, (
            "the worker was killed before it did anything"
        )


def check_ledger_survives_each_system_call(budget_module: Any, directory: Path) -> None:
    """Die before and after each write, sync and rename of one round: the ledger covers the releases."""
    calls = ("pwrite", "fsync", "replace", "open", "write")
    work(budget_module, directory, until=0)
    committed = (directory / "budget.jsonl").read_bytes()
    for step in range(1000):
        child = _fork(lambda step=step: _die_at(step, calls, lambda: work(budget_module, directory, until=2)))
        _, status = os.waitpid(child, 0)
        verify_covered(budget_module, directory)
        finished = not os.WIFSIGNALED(status)
        for name in ("budget.seeds", "released"):
            (directory / name).unlink(missing_ok=True)
        (directory / "budget.jsonl").write_bytes(committed)
        if finished:
            assert step > 20, "too few system calls were seen"
            return
    raise AssertionError("the worker never finished")


def _die_at(step: int, calls: tuple[str, ...], body: Callable[[], None]) -> None:
    left = [step]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for after in (False, True):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                if not after:
                    result = call(*args, **kwargs)
            return result

        return wrapped

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    body()


def _fork(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return child


if __name__ == "__main__":
    from client import budget

    work(budget, Path(sys.argv[1]))
