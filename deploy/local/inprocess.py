"""One process, no ports: the real ServerApp and ClientApp over Flower's `Grid` interface.

Guarantees: both sides get a copy of their own, with the very bytes that Flower's serialisation would give
them (records hold immutable values only, so a deep copy is that without copying a byte; tested against
it); an exception in the ClientApp becomes the Error reply that a SuperNode would send; a node handles one
message at a time, in push order; replies come back in push order.

It does not: expire messages by their time to live, keep ServerApp, ClientApp and agents apart (all live in
this process; the agent is called without its socket, so that every check of `SiteAgent.handle` holds, but
none of the socket), or run two grids at once in one process, because Flower keeps the identity of the
running task in a class attribute.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import EngineBusy, UnknownNode

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from common.protocol import Envelope, Stage

RunConfig = Mapping[str, str | int | float | bool]

_SERVER_TASK_ID = 1
_one_grid_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Traffic:
    """What one node received and sent: bytes of keys and values in records, without Flower's framing."""

    messages: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class InProcessGrid(Grid):
    """Flower's Grid over a ClientApp in this process; `traffic` counts bytes per node."""

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Mapping[int, Mapping[str, str]],
        *,
        run_config: RunConfig,
        run_id: int,
        parallel: int,
    ) -> None:
        self._app = client_app
        self._run = Run.create_empty(run_id)
        self._contexts = {
            node_id: Context(
                run_id=run_id,
                node_id=node_id,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node_id, config in node_configs.items()
        }
        self._node_locks = {node_id: threading.Lock() for node_id in node_configs}
        self._workers = ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="clientapp")
        self._pending: dict[str, Future[Message]] = {}
        self._traffic_lock = threading.Lock()
        self._traffic = dict.fromkeys(node_configs, Traffic())

    @property
    def run(self) -> Run:
        return Run(**vars(self._run))

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def traffic(self) -> dict[int, Traffic]:
        """Bytes and messages so far, by node id."""
        with self._traffic_lock:
            return dict(self._traffic)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to their nodes and return their ids at once; raises UnknownNode before any runs."""
        batch = list(messages)
        for message in batch:
            if message.metadata.dst_node_id not in self._contexts:
                raise UnknownNode(
                    f"a message is for node {message.metadata.dst_node_id}; this grid has "
                    f"{sorted(self._contexts)}"
                )
        ids = []
        for message in batch:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = self._workers.submit(
                self._serve, message.metadata.dst_node_id, copy.deepcopy(message)
            )
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, in push order; each is given out once."""
        wanted = set(message_ids)
        ready = [key for key, future in self._pending.items() if key in wanted and future.done()]
        return [self._pending.pop(key).result() for key in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, wait at most `timeout` seconds, and return the replies that came, in push order."""
        ids = self.push_messages(messages)
        wait([self._pending[message_id] for message_id in ids], timeout=timeout)
        return self.pull_messages(ids)

    def close(self) -> None:
        """Drop what waits; a ClientApp call that is running cannot be interrupted and ends by itself."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _serve(self, node_id: int, message: Message) -> Message:
        bytes_down = _size(message)
        with self._node_locks[node_id]:
            try:
                reply = self._app(message, self._contexts[node_id])
            except Exception as failure:  # exactly what Flower's run_clientapp does with it
                reason = f"{type(failure)}:<'{failure}'>"
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        with self._traffic_lock:
            before = self._traffic[node_id]
            self._traffic[node_id] = Traffic(
                messages=before.messages + 1,
                bytes_down=before.bytes_down + bytes_down,
                bytes_up=before.bytes_up + _size(reply),
            )
        return copy.deepcopy(reply)


class Answering(Protocol):
    """What a site's agent is to its relay."""

    def handle(self, stage: Stage, data: Envelope, /) -> Envelope: ...


def calling(agents: Mapping[str, Answering]) -> ClientApp:
    """Return the relaying ClientApp of nodes whose `site` is an agent in this process."""
    from client.app import relaying

    return relaying(lambda context, stage, sent: agents[str(context.node_config["site"])].handle(stage, sent))


def run_inprocess(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    node_configs: Mapping[int, Mapping[str, str]],
    run_config: RunConfig,
    run_id: int = 1,
    parallel: int = 1,
) -> dict[int, Traffic]:
    """Run a ServerApp to its end over an InProcessGrid and return the traffic per node.

    `node_configs` maps node id to what the ClientApp sees as `context.node_config`; `parallel` is how many
    ClientApp calls run at once. Raises what the ServerApp raises, and EngineBusy when a run is going on.
    """
    with _server_identity(run_id):
        grid = InProcessGrid(
            client_app, node_configs, run_config=run_config, run_id=run_id, parallel=parallel
        )
        try:
            server_app(
                grid=grid,
                context=Context(
                    run_id=run_id,
                    node_id=SUPERLINK_NODE_ID,
                    node_config={},
                    state=RecordDict(),
                    run_config=dict(run_config),
                ),
            )
        finally:
            grid.close()
        return grid.traffic


@contextmanager
def _server_identity(run_id: int) -> Iterator[None]:
    if not _one_grid_at_a_time.acquire(blocking=False):
        raise EngineBusy("expected no other in-process run in this process, got one that is not over")
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    try:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = (
            _SERVER_TASK_ID,
            run_id,
            SUPERLINK_NODE_ID,
        )
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
        _one_grid_at_a_time.release()


def _size(message: Message) -> int:
    if not message.has_content():
        return len(message.error.reason or "")
    return sum(
        len(key) + _value_size(value) for record in message.content.values() for key, value in record.items()
    )


def _value_size(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, list):
        return sum(map(_value_size, value))
    return len(value) if isinstance(value, str | bytes) else 8
