"""A hostile ClientApp and a hostile server over the real socket: every guard test of `test_agent` once more.

Here the agent listens behind its guard and each message goes through gRPC as a relay would send it; a refusal
before authentication comes back by name, all others as the agent's signed refusal. The tests themselves are
those of `test_agent`, imported whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.agent import SiteAgent
from client.service import AgentRefused, ProgressBoard, call_agent, start_service
from common import errors
from common.protocol import Envelope, Stage
from tests.client import test_agent
from tests.client.test_agent import *  # noqa: F403
from tests.simulator import NodeDown, Tape, refusal_of

pytestmark = pytest.mark.slow


class Relayed:
    """An agent that can be reached through its socket only, but looked into from outside."""

    def __init__(self, agent: SiteAgent, path: Path) -> None:
        self._agent = agent
        self._address = f"unix:{path}"
        self._service = start_service(agent, ProgressBoard(), path, version="test")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def handle(self, stage: Stage, data: bytes) -> Envelope:
        try:
            return call_agent(self._address, stage, Envelope(b"", data), timeout_s=120)
        except AgentRefused as refusal:
            name, _, text = str(refusal).partition(": ")
            raise getattr(errors, name)(text) from refusal
        except errors.AgentUnavailable as gone:  # what a relay sees of an agent that dies in the middle
            raise NodeDown(str(gone)) from gone

    def close(self) -> None:
        self._service.stop(None).wait()
        self._agent.close()


@pytest.fixture(name="before")
def before_over_socket(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Relayed]]:
    relayed: list[Relayed] = []

    def make(tape: Tape, stage: Stage, round: int, **settings: Any) -> Relayed:
        agent = tape.agent_before(stage, round, tmp_path / f"agent-{len(relayed)}", **settings)
        relayed.append(Relayed(agent, tmp_path_factory.mktemp("s") / "run" / "a.sock"))
        return relayed[-1]

    yield make
    for one in relayed:
        one.close()


def test_every_refusal_is_logged_at_the_site_with_its_name(
    plain: Tape, before: Callable[..., Relayed], caplog: pytest.LogCaptureFixture
) -> None:
    agent = before(plain, Stage.CONTRIBUTE, 1)
    with caplog.at_level(logging.WARNING, "fedrad.agent"):
        with pytest.raises(errors.EnvelopeMalformed):
            agent.handle(Stage.CONTRIBUTE, b"junk")
        other = agent.handle(Stage.CONTRIBUTE, plain.forge(Stage.CONTRIBUTE, 1, round=2))
    assert refusal_of(other) and f": {refusal_of(other)}: " in caplog.text
    assert "EnvelopeMalformed" in caplog.text


def test_all_guard_tests_are_here() -> None:
    names = {name for name in vars(test_agent) if name.startswith("test_")}
    assert len(names) > 60 and names <= set(globals())
