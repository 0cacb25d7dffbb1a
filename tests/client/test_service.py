"""The agent's socket: frames, limits, who may have the socket; and the relay that carries no torch."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from client import agent_pb2, agent_pb2_grpc, service
from client.agent import Progress, SiteAgent
from client.home import open_home
from client.metrics import AgentLog
from client.service import FRAME_BYTES, AgentRefused, ProgressBoard, call_agent, start_service
from common.errors import AgentUnavailable, BodyTooLarge
from common.logs import start_json_log
from common.protocol import SERVER, Envelope, Stage, pack_body, seal_request
from tests.simulator import POOL, Consortium, build, split_message

SITE = "alpha"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("service"), mode="plain")


@pytest.fixture
def agent(world: Consortium) -> SiteAgent:
    return SiteAgent(open_home(world.out / "sites" / SITE), models=POOL)


@pytest.fixture
def path(tmp_path: Path, agent: SiteAgent) -> Iterator[Path]:
    path = tmp_path / "run" / "agent.sock"
    server = start_service(agent, ProgressBoard(), path, version="test")
    yield path
    server.stop(0).wait()


def hello(world: Consortium) -> Envelope:
    return seal_request(
        world.operator, study=world.study.sha256, round=0, attempt=1, stage=Stage.HELLO, sender=SERVER,
        recipient=SITE, nonce="0" * 32, previous=world.study.sha256, body=pack_body({}),
    )  # fmt: skip


def call(path: Path, envelope: Envelope) -> Envelope:
    return call_agent(f"unix:{path}", Stage.HELLO, envelope, timeout_s=60)


def test_a_request_goes_to_the_agent_and_its_reply_comes_back(world: Consortium, path: Path) -> None:
    reply = call(path, hello(world))
    assert split_message(reply)[0].sender == SITE


def test_an_answered_stage_is_one_line_of_the_log_and_counts_with_its_seconds(
    world: Consortium, path: Path, tmp_path: Path
) -> None:
    log = AgentLog(tmp_path / "agent.jsonl")
    handler = start_json_log(tmp_path / "agent.jsonl")
    try:
        for _ in range(2):
            call(path, hello(world))
    finally:
        handler.close()
        logging.getLogger("fedrad").removeHandler(handler)
    log.read()
    key = (world.study.sha256[:12], "hello")
    assert log.answers == {key: 2} and 0 < log.seconds[key] < 600


def test_a_refusal_before_authentication_crosses_by_name(world: Consortium, path: Path) -> None:
    with pytest.raises(AgentRefused, match="EnvelopeMalformed"):
        call(path, Envelope(b"", b"junk" * 50))
    with pytest.raises(AgentRefused, match="EnvelopeMalformed"):
        call(path, Envelope(b"", b""))


def test_the_socket_is_for_its_owner_only(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_the_agent_says_whose_it_is(path: Path) -> None:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        reply = agent_pb2_grpc.SiteAgentStub(channel).Identify(agent_pb2.IdentifyRequest(), timeout=10)
    assert (reply.site, reply.version) == (SITE, "test")


def test_an_agent_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="fedrad-site up"):
        call_agent(f"unix:{tmp_path / 'none.sock'}", Stage.HELLO, Envelope(b"", b"x"), timeout_s=2)


def test_a_stale_socket_is_replaced(world: Consortium, agent: SiteAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = start_service(agent, ProgressBoard(), path, version="test")
    assert split_message(call(path, hello(world)))[0].sender == SITE
    server.stop(0).wait()


def test_a_socket_that_somebody_listens_on_is_not_taken(agent: SiteAgent, path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="another agent"):
        start_service(agent, ProgressBoard(), path, version="test")


def test_a_message_in_frames_is_joined_again() -> None:
    for size in (0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES):
        data = bytes(range(251)) * (size // 251 + 1)
        frames = list(service._frames(data[:size]))
        assert all(len(frame.data) <= FRAME_BYTES for frame in frames)
        assert service._join(iter(frames)) == data[:size]


def endless(start: bytes) -> Iterator[Any]:
    """A relay that never stops sending; reading far past the limit fails the test."""
    yield SimpleNamespace(data=start)
    for _ in range(64):
        yield SimpleNamespace(data=bytes(FRAME_BYTES))
    raise AssertionError("the agent read 64 MiB of a small message")


def test_a_stream_longer_than_its_header_says_is_cut_off(world: Consortium, agent: SiteAgent) -> None:
    with pytest.raises(BodyTooLarge):
        service._join(endless(bytes(hello(world))), limit=agent.message_limit)


def test_a_stream_over_the_cap_is_refused_through_the_socket(world: Consortium, path: Path) -> None:
    with pytest.raises(AgentRefused, match="BodyTooLarge"):
        call(path, Envelope(bytes(hello(world)), bytes(24 << 20)))
    assert split_message(call(path, hello(world)))[0].sender == SITE


def test_slow_watchers_lose_events_and_never_block_the_agent() -> None:
    board = ProgressBoard()
    watcher = board.watch()
    for percent in range(200):
        board.post(Progress("small", 0, "contribute", percent))
    assert watcher.qsize() == 64
    board.leave(watcher)
    board.post(Progress("small", 0, "contribute", 0))
    assert watcher.qsize() == 64


def test_the_relay_and_its_caller_import_no_torch() -> None:
    code = (
        "import sys, client.app, client.service, common.protocol;"
        "print([m for m in ('torch', 'transformers', 'peft', 'client.agent') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
