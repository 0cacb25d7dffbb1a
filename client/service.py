"""The agent's gRPC service on a Unix socket, and the caller's side of it.

Guarantees: the socket lies in a directory of mode 0700 and is replaced only when nobody listens on it; one
request is served at a time. A refusal before authentication crosses as a gRPC status with the error's name.
The caller's side imports no torch.
"""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from client import agent_pb2, agent_pb2_grpc
from common.errors import AgentUnavailable, BodyTooLarge, FedRadError
from common.protocol import Stage

if TYPE_CHECKING:
    from client.agent import Progress, SiteAgent

FRAME_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 31
_METHODS = {
    Stage.HELLO: "Hello",
    Stage.KEYS: "Keys",
    Stage.SHARES: "Shares",
    Stage.CONTRIBUTE: "Contribute",
    Stage.UNMASK: "Unmask",
    Stage.FINISH: "Finish",
}


class AgentRefused(FedRadError):
    """The agent refused a message before it could answer with a signed refusal."""


class ProgressBoard:
    """Hands the agent's progress to whoever watches; slow watchers lose events, never block the agent."""

    def __init__(self) -> None:
        self._watchers: list[queue.Queue[Progress]] = []

    def post(self, progress: Progress) -> None:
        for watcher in list(self._watchers):
            if not watcher.full():
                watcher.put_nowait(progress)

    def watch(self) -> queue.Queue[Progress]:
        watcher: queue.Queue[Progress] = queue.Queue(maxsize=64)
        self._watchers.append(watcher)
        return watcher

    def leave(self, watcher: queue.Queue[Progress]) -> None:
        self._watchers.remove(watcher)


def _serve_stage(agent: SiteAgent, stage: Stage, frames: Iterator[Any], context: Any) -> Iterator[Any]:
    try:
        reply = agent.handle(stage, _join(frames, limit=agent.message_limit))
    except FedRadError as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}: {error}")
    yield from _frames(reply)


def start_service(agent: SiteAgent, board: ProgressBoard, socket_path: Path, *, version: str) -> grpc.Server:
    """Serve the agent on a Unix socket; stop with `.stop(grace)`. Raises AgentUnavailable."""

    class Servicer(agent_pb2_grpc.SiteAgentServicer):
        def Identify(self, request: Any, context: Any) -> Any:
            return agent_pb2.IdentifyReply(site=agent.home.site, version=version)

        def Progress(self, request: Any, context: Any) -> Iterator[Any]:
            watcher = board.watch()
            try:
                while context.is_active():
                    try:
                        event = watcher.get(timeout=0.5)
                    except queue.Empty:
                        continue
                    yield agent_pb2.ProgressEvent(
                        study=event.study, round=event.round, stage=event.stage, percent=event.percent
                    )
            finally:
                board.leave(watcher)

    def handler(stage: Stage) -> Any:
        return lambda self, frames, context: _serve_stage(agent, stage, frames, context)

    for stage, method in _METHODS.items():
        setattr(Servicer, method, handler(stage))
    _claim(socket_path)
    server = grpc.server(ThreadPoolExecutor(max_workers=4), maximum_concurrent_rpcs=4, options=_OPTIONS)
    agent_pb2_grpc.add_SiteAgentServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"unix:{socket_path}")
    server.start()
    socket_path.chmod(0o600)
    return server


def call_agent(address: str, stage: Stage, envelope: bytes, *, timeout_s: float) -> bytes:
    """Relay one message to the agent at `unix:PATH`; raises AgentUnavailable or AgentRefused."""
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub = agent_pb2_grpc.SiteAgentStub(channel)
        try:
            return _join(getattr(stub, _METHODS[stage])(_frames(envelope), timeout=timeout_s))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise AgentRefused(str(error.details())) from error
            raise AgentUnavailable(
                f"{address}: expected the site agent to answer, got {error.code().name}; is `fedrad-site up` "
                "running?"
            ) from error


_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * FRAME_BYTES),
    ("grpc.max_send_message_length", 2 * FRAME_BYTES),
    ("grpc.enable_http_proxy", 0),
]


def _frames(data: bytes) -> Iterator[Any]:
    view = memoryview(data)
    for start in range(0, max(1, len(data)), FRAME_BYTES):
        yield agent_pb2.Frame(data=bytes(view[start : start + FRAME_BYTES]))


def _join(frames: Iterator[Any], *, limit: Callable[[bytes], int] = lambda start: MAX_MESSAGE_BYTES) -> bytes:
    """Join a message's frames; its first one says how long it may be, so that no more is ever kept."""
    parts: list[bytes] = []
    size = most = 0
    for frame in frames:
        if not parts:
            most = min(MAX_MESSAGE_BYTES, limit(frame.data))
        size += len(frame.data)
        if size > most:
            raise BodyTooLarge(f"expected a message of at most {most} bytes, got more")
        parts.append(frame.data)
    return b"".join(parts)


def _claim(socket_path: Path) -> None:
    socket_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not socket_path.exists():
        return
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.connect(str(socket_path))
    except OSError:
        socket_path.unlink()
    else:
        raise AgentUnavailable(f"{socket_path}: expected a free socket, got another agent listening on it")
    finally:
        probe.close()
