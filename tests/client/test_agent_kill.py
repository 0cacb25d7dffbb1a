"""kill -9 of real agent processes at fifty random moments between request and reply.

Whatever an agent had sent before it died, it sends again to the byte; its ledger holds the charge whenever
anything was sent, and never two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.agent import SiteAgent
from client.home import open_home
from common.protocol import Stage
from tests.client.test_agent import contribute
from tests.simulator import POOL, Clock, build, record, refusal_of

KILLS = 50
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_agent_killed_at_fifty_random_moments_charges_once_and_sends_the_same(tmp_path: Path) -> None:
    world = build(tmp_path / "world", mode="consortium", rounds=2, spare_rounds=0, seed=None)
    tape = record(world, "alpha", tmp_path / "tape")
    request = tmp_path / "request"
    request.write_bytes(tape.requests[(Stage.CONTRIBUTE, 0)])
    work = tmp_path / "work"
    work.mkdir()
    before = tape.home_before(Stage.CONTRIBUTE, 0)
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.agent_kill", before, request, work, str(KILLS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)
    assert len(trials) == KILLS
    for trial in trials:
        assert trial["charged"] <= 1 and trial["charged_in_the_end"] == 1 and trial["again"]
        if trial["sent"]:
            assert trial["charged"] == 1, "a contribution left the site that its ledger does not hold"
            assert trial["same"], "the same round was served twice with other bytes"
    assert sum(not trial["sent"] for trial in trials) >= KILLS // 5
    assert sum(trial["charged"] and not trial["sent"] for trial in trials) >= 1

    agent = SiteAgent(open_home(work / "0"), models=POOL, clock=Clock())
    try:  # a round that was served once is not served for another request
        other = agent.handle(Stage.CONTRIBUTE, contribute(tape, 0, deadline_unix_s=Clock()() + 77.0))
    finally:
        agent.close()
    assert refusal_of(other) in ("RoundAlreadyServed", "SecondOpening")
