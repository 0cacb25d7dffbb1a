"""The guard in front of the agent: who gets in, how many, how fast; each refusal named, logged, harmless."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from client import agent_pb2, agent_pb2_grpc
from client.agent import SiteAgent
from client.home import open_home
from client.service import AgentRefused, AgentService, ProgressBoard, call_agent, start_service
from client.socket_guard import (
    Limits,
    Peer,
    TokenBucket,
    group_id,
    listen,
    peer_of,
    verify_directory,
    verify_peer,
)
from common.errors import AgentUnavailable, PeerRefused, SocketInvalid, TooFrequent
from common.protocol import SERVER, Envelope, Stage, pack_body, seal_request
from tests.simulator import POOL, Consortium, build, split_message

SITE = "alpha"
NOBODY = 65534
RELAYS = 54321
ROOT = os.geteuid() == 0
Start = Callable[..., Path]

needs_root = pytest.mark.skipif(not ROOT, reason="only root can start a process of another user")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("guard"), mode="plain")


@pytest.fixture
def agent(world: Consortium) -> SiteAgent:
    return SiteAgent(open_home(world.out / "sites" / SITE), models=POOL)


@pytest.fixture
def start(agent: SiteAgent) -> Iterator[Start]:
    """Start services in directories that other users can reach; returns their sockets."""
    services: list[AgentService] = []
    with contextlib.ExitStack() as stack:

        def make(group: int | None = None, **limits: float) -> Path:
            above = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guard-")))
            above.chmod(0o755)
            path = above / "run" / "agent.sock"
            service = start_service(
                agent,
                ProgressBoard(),
                path,
                version="test",
                group=group,
                limits=Limits(**limits),  # type: ignore[arg-type]
            )
            services.append(service)
            return path

        yield make
        for service in services:
            service.stop(None).wait()


def hello(world: Consortium) -> Envelope:
    return seal_request(
        world.operator, study=world.study.sha256, round=0, attempt=1, stage=Stage.HELLO, sender=SERVER,
        recipient=SITE, nonce="0" * 32, previous=world.study.sha256, body=pack_body({}),
    )  # fmt: skip


def answered(path: Path, world: Consortium) -> bool:
    reply = call_agent(f"unix:{path}", Stage.HELLO, hello(world), timeout_s=60)
    return split_message(reply)[0].sender == SITE


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def ended(connection: socket.socket) -> bool:
    """Whether the other side closed; what it may have sent before is read away."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def as_user(path: Path, *, uid: int, gid: int, groups: list[int]) -> str:
    """What a process of another user sees at the socket: gRPC's first bytes, or why not."""
    code = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_UNIX); s.settimeout(10)\n"
        "try:\n"
        "    s.connect(sys.argv[1])\n"
        "    s.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))\n"
        "    print('spoken to' if s.recv(9) else 'closed')\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", code, str(path)], capture_output=True, text=True, check=True, cwd="/",
        user=uid, group=gid, extra_groups=groups,
    )  # fmt: skip
    return {"ConnectionResetError": "closed", "BrokenPipeError": "closed"}.get(
        done.stdout.strip(), done.stdout.strip()
    )


# --- who ----------------------------------------------------------------------------------------------------


def test_only_the_own_user_and_the_group_may_connect() -> None:
    verify_peer(Peer(7, 7, 1), own_uid=7, group=None)
    verify_peer(Peer(8, 20, 1), own_uid=7, group=20)
    verify_peer(Peer(8, 8, 1, frozenset({20})), own_uid=7, group=20)
    for stranger, group in (
        (Peer(8, 8, 99), None),
        (Peer(8, 8, 99, frozenset({5})), 20),
        (Peer(0, 0, 99), 20),
    ):
        with pytest.raises(PeerRefused, match=f"pid 99 of user {stranger.uid}"):
            verify_peer(stranger, own_uid=7, group=group)


def test_the_kernel_says_who_connected() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        peer = peer_of(one)
    assert (peer.uid, peer.gid, peer.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert peer.groups == frozenset(os.getgroups())


@needs_root
def test_a_process_of_another_user_is_refused_by_name_before_a_byte_is_read(
    start: Start, world: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    path = start()
    path.parent.chmod(0o755)  # somebody opened the way later: the credentials still decide
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "fedrad.agent"):
        assert as_user(path, uid=NOBODY, gid=NOBODY, groups=[]) == "closed"
        said(caplog, f"PeerRefused: expected a process of user {os.geteuid()}, got pid")
        said(caplog, f"of user {NOBODY}")
    assert answered(path, world)


@needs_root
def test_the_file_system_alone_keeps_strangers_out(start: Start) -> None:
    assert as_user(start(), uid=NOBODY, gid=NOBODY, groups=[]) == "PermissionError"
    assert as_user(start(RELAYS), uid=NOBODY, gid=NOBODY, groups=[]) == "PermissionError"


@needs_root
def test_a_relay_in_the_sockets_group_is_let_in(start: Start, world: Consortium) -> None:
    path = start(RELAYS)
    assert as_user(path, uid=NOBODY, gid=RELAYS, groups=[]) == "spoken to"
    assert as_user(path, uid=NOBODY, gid=NOBODY, groups=[RELAYS]) == "spoken to"
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (RELAYS, 0o660)
    assert (path.parent.stat().st_gid, path.parent.stat().st_mode & 0o777) == (RELAYS, 0o750)
    assert answered(path, world)


@needs_root
def test_relays_that_take_all_their_places_do_not_shut_out_the_own_user(
    start: Start, world: Consortium
) -> None:
    path = start(RELAYS, connections=1)
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1]); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        user=NOBODY, group=RELAYS, extra_groups=[], cwd="/",
    ) as relay:  # fmt: skip
        assert relay.stdout is not None and relay.stdout.readline()
        time.sleep(0.2)
        assert as_user(path, uid=NOBODY, gid=RELAYS, groups=[]) == "closed"
        assert answered(path, world)
        relay.communicate()


# --- where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o750])
def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(SocketInvalid, match="mode 700 at most"):
        verify_directory(tmp_path, own_uid=os.geteuid(), group=None)
    tmp_path.chmod(0o700)
    verify_directory(tmp_path, own_uid=os.geteuid(), group=None)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(SocketInvalid, match="user 4321's"):
        verify_directory(tmp_path, own_uid=4321, group=None)


def test_a_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(SocketInvalid, match="got a link"):
        verify_directory(tmp_path / "link", own_uid=os.geteuid(), group=None)
    with pytest.raises(SocketInvalid):
        listen(tmp_path / "link" / "agent.sock", group=None)


def test_a_parent_that_all_can_write_is_refused_unless_sticky(tmp_path: Path) -> None:
    inner = tmp_path / "open" / "run"
    inner.mkdir(parents=True, mode=0o700)
    inner.parent.chmod(0o777)
    with pytest.raises(SocketInvalid, match="all can write"):
        verify_directory(inner, own_uid=os.geteuid(), group=None)
    inner.parent.chmod(0o1777)
    verify_directory(inner, own_uid=os.geteuid(), group=None)


def test_a_group_that_cannot_reach_its_socket_is_told_so(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(SocketInvalid, match="to be able to enter"):
        listen(closed / "run" / "agent.sock", group=os.getegid())


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o700)
    precious = tmp_path / "precious"
    precious.write_text("kept")
    path = tmp_path / "agent.sock"
    path.symlink_to(precious) if kind == "link" else path.write_text("kept")
    with pytest.raises(SocketInvalid, match="a link or another file"):
        listen(path, group=None)
    assert precious.read_text() == path.read_text() == "kept"


def test_a_group_that_this_machine_does_not_have_is_named() -> None:
    with pytest.raises(SocketInvalid, match="--socket-group"):
        group_id("no-such-group")
    assert group_id("54321") == 54321
    assert group_id(grp.getgrgid(os.getegid()).gr_name) == os.getegid()


def test_stopping_removes_the_agents_own_socket_only(start: Start, agent: SiteAgent, tmp_path: Path) -> None:
    path = tmp_path / "run" / "agent.sock"
    first = start_service(agent, ProgressBoard(), path, version="test")
    path.unlink()
    second = start_service(agent, ProgressBoard(), path, version="test")
    first.stop(None).wait()
    assert path.exists()
    second.stop(None).wait()
    assert not path.exists()


# --- how many, how often, how slowly ------------------------------------------------------------------------


def test_one_connection_too_many_is_closed_and_named(
    start: Start, world: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    path = start(connections=2)
    with (
        caplog.at_level(logging.WARNING, "fedrad.agent"),
        connect(path) as one,
        connect(path),
        connect(path) as last,
    ):
        assert ended(last)
        said(caplog, "PeerRefused: expected at most 2 connections at once")
        one.close()
        until(lambda: can_connect(path))
    assert answered(path, world)


def can_connect(path: Path) -> bool:
    with connect(path) as probe:
        probe.settimeout(0.2)
        return not ended(probe)


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "expected it sooner"
        time.sleep(0.05)


def test_a_bucket_refills_at_its_rate() -> None:
    now = [0.0]
    bucket = TokenBucket(burst=2, per_minute=60, clock=lambda: now[0])
    bucket.take()
    bucket.take()
    with pytest.raises(TooFrequent, match="60 a minute"):
        bucket.take()
    now[0] = 1.0
    bucket.take()
    with pytest.raises(TooFrequent):
        bucket.take()


def said(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """Wait for words in the log: a connection is closed a moment before its line is written."""
    until = time.monotonic() + 60
    while words not in caplog.text and time.monotonic() < until:
        time.sleep(0.02)
    assert words in caplog.text


def test_connections_too_often_are_closed_and_named(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    path = start(burst=3, per_minute=1)
    with caplog.at_level(logging.WARNING, "fedrad.agent"):
        for _ in range(3):
            connect(path).close()
        with connect(path) as fourth:
            assert ended(fourth)
        said(caplog, "TooFrequent: connections of pid")


def test_calls_too_often_are_refused_by_name(
    start: Start, world: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    path = start(burst=2, per_minute=1)
    with grpc.insecure_channel(f"unix:{path}") as channel, caplog.at_level(logging.WARNING, "fedrad.agent"):
        stub = agent_pb2_grpc.SiteAgentStub(channel)
        for _ in range(2):
            assert list(stub.Hello(iter([agent_pb2.Frame(data=bytes(hello(world)))]), timeout=60))
        with pytest.raises(grpc.RpcError) as failure:
            list(stub.Hello(iter([agent_pb2.Frame(data=bytes(hello(world)))]), timeout=60))
    assert "TooFrequent" in str(failure.value)
    said(caplog, "refused a call: TooFrequent")


def test_a_connection_that_says_nothing_is_closed_and_named(
    start: Start, world: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    path = start(idle_s=0.3)
    with caplog.at_level(logging.WARNING, "fedrad.agent"), connect(path) as silent:
        assert ended(silent)
    said(caplog, "PeerTooSlow")
    assert answered(path, world)


def test_a_request_that_trickles_in_is_cut_off_and_named(
    start: Start, world: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    path = start(request_s=0.5, request_bytes_per_s=1e9)
    release = threading.Event()

    def trickle() -> Iterator[agent_pb2.Frame]:
        yield agent_pb2.Frame(data=bytes(hello(world))[:-1])
        release.wait(20)

    with grpc.insecure_channel(f"unix:{path}") as channel, caplog.at_level(logging.WARNING, "fedrad.agent"):
        with pytest.raises(grpc.RpcError):
            list(agent_pb2_grpc.SiteAgentStub(channel).Hello(trickle(), timeout=20))
        release.set()
    said(caplog, "PeerTooSlow: expected the peer to pass a message within")
    assert answered(path, world)


def test_one_client_is_served_at_a_time_the_next_waits_and_the_own_user_can_look(
    start: Start, agent: SiteAgent, world: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    path = start(waiting_calls=1)
    with ThreadPoolExecutor(3) as pool:
        with agent._one_at_a_time, caplog.at_level(logging.WARNING, "fedrad.agent"):  # a long computation
            first = pool.submit(answered, path, world)
            time.sleep(0.5)
            second = pool.submit(answered, path, world)
            time.sleep(0.5)
            with grpc.insecure_channel(f"unix:{path}") as channel:
                reply = agent_pb2_grpc.SiteAgentStub(channel).Identify(
                    agent_pb2.IdentifyRequest(), timeout=10
                )
            assert reply.site == SITE
            with pytest.raises(AgentRefused, match="PeerRefused"):
                answered(path, world)
            assert not first.done() and not second.done()
        assert first.result(30) and second.result(30)
    said(caplog, "refused a call: PeerRefused: expected at most 1 calls waiting")


def test_a_relay_killed_in_a_call_leaves_its_place(start: Start, agent: SiteAgent, world: Consortium) -> None:
    path = start(waiting_calls=1)
    with agent._one_at_a_time:
        for _ in range(2):  # the one served and the one waiting
            with pytest.raises(AgentUnavailable):
                call_agent(f"unix:{path}", Stage.HELLO, hello(world), timeout_s=0.5)
        time.sleep(1.0)
    assert answered(path, world)


def test_one_watcher_too_many_is_refused(start: Start) -> None:
    path = start(watchers=1)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = agent_pb2_grpc.SiteAgentStub(channel)
        watching = stub.Progress(agent_pb2.ProgressRequest(), timeout=20)
        time.sleep(0.5)
        with pytest.raises(grpc.RpcError, match="PeerRefused"):
            next(iter(stub.Progress(agent_pb2.ProgressRequest(), timeout=20)))
        watching.cancel()
