"""The in-process engine: real ServerApp and ClientApp objects over Flower's Grid interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from common.errors import EngineBusy, UnknownNode
from deploy.local.inprocess import InProcessGrid, Traffic, run_inprocess
from tests.deploy import echo_client, echo_server

NODES = {101: {"site": "north", "agent": "unix:///n.sock"}, 102: {"site": "south", "agent": "unix:///s.sock"}}


def serve(
    main: Callable[[Grid], None],
    client_app: ClientApp = echo_client.app,
    *,
    parallel: int = 1,
) -> dict[int, Traffic]:
    app = ServerApp()

    @app.main()
    def _main(grid: Grid, context: Context) -> None:
        main(grid)

    return run_inprocess(app, client_app, node_configs=NODES, run_config={"study-dir": ""}, parallel=parallel)


def to(node: int, stage: str, envelope: bytes = b"") -> Message:
    record = ConfigRecord({"stage": stage, "envelope": bytes(echo_client.unsigned(envelope))})
    return Message(RecordDict({"fedrad": record}), node, "query.relay")


def envelope(reply: Message) -> bytes:
    value = reply.content["fedrad"]["envelope"]
    assert isinstance(value, bytes)
    return value.removeprefix(echo_client.unsigned(b"").frame)


def test_an_echo_study_runs_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("echo:1000")
    run_inprocess(
        echo_server.app, echo_client.app, node_configs=NODES, run_config={"study-dir": str(tmp_path)}
    )
    for site in ("north", "south"):
        assert (tmp_path / f"echo-{site}").read_bytes() == echo_server.payload(0, 1000)


def test_a_message_arrives_as_flowers_serialisation_would_bring_it() -> None:
    client = ClientApp()
    arrived: list[Message] = []

    @client.query("relay")
    def keep(message: Message, context: Context) -> Message:
        arrived.append(message)
        return Message(message.content, reply_to=message)

    def main(grid: Grid) -> None:
        content = RecordDict(
            {
                "config": ConfigRecord({"b": bytes(range(256)), "s": "é", "l": [1, 2], "f": 0.1, "t": True}),
                "arrays": ArrayRecord([np.arange(7, dtype=np.float32)]),
                "metrics": MetricRecord({"loss": 0.25, "counts": [3, 4]}),
            }
        )
        sent = Message(content, 101, "query.relay")
        [reply] = grid.send_and_receive([sent])
        for copied in (arrived[0], reply):
            objects = get_all_nested_objects(copied)
            wire = {object_id: item.deflate() for object_id, item in objects.items()}
            inflated = inflate_object_from_contents(copied.object_id, wire)
            assert inflated.content == copied.content == content
            assert inflated.content.object_id == content.object_id
        assert arrived[0].object_id == sent.object_id

    serve(main, client)


def test_client_works_on_a_copy_of_the_servers_record() -> None:
    client = ClientApp()

    @client.query("relay")
    def overwrite(message: Message, context: Context) -> Message:
        message.content["fedrad"]["envelope"] = b"changed"
        return Message(message.content, reply_to=message)

    def main(grid: Grid) -> None:
        sent = to(101, "x", b"original")
        [reply] = grid.send_and_receive([sent])
        assert envelope(sent) == b"original"
        assert envelope(reply) == b"changed"

    serve(main, client)


def test_node_config_reaches_the_client_app() -> None:
    def main(grid: Grid) -> None:
        replies = grid.send_and_receive([to(node, "who") for node in grid.get_node_ids()])
        assert [envelope(reply) for reply in replies] == [b"north unix:///n.sock", b"south unix:///s.sock"]

    serve(main)


def test_reply_names_its_message_and_its_node() -> None:
    def main(grid: Grid) -> None:
        [message_id] = grid.push_messages([to(102, "who")])
        replies: list[Message] = []
        while not replies:
            replies = list(grid.pull_messages([message_id]))
        assert replies[0].metadata.reply_to_message_id == message_id
        assert replies[0].metadata.src_node_id == 102

    serve(main)


def test_exception_in_the_client_app_is_an_error_reply() -> None:
    def main(grid: Grid) -> None:
        failed, answered = grid.send_and_receive([to(101, "fail"), to(102, "who")])
        assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert failed.error.reason == "<class 'ValueError'>:<'asked to fail'>"
        assert answered.has_content()

    serve(main)


def test_exception_in_the_server_app_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("raise")
    with pytest.raises(RuntimeError, match="asked to fail"):
        run_inprocess(
            echo_server.app, echo_client.app, node_configs=NODES, run_config={"study-dir": str(tmp_path)}
        )


def test_parallel_replies_come_in_push_order() -> None:
    client = ClientApp()
    both_inside = threading.Barrier(2, timeout=10)

    @client.query("relay")
    def slow_first(message: Message, context: Context) -> Message:
        both_inside.wait()
        if context.node_config["site"] == "north":
            time.sleep(0.05)
        return Message(message.content, reply_to=message)

    def main(grid: Grid) -> None:
        replies = grid.send_and_receive([to(101, "x"), to(102, "x")])
        assert [reply.metadata.src_node_id for reply in replies] == [101, 102]

    serve(main, client, parallel=2)


def test_a_node_handles_one_message_at_a_time() -> None:
    client = ClientApp()
    inside = threading.Semaphore(1)

    @client.query("relay")
    def alone(message: Message, context: Context) -> Message:
        if not inside.acquire(blocking=False):
            raise RuntimeError("two at once")
        time.sleep(0.02)
        inside.release()
        return Message(message.content, reply_to=message)

    def main(grid: Grid) -> None:
        assert all(reply.has_content() for reply in grid.send_and_receive([to(101, "x") for _ in range(4)]))

    serve(main, client, parallel=4)


def test_a_slow_node_is_left_out_at_the_timeout_and_pulled_later() -> None:
    client = ClientApp()
    go_on = threading.Event()

    @client.query("relay")
    def south_waits(message: Message, context: Context) -> Message:
        if context.node_config["site"] == "south":
            go_on.wait(10)
        return Message(message.content, reply_to=message)

    def main(grid: Grid) -> None:
        messages = [to(101, "x"), to(102, "x")]
        replies = list(grid.send_and_receive(messages, timeout=0.3))
        assert [reply.metadata.src_node_id for reply in replies] == [101]
        go_on.set()
        late: list[Message] = []
        while not late:
            late = list(grid.pull_messages([message.metadata.message_id for message in messages]))
        assert [reply.metadata.src_node_id for reply in late] == [102]

    serve(main, client, parallel=2)


def test_client_state_survives_between_messages() -> None:
    client = ClientApp()

    @client.query("relay")
    def count(message: Message, context: Context) -> Message:
        seen = context.state["calls"]["n"] if "calls" in context.state else 0
        context.state["calls"] = ConfigRecord({"n": seen + 1})
        record = ConfigRecord({"stage": "x", "envelope": str(seen + 1).encode()})
        return Message(RecordDict({"fedrad": record}), reply_to=message)

    def main(grid: Grid) -> None:
        answers = [envelope(reply) for _ in range(2) for reply in grid.send_and_receive([to(101, "x")])]
        assert answers == [b"1", b"2"]

    serve(main, client)


def test_message_to_an_unknown_node_is_refused_before_any_runs() -> None:
    def main(grid: Grid) -> None:
        with pytest.raises(UnknownNode, match="103"):
            grid.push_messages([to(101, "echo"), to(103, "echo")])

    assert all(traffic == Traffic() for traffic in serve(main).values())


def test_traffic_counts_the_bytes_of_each_direction() -> None:
    def main(grid: Grid) -> None:
        grid.send_and_receive([to(101, "echo", bytes(1_000_000)), to(102, "who")])

    traffic = serve(main)
    assert traffic[101].messages == 1
    assert 1_000_000 < traffic[101].bytes_down < 1_001_000
    assert 1_000_000 < traffic[101].bytes_up < 1_001_000
    assert traffic[102].bytes_up < 1_000


def test_two_runs_at_once_in_one_process_are_refused() -> None:
    def main(grid: Grid) -> None:
        assert isinstance(grid, InProcessGrid)
        with pytest.raises(EngineBusy):
            serve(lambda inner: None)

    serve(main)


@pytest.mark.parametrize("before", [None, 77])
def test_flowers_task_identity_is_restored(monkeypatch: pytest.MonkeyPatch, before: int | None) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", before)
    seen: list[int] = []
    serve(lambda grid: seen.append(TaskIdentity.run_id))
    assert seen[0] not in (None, before) and TaskIdentity._run_id == before
