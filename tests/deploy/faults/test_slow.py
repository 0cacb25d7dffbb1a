"""A site that is slow, not gone: its agent stands still past the deadline and is waited for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from server.checkpoint import read_records
from tests.deploy.faults.consortium import faulty

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_an_agent_that_stands_still_past_the_deadline_is_in_the_sum_of_the_first_attempt(
    tmp_path: Path,
) -> None:
    with faulty(tmp_path) as world:
        calm = world.submit("calm")
        world.finish(calm)
        study = world.submit("slow", deadline_s=20, grace_s=600)
        world.at(study, "keys", "gamma")
        [pid] = world.pids("agent", "gamma")
        os.kill(pid, signal.SIGSTOP)
        try:
            pending = world.folder(study) / "pending.json"
            deadline_unix_s = json.loads(pending.read_text())["deadline_unix_s"]
            world.until(lambda: time.time() > deadline_unix_s + 12, "the deadline", timeout_s=60)
            assert json.loads(pending.read_text())["attempt"] == 1, "the attempt waits for the site"
        finally:
            os.kill(pid, signal.SIGCONT)
        world.finish(study)
        assert world.verify_outcome(study, adapter=world.adapter(calm)) == ""
        first = read_records(world.folder(study))[0].record
        assert first.attempt == 1 and first.contributors == world.sites
        late = next(event["late"] for event in world.lab.events("slow") if event["event"] == "round")
        assert late["gamma"] > 0
