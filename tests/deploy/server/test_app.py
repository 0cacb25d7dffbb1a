"""The Grid of one study: its own nodes only, and nobody's word about who he is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from common.relay import RECORD
from deploy.server.app import StudyGrid, StudyNodeUnknown, read_nodes

NORTH, SOUTH, WEST = 11, 22, 33


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    before = dict(vars(TaskIdentity))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    for name in ("run_id", "node_id", "task_id"):
        setattr(TaskIdentity, name, before.get(name))


class ThreeNodes(Grid):
    """A Grid on which three nodes answer whoami with what they claim."""

    def __init__(self, claims: dict[int, str]) -> None:
        self.claims = claims
        self.sent: list[Message] = []

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [NORTH, SOUTH, WEST]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        first = len(self.sent)
        self.sent += list(messages)
        for number, message in enumerate(self.sent):
            message.metadata.__dict__["_message_id"] = f"m{number}"
        return [f"m{number}" for number in range(first, len(self.sent))]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            sent = self.sent[int(message_id[1:])]
            claim = self.claims[sent.metadata.dst_node_id]
            if claim == "error":
                replies.append(Message(Error(code=1, reason="no"), reply_to=sent))
            else:
                record = RecordDict({RECORD: ConfigRecord({"site": claim})})
                replies.append(Message(record, reply_to=sent))
        return replies

    def send_and_receive(self, *arguments: Any, **named: Any) -> Iterable[Message]:
        raise NotImplementedError


def grid_over(tmp_path: Path, claims: dict[int, str]) -> tuple[StudyGrid, ThreeNodes]:
    (tmp_path / "nodes.json").write_text(json.dumps({"north": NORTH, "south": SOUTH}))
    inner = ThreeNodes(claims)
    return StudyGrid(inner, tmp_path / "nodes.json"), inner


def whoami(node: int) -> Message:
    content = RecordDict({RECORD: ConfigRecord({"stage": "whoami", "envelope": b""})})
    return Message(content, dst_node_id=node, message_type="query.relay")


def claimed(grid: StudyGrid, node: int) -> str:
    [message_id] = grid.push_messages([whoami(node)])
    [reply] = grid.pull_messages([message_id])
    return str(reply.content[RECORD]["site"])  # type: ignore[index]


def test_only_the_studys_nodes_are_seen(tmp_path: Path) -> None:
    grid, _ = grid_over(tmp_path, {})
    assert list(grid.get_node_ids()) == [NORTH, SOUTH]


def test_nothing_is_sent_to_another_node(tmp_path: Path) -> None:
    grid, inner = grid_over(tmp_path, {})
    list(grid.get_node_ids())
    with pytest.raises(StudyNodeUnknown, match="33"):
        grid.push_messages([whoami(NORTH), whoami(WEST)])
    assert inner.sent == []


def test_a_node_is_the_site_of_its_key_whatever_it_says(tmp_path: Path) -> None:
    grid, _ = grid_over(tmp_path, {NORTH: "north", SOUTH: "north"})
    list(grid.get_node_ids())
    assert claimed(grid, NORTH) == "north"
    assert claimed(grid, SOUTH) == ""


def test_an_error_reply_passes(tmp_path: Path) -> None:
    grid, _ = grid_over(tmp_path, {NORTH: "error"})
    list(grid.get_node_ids())
    [message_id] = grid.push_messages([whoami(NORTH)])
    [reply] = grid.pull_messages([message_id])
    assert reply.has_error()


def test_a_site_taken_out_is_out_at_the_next_look(tmp_path: Path) -> None:
    grid, inner = grid_over(tmp_path, {NORTH: "north"})
    assert SOUTH in grid.get_node_ids()
    (tmp_path / "nodes.json").write_text(json.dumps({"north": NORTH}))
    assert list(grid.get_node_ids()) == [NORTH]
    gone, there = grid.push_messages([whoami(SOUTH), whoami(NORTH)])
    assert [message.metadata.dst_node_id for message in inner.sent] == [NORTH]
    [reply] = grid.pull_messages([gone])  # others' exchange goes on without it
    assert reply.has_error() and "no longer" in reply.error.reason
    [reply] = grid.pull_messages([there])
    assert not reply.has_error()


def test_without_a_list_nobody_is_spoken_to(tmp_path: Path) -> None:
    assert read_nodes(tmp_path / "nodes.json") == {}
