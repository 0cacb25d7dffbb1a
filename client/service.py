"""The agent's gRPC service behind its guarded socket, and the caller's side of it.

One client is served at a time: a stage call waits until the one before has its reply, at most
`Limits.waiting_calls` wait, and what waits is not read. Identify and Progress go on meanwhile, for the own
user's `status` and for the relay alike. Guarantees: a call that comes too often, sends too slowly, takes its
reply too slowly or sends more than its header says ends in a named, logged refusal; a refusal before
authentication crosses as a gRPC status with the error's name. The caller's side imports no torch.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from client import agent_pb2, agent_pb2_grpc
from client.socket_guard import LIMITS, Limits, SocketGuard, TokenBucket
from common.errors import AgentUnavailable, BodyTooLarge, FedRadError, PeerRefused, PeerTooSlow, TooFrequent
from common.protocol import Bytes, Envelope, Stage, cut_envelope, read_header

if TYPE_CHECKING:
    from client.agent import Progress, SiteAgent

log = logging.getLogger("fedrad.agent")

FRAME_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 31
_METHODS = {stage: stage.value.capitalize() for stage in Stage}


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


class Turns:
    """Lets one stage call through at a time, and few wait."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._one = threading.Lock()
        self._places = threading.BoundedSemaphore(1 + limits.waiting_calls)
        self._rate = TokenBucket(burst=limits.burst, per_minute=limits.per_minute)

    @contextmanager
    def hold(self, here: Callable[[], bool]) -> Iterator[None]:
        """Wait for this call's turn while the caller is `here`; raises TooFrequent or PeerRefused."""
        self._rate.take()
        if not self._places.acquire(blocking=False):
            raise PeerRefused(f"expected at most {self._limits.waiting_calls} calls waiting, got one more")
        try:
            while not self._one.acquire(timeout=0.5):
                if not here():
                    raise PeerRefused("expected the caller to wait for its turn, got a hang-up")
            try:
                yield
            finally:
                self._one.release()
        finally:
            self._places.release()


class Watchdog:
    """Ends a call whose peer sends or takes bytes too slowly."""

    def __init__(self, context: Any, limits: Limits) -> None:
        self._context, self._limits = context, limits
        self._timer: threading.Timer | None = None

    def allow(self, size: int) -> None:
        """Start the time in which the peer must send or take `size` bytes."""
        self.rest()
        seconds = self._limits.request_s + size / self._limits.request_bytes_per_s
        self._timer = threading.Timer(seconds, self._end, (seconds,))
        self._timer.daemon = True
        self._timer.start()

    def rest(self) -> None:
        """Stop the time: it is the agent's turn to work."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, seconds: float) -> None:
        _refused(PeerTooSlow(f"expected the peer to pass a message within {seconds:.0f} s, got a part of it"))
        self._context.cancel()


class AgentService:
    """The agent's running service; `stop` ends it."""

    def __init__(
        self,
        agent: SiteAgent,
        board: ProgressBoard,
        path: Path,
        *,
        version: str,
        group: int | None,
        limits: Limits,
    ) -> None:
        self._agent, self._board, self._version, self._limits = agent, board, version, limits
        self._turns = Turns(limits)
        self._calls = 0
        self._watchers = 0
        self._counting = threading.Lock()
        self._private = Path(tempfile.mkdtemp(prefix="fedrad-"))
        inner = self._private / "grpc"
        try:
            self._guard = SocketGuard(path, inner, group=group, limits=limits, busy=lambda: self._calls > 0)
        except FedRadError:
            shutil.rmtree(self._private)
            raise
        workers = 4 + limits.waiting_calls + limits.watchers
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=workers), maximum_concurrent_rpcs=workers, options=_SERVER_OPTIONS
        )
        agent_pb2_grpc.add_SiteAgentServicer_to_server(self._servicer(), self._server)
        self._server.add_insecure_port(f"unix:{inner}")
        self._server.start()
        self._guard.open()

    def stop(self, grace: float | None) -> threading.Event:
        """Let nobody in, give calls `grace` seconds, then end; the event is set when all is over."""
        self._guard.stop_accepting()
        stopped: threading.Event = self._server.stop(grace)
        if grace:
            stopped.wait(grace)
        self._guard.close()
        shutil.rmtree(self._private, ignore_errors=True)
        return stopped

    def _servicer(self) -> Any:
        service = self

        class Servicer(agent_pb2_grpc.SiteAgentServicer):
            def Identify(self, request: Any, context: Any) -> Any:
                return agent_pb2.IdentifyReply(site=service._agent.home.site, version=service._version)

            def Progress(self, request: Any, context: Any) -> Iterator[Any]:
                return service._watch(context)

        def handler(stage: Stage) -> Any:
            return lambda self, frames, context: service._serve(stage, frames, context)

        for stage, method in _METHODS.items():
            setattr(Servicer, method, handler(stage))
        return Servicer()

    def _serve(self, stage: Stage, frames: Iterator[Any], context: Any) -> Iterator[Any]:
        watchdog = Watchdog(context, self._limits)

        def limit(start: bytes) -> int:
            most = self._agent.message_limit(start)
            watchdog.allow(most)
            return most

        try:
            with self._call(), self._turns.hold(context.is_active):
                watchdog.allow(0)
                request = self._read(frames, limit, watchdog)
                began = time.monotonic()
                reply = self._agent.handle(stage, request)
                _log_served(stage, reply, seconds=time.monotonic() - began)
                watchdog.allow(len(reply))
                yield from _frames(reply.frame, reply.body)
        except FedRadError as error:
            if isinstance(error, PeerRefused | TooFrequent | BodyTooLarge):
                _refused(error)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}: {error}")
        finally:
            watchdog.rest()

    def _read(self, frames: Iterator[Any], limit: Callable[[bytes], int], watchdog: Watchdog) -> bytearray:
        request = _join(frames, limit=limit)
        watchdog.rest()
        return request

    def _watch(self, context: Any) -> Iterator[Any]:
        with self._counting:
            full = self._watchers >= self._limits.watchers
            self._watchers += not full
        if full:
            refusal = PeerRefused(f"expected at most {self._limits.watchers} watchers, got one more")
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{refusal.code}: {refusal}")
        watcher = self._board.watch()
        try:
            with self._call():
                while context.is_active():
                    try:
                        event = watcher.get(timeout=0.5)
                    except queue.Empty:
                        continue
                    yield agent_pb2.ProgressEvent(
                        study=event.study, round=event.round, stage=event.stage, percent=event.percent
                    )
        finally:
            self._board.leave(watcher)
            with self._counting:
                self._watchers -= 1

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._counting:
            self._calls += 1
        try:
            yield
        finally:
            with self._counting:
                self._calls -= 1


def start_service(
    agent: SiteAgent,
    board: ProgressBoard,
    socket_path: Path,
    *,
    version: str,
    group: int | None = None,
    limits: Limits = LIMITS,
) -> AgentService:
    """Serve the agent on a Unix socket, to its own user and to members of `group`; stop with `.stop(grace)`.

    Raises SocketInvalid or AgentUnavailable.
    """
    return AgentService(agent, board, socket_path, version=version, group=group, limits=limits)


def call_agent(address: str, stage: Stage, envelope: Envelope, *, timeout_s: float) -> Envelope:
    """Relay one message to the agent at `unix:PATH`.

    Raises AgentUnavailable, AgentRefused, or EnvelopeMalformed for an answer that is no message.
    """
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub = agent_pb2_grpc.SiteAgentStub(channel)
        try:
            frames = _frames(envelope.frame, envelope.body)
            return cut_envelope(_join(getattr(stub, _METHODS[stage])(frames, timeout=timeout_s)))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise AgentRefused(str(error.details())) from error
            raise AgentUnavailable(
                f"{address}: expected the site agent to answer, got {error.code().name}; is `fedrad-site up` "
                "running, and may this user connect (the agent's log says whom it refused)?"
            ) from error


_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * FRAME_BYTES),
    ("grpc.max_send_message_length", 2 * FRAME_BYTES),
    ("grpc.enable_http_proxy", 0),
]
_SERVER_OPTIONS = [*_OPTIONS, ("grpc.max_concurrent_streams", 16)]


def _refused(error: FedRadError) -> None:
    log.warning("refused a call: %s: %s", error.code, error)


def _log_served(stage: Stage, reply: Envelope, *, seconds: float) -> None:
    with suppress(FedRadError):  # of a form that this release does not read: nothing to add up
        study = read_header(reply, max_body_bytes=MAX_MESSAGE_BYTES).study
        about = {"study": study, "stage": stage.value, "seconds": round(seconds, 3)}
        log.info("answered a stage", extra=about)  # client/metrics.py adds these up


def _frames(*pieces: Bytes) -> Iterator[Any]:
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), FRAME_BYTES):
            yield agent_pb2.Frame(data=bytes(view[start : start + FRAME_BYTES]))


def _join(
    frames: Iterator[Any], *, limit: Callable[[bytes], int] = lambda start: MAX_MESSAGE_BYTES
) -> bytearray:
    """Join a message's frames; its first one says how long it may be, so that no more is ever kept."""
    whole = bytearray()
    most: int | None = None
    for frame in frames:
        if most is None:
            most = min(MAX_MESSAGE_BYTES, limit(frame.data))
        if len(whole) + len(frame.data) > most:
            raise BodyTooLarge(f"expected a message of at most {most} bytes, got more")
        whole += frame.data
    return whole
