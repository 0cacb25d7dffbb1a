"""Old decided cases go at the start and every hour; nothing undecided goes; the log names nobody."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from client.serving.retention import DAY_S, keep_purging
from client.serving.worklist import Case, Patient, Worklist

START_S = 1_800_000_000


class Clock:
    """Seconds since 1970 that only sleeping moves on; the last sleep never ends."""

    def __init__(self, sleeps: int) -> None:
        self.now_s, self._left = float(START_S), sleeps
        self.slept: list[float] = []

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        if not self._left:
            raise asyncio.CancelledError
        self._left -= 1
        self.slept.append(seconds)
        self.now_s += seconds


def add(worklist: Worklist, name: str, *, decided_s: int | None) -> Case:
    patient = Patient(name="Made Up", id="MRN-1")
    case = worklist.add(
        name.encode(), kind="png", source="upload", received_s=START_S - 90 * DAY_S, indication="Cough.",
        patient=patient,
    )  # fmt: skip
    if decided_s is not None:
        worklist.decide(case.id, {"time_s": decided_s}, accepted=True)
    return case


def run(worklist: Worklist, clock: Clock, *, keep_days: int = 30) -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keep_purging(worklist, keep_s=keep_days * DAY_S, wall_s=clock.wall_s, sleep=clock.sleep))


def test_what_was_decided_long_ago_goes_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worklist = Worklist(tmp_path / "w")
    old = add(worklist, "old", decided_s=START_S - 31 * DAY_S)
    new = add(worklist, "new", decided_s=START_S - 29 * DAY_S)
    waiting = add(worklist, "waiting", decided_s=None)
    with caplog.at_level(logging.INFO, "fedrad.serving"):
        run(worklist, Clock(0))
    assert {case.id for case in worklist.cases()} == {new.id, waiting.id}
    assert caplog.messages == ["worklist: 1 decided cases older than 30 days deleted"]
    assert not any(word in caplog.text for word in ("Made Up", "MRN", old.id))
    assert sorted(path.name for path in worklist.directory.iterdir()) == sorted([new.id, waiting.id])


def test_a_case_goes_in_the_hour_after_its_term(tmp_path: Path) -> None:
    worklist, clock = Worklist(tmp_path), Clock(2)
    add(worklist, "one", decided_s=START_S - 30 * DAY_S + 3599)
    add(worklist, "two", decided_s=START_S - 30 * DAY_S + 7201)
    run(worklist, clock)
    assert clock.slept == [3600.0, 3600.0]
    assert [case.patient.name for case in worklist.cases()] == ["Made Up"]


def test_a_purge_that_was_killed_is_finished_and_what_a_crash_left_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worklist = Worklist(tmp_path)
    kept = add(worklist, "kept", decided_s=None)
    half = tmp_path / f".gone-{'0' * 32}"
    torn = tmp_path / ("1" * 32)
    for folder in (half, torn):
        folder.mkdir()
        (folder / "picture").write_bytes(b"identified")
    os.utime(torn, (START_S - 31 * DAY_S,) * 2)
    with caplog.at_level(logging.INFO, "fedrad.serving"):
        run(worklist, Clock(0))
    assert caplog.messages == ["worklist: 1 pictures that a crash left over 30 days ago deleted"]
    assert [path.name for path in tmp_path.iterdir()] == [kept.id]


@pytest.mark.parametrize("held", [b"{", b"[]", b'{"time_s": "soon"}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["case.json", "decision.json"])
def test_a_damaged_case_does_not_keep_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, held: bytes
) -> None:
    worklist, clock = Worklist(tmp_path), Clock(1)
    cases = [add(worklist, one, decided_s=START_S - 31 * DAY_S) for one in ("a", "b", "c")]
    (tmp_path / cases[1].id / name).write_bytes(held)
    with caplog.at_level(logging.WARNING, "fedrad.serving"):
        run(worklist, clock)
    assert [path.name for path in tmp_path.iterdir()] == [cases[1].id]
    assert caplog.messages == ["worklist: 1 cases are damaged and are not forgotten"] * 2
    assert not any(case.id in caplog.text for case in cases)


def test_a_clock_that_fails_does_not_end_the_forgetting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with one turn, the next one takes place."""
    worklist, clock = Worklist(tmp_path), Clock(1)
    add(worklist, "old", decided_s=START_S - 31 * DAY_S)
    clock.now_s = float("nan")

    async def sleep(seconds: float) -> None:
        await Clock.sleep(clock, seconds)
        clock.now_s = START_S

    with (
        caplog.at_level(logging.WARNING, "fedrad.serving"),
        pytest.raises(asyncio.CancelledError),
    ):
        asyncio.run(keep_purging(worklist, keep_s=30 * DAY_S, wall_s=clock.wall_s, sleep=sleep))
    assert caplog.messages == ["worklist: old cases stay for now: ValueError"]
    assert worklist.cases() == []


def test_a_disk_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worklist, clock = Worklist(tmp_path / "w"), Clock(1)
    worklist.directory.rmdir()
    with caplog.at_level(logging.WARNING, "fedrad.serving"):
        run(worklist, clock)
    assert caplog.messages == ["worklist: old cases stay for now: FileNotFoundError"] * 2
