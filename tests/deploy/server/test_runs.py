"""Which studies start, wait, are tried again or stay ended; over a Control that only remembers."""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from common.ledger.entries import RevocationReason
from deploy.local.control import RunStatus
from deploy.server.app import NODES_NAME, OUTCOME_NAME
from deploy.server.runs import StudyRuns, is_held, resume
from server.enrolment import revoke
from server.submission import find_submitted
from tests.deploy.server.test_endpoint import Scene

ALIVE = RunStatus(finished=False, completed=False, text="running", details="")
ENDED = RunStatus(finished=True, completed=False, text="finished:failed", details="")


@dataclass
class Flower:
    """What the SuperLink would say; not our code."""

    started: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    status: dict[int, RunStatus] = field(default_factory=dict)
    unfinished: list[int] = field(default_factory=list)

    def start_run(self, fab: Path, config: dict[str, Any]) -> int:
        self.started.append(config)
        self.status[len(self.started)] = ALIVE
        return len(self.started)

    def run_status(self, run_id: int) -> RunStatus:
        return self.status[run_id]

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def unfinished_runs(self) -> list[int]:
        return self.unfinished


@dataclass
class Stage:
    scene: Scene
    flower: Flower
    runs: StudyRuns
    now: list[float]
    decided_s: int = 0

    @property
    def directory(self) -> Path:
        return self.scene.submitted.directory

    def approve(self, *sites: str) -> None:
        for site in sites:
            self.decided_s += 1
            self.scene.decide(site, "approve", decided_s=self.decided_s)

    def withdraw(self, site: str) -> None:
        self.decided_s += 1
        self.scene.decide(site, "withdraw", decided_s=self.decided_s)

    def tick(self, after_s: float = 1.0) -> str:
        self.now[0] += after_s
        return str(self.runs.tick({"north": 1, "south": 2, "west": 3})["chest"]["state"])

    def begin(self) -> None:
        """Let every site approve and the ServerApp write its first line."""
        self.approve("north", "south")
        self.tick()
        (self.directory / "log.jsonl").write_text('{"event": "started"}\n')

    def revoke(self, site: str) -> None:
        now, home = datetime.now(UTC), self.scene.home
        revoke(home, self.scene.authority, site, reason=RevocationReason.LEFT, now=now)

    def said(self) -> dict[str, Any]:
        return self.runs.tick({"north": 1, "south": 2, "west": 3})["chest"]

    def nodes(self) -> dict[str, int]:
        nodes: dict[str, int] = json.loads((self.directory / NODES_NAME).read_text())
        return nodes

    def end(self, state: str = "", reason: str = "") -> None:
        if state:
            (self.directory / OUTCOME_NAME).write_text(json.dumps({"state": state, "reason": reason}))
        self.flower.status[len(self.flower.started)] = ENDED


@pytest.fixture()
def stage(tmp_path: Path) -> Stage:
    scene, flower, now = Scene(tmp_path), Flower(), [0.0]
    runs = StudyRuns(scene.home, flower, clock=lambda: now[0])  # type: ignore[arg-type]
    return Stage(scene, flower, runs, now)


def test_a_study_starts_once_when_every_site_has_approved(stage: Stage) -> None:
    assert stage.tick() == "waiting"
    stage.approve("north")
    assert stage.tick() == "waiting" and not stage.flower.started
    stage.approve("south")
    assert [stage.tick(), stage.tick()] == ["running", "running"]
    assert stage.flower.started == [{"study-dir": str(stage.directory)}]
    assert json.loads((stage.directory / NODES_NAME).read_text()) == {"north": 1, "south": 2}


def test_a_finished_study_stays_finished(stage: Stage) -> None:
    stage.approve("north", "south")
    stage.tick()
    stage.end("finished")
    assert [stage.tick(), stage.tick(1e6)] == ["finished", "finished"]
    assert len(stage.flower.started) == 1


def test_a_server_app_that_dies_without_a_word_is_started_again_after_a_pause(stage: Stage) -> None:
    stage.approve("north", "south")
    stage.tick()
    with (stage.directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_held(stage.directory)
        assert stage.tick(60.0) == "running"
    assert not is_held(stage.directory)
    assert stage.tick(1.0) == "running"
    assert stage.tick(10.0) == "retrying"
    assert stage.flower.stopped == [1]
    assert stage.tick(6.0) == "running"
    assert len(stage.flower.started) == 2


def test_pauses_grow_to_the_policys_longest(stage: Stage) -> None:
    stage.approve("north", "south")
    stage.tick()
    for pause in (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0):
        stage.end("failed", "RoundFailed: expected at least 2 sites ready")
        assert stage.tick(0.1) == "retrying"
        assert stage.tick(pause - 1.0) == "retrying", pause
        assert stage.tick(1.1) == "running", pause


@pytest.mark.parametrize(
    "reason",
    [
        "BaseHashMismatch: expected",
        "CheckpointInvalid: expected",
        "RoundFailed: round 3: expected at most 3 attempts (cohort.max_attempts), got no further one",
    ],
)
def test_a_named_refusal_is_final_until_the_operator_says_resume(stage: Stage, reason: str) -> None:
    stage.approve("north", "south")
    stage.tick()
    stage.end("failed", reason)
    assert [stage.tick(), stage.tick(1e6)] == ["failed", "failed"]
    resume(find_submitted(stage.scene.home, "chest"))
    assert stage.tick(1e6) == "running"


def test_a_withdrawal_before_a_study_has_begun_keeps_it_down(stage: Stage) -> None:
    stage.approve("north", "south")
    stage.withdraw("south")
    assert [stage.tick(), stage.tick(1e6)] == ["waiting", "waiting"]
    assert not stage.flower.started


def test_a_withdrawal_does_not_hold_the_others_hostage_after_a_crash(stage: Stage) -> None:
    stage.begin()
    stage.withdraw("south")
    assert stage.tick() == "running"
    stage.end()
    assert [stage.tick(), stage.tick(6.0)] == ["retrying", "running"]
    said = stage.said()
    assert said["missing"] == {"south": "withdrew its approval"} and said["reason"] == ""
    assert len(stage.flower.started) == 2


def test_a_revoked_site_does_not_hold_the_others_hostage_after_a_crash(stage: Stage) -> None:
    stage.begin()
    stage.revoke("south")
    stage.end()
    assert [stage.tick(), stage.tick(6.0)] == ["retrying", "running"]
    assert stage.said()["missing"] == {"south": "revoked"}


def test_a_study_that_has_begun_starts_again_under_a_new_server(stage: Stage) -> None:
    stage.begin()
    stage.revoke("south")
    stage.end()
    runs = StudyRuns(stage.scene.home, stage.flower, clock=lambda: 0.0)  # type: ignore[arg-type]
    assert runs.tick({"north": 1})["chest"]["state"] == "running"


def test_below_the_floor_a_study_that_has_begun_waits_and_says_for_whom(stage: Stage) -> None:
    stage.begin()
    stage.revoke("south")
    stage.withdraw("north")
    stage.end()
    assert [stage.tick(), stage.tick(1e6)] == ["waiting", "waiting"]
    assert "expected at least 1 of its sites (cohort.min_sites), got 0" in stage.said()["reason"]
    assert "north withdrew its approval; south revoked" in stage.said()["reason"]
    stage.approve("north")
    assert stage.tick() == "running"


def test_who_withdrew_is_not_spoken_to_until_it_approves_again(stage: Stage) -> None:
    stage.begin()
    stage.withdraw("south")
    stage.tick()
    assert stage.nodes() == {"north": 1}
    stage.approve("south")
    stage.tick()
    assert stage.nodes() == {"north": 1, "south": 2}


def test_a_run_that_never_begins_is_stopped_and_tried_again(stage: Stage) -> None:
    stage.approve("north", "south")
    stage.tick()
    assert stage.tick(119.0) == "running"
    assert stage.tick(2.0) == "retrying"
    assert stage.flower.stopped == [1]


def test_only_so_many_studies_run_at_once(stage: Stage) -> None:
    stage.approve("north", "south")
    second = stage.scene.submit("zweite", ("north",))
    from common.config import format_study
    from common.identity import Purpose
    from server.submission import record_approval

    signature = stage.scene.keys["north"].message.sign(Purpose.APPROVAL, format_study(second.study))
    record_approval(stage.scene.home, "zweite", "north", signature, decided_s=1)
    stage.tick()
    states = stage.runs.tick({})
    assert (states["chest"]["state"], states["zweite"]["state"]) == ("running", "queued")
    stage.end("finished")
    stage.tick()
    assert stage.runs.tick({})["zweite"]["state"] == "running"


def test_runs_of_an_earlier_life_are_stopped(stage: Stage) -> None:
    stage.flower.unfinished = [7, 8]
    stage.runs.forget_flower_runs()
    assert stage.flower.stopped == [7, 8]
