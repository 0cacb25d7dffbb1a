"""Whose messages are whose at the SuperLink: Flower's own handlers and SQLite state behind the guard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

from deploy.server.own_messages import guard_fleet

SUPERLINK = 1


@dataclass
class Link:
    """A SuperLink's state on a file, with one run, and the nodes `north` and `south`."""

    path: Path
    handlers: Any
    state: Any = None
    run: int = 0

    def open(self) -> None:
        """Open the database, as a SuperLink does that starts again."""
        from flwr.server.superlink.linkstate import LinkStateFactory

        if self.state is not None:
            self.close()
        manager = NoOpFederationManager()
        self.state = LinkStateFactory(str(self.path), manager, ObjectStoreFactory(str(self.path))).state()

    def close(self) -> None:
        self.state._engine.dispose()
        self.state.object_store._engine.dispose()

    def start_run(self) -> int:
        run = self.state.create_run(
            None, None, "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
        )
        task = self.state.get_tasks(run_ids=[run])[0].task_id
        assert self.state.claim_task(task) and self.state.activate_task(task)
        return int(run)

    def node(self, name: str) -> int:
        found = self.state.get_node_id_by_public_key(name.encode())
        if found is None:
            found = self.state.create_node(NOOP_FLWR_AID, "", name.encode(), 30.0)
            assert self.state.activate_node(found, 30.0)
        return int(found)

    def send(self, name: str, *, own: str, shared: str = "adapter") -> Message:
        """Push a request to a node as the ServerApp does; `shared` is a record that others get too."""
        message = Message(
            RecordDict({"own": ConfigRecord({"text": own}), "shared": ConfigRecord({"text": shared})}),
            dst_node_id=self.node(name),
            message_type="query.relay",
        )
        message.metadata.__dict__.update(_run_id=self.run, _src_node_id=SUPERLINK)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, missing = self.state.store_message_and_object_tree(
            remove_content_from_message(message), get_object_tree(message), session
        )
        assert stored
        for object_id, value in get_all_nested_objects(message).items():
            if object_id in missing:
                assert self.state.store_object(self.run, session, object_id, value.deflate())
        return message

    def reply(self, to: Message, *, text: str) -> Message:
        reply = Message(RecordDict({"said": ConfigRecord({"text": text})}), reply_to=to)
        reply.metadata.__dict__.update(_src_node_id=to.metadata.dst_node_id, _dst_node_id=SUPERLINK)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def fetch(self, name: str) -> Any:
        answer = self.handlers.pull_messages(
            PullMessagesRequest(node=Node(node_id=self.node(name))), self.state, self.state.object_store
        )
        return answer.message_object_trees[0] if answer.messages_list else None

    def pull(self, name: str, object_id: str, run: int | None = None) -> Any:
        node = Node(node_id=self.node(name))
        return self.handlers.pull_object(
            PullObjectRequest(node=node, run_id=run or self.run, object_id=object_id), self.state
        )

    def confirm(self, name: str, object_id: str) -> None:
        node = Node(node_id=self.node(name))
        self.handlers.confirm_message_received(
            ConfirmMessageReceivedRequest(node=node, run_id=self.run, message_object_id=object_id),
            self.state,
            self.state.object_store,
        )

    def push(self, name: str, message: Message, tree: ObjectTree | None = None) -> Any:
        request = PushMessagesRequest(
            node=Node(node_id=self.node(name)),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree or get_object_tree(message)],
            clientapp_runtime_list=[0.1],
        )
        answer = self.handlers.push_messages(request, self.state)
        for object_id, value in get_all_nested_objects(message).items():
            if object_id in answer.objects_to_push:
                assert self.handlers.push_object(
                    PushObjectRequest(
                        node=request.node,
                        run_id=self.run,
                        session_id=answer.session_id,
                        object_id=object_id,
                        object_content=value.deflate(),
                    ),
                    self.state,
                ).stored
        return answer


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SuperLink's fresh database, made once: Flower's migrations take a second."""
    fresh = Link(tmp_path_factory.mktemp("fresh") / "superlink.db", None)
    fresh.open()
    fresh.close()
    return fresh.path


@pytest.fixture
def link(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, SUPERLINK)  # Flower's messages take it from their process
    handlers = SimpleNamespace(**{k: v for k, v in vars(fleet_handlers).items() if callable(v)})
    guard_fleet(handlers)
    made = Link(tmp_path / "superlink.db", handlers)
    made.path.write_bytes(migrated.read_bytes())
    made.open()
    made.run = made.start_run()
    yield made
    made.close()


def objects(message: Message) -> set[str]:
    return set(get_all_nested_objects(message))


def only(message: Message, *others: Message) -> set[str]:
    """The objects that this message shares with none of the others."""
    return objects(message).difference(*(objects(other) for other in others))


def test_each_node_gets_its_own_message_whole(link: Link) -> None:
    sent = {name: link.send(name, own=name) for name in ("north", "south")}
    for name, message in sent.items():
        tree = link.fetch(name)
        assert tree.object_id == message.object_id
        for object_id in objects(message):
            answer = link.pull(name, object_id)
            assert answer.object_found and answer.object_available and answer.object_content
        link.confirm(name, message.object_id)


def test_what_two_nodes_share_both_get_and_the_rest_is_each_ones_own(link: Link) -> None:
    north, south = link.send("north", own="a"), link.send("south", own="b")
    assert len(objects(north) & objects(south)) == 1  # pushed once, held once
    for object_id in only(south, north):
        assert not link.pull("north", object_id).object_found
    for object_id in only(north, south):
        assert not link.pull("south", object_id).object_found


def test_what_is_shared_stays_for_the_slower_one(link: Link) -> None:
    north, south = link.send("north", own="a"), link.send("south", own="b")
    link.confirm("north", north.object_id)
    for object_id in objects(south):
        assert link.pull("south", object_id).object_available


def test_a_message_is_found_again_after_the_superlink_was_started_anew(link: Link) -> None:
    north, south = link.send("north", own="a"), link.send("south", own="b")
    link.fetch("south")
    link.open()
    assert all(link.pull("south", one).object_available for one in objects(south))
    assert not any(link.pull("north", one).object_found for one in only(south, north))


def test_a_reply_is_for_the_server_alone(link: Link) -> None:
    asked = link.send("south", own="b")
    link.send("north", own="a")
    link.fetch("south")
    reply = link.reply(asked, text="a vector")
    link.push("south", reply)
    for name in ("north", "south"):
        assert not any(link.pull(name, one).object_found for one in objects(reply))


def test_another_run_is_no_way_around(link: Link) -> None:
    south = link.send("south", own="b")
    other = link.start_run()
    assert not any(link.pull("south", one, run=other).object_found for one in objects(south))


def test_an_unknown_id_is_answered_as_a_foreign_one(link: Link) -> None:
    south = link.send("south", own="b")
    assert link.pull("north", "0" * 64) == link.pull("north", south.object_id)


def test_nobody_confirms_anothers_message_or_reply_away(link: Link) -> None:
    asked, also = link.send("south", own="b"), link.send("south", own="c")
    link.fetch("south")
    reply = link.reply(asked, text="a vector")
    link.push("south", reply)
    for message in (also, reply):
        link.confirm("north", message.object_id)
        assert message.object_id in link.state.object_store
    link.confirm("south", also.object_id)
    assert also.object_id not in link.state.object_store


def refuses(link: Link, name: str, message: Message, tree: ObjectTree | None = None) -> bool:
    with pytest.raises(HTTPException) as error:
        link.push(name, message, tree)
    return error.value.status_code == 403


def test_a_reply_in_anothers_name_is_refused(link: Link) -> None:
    asked = link.send("south", own="b")
    assert refuses(link, "north", link.reply(asked, text="forged"))
    assert link.state.num_message_res() == 0


def test_a_node_sends_no_request_of_its_own(link: Link) -> None:
    """Flower would take it as the ServerApp's, and it would make any object the node's own."""
    for name in ("north", "south"):
        message = Message(RecordDict(), dst_node_id=link.node(name), message_type="query.relay")
        message.metadata.__dict__.update(_run_id=link.run, _src_node_id=SUPERLINK)
        message.metadata.__dict__["_message_id"] = message.object_id
        assert refuses(link, "north", message)
    assert link.state.num_message_ins() == 0


def test_a_reply_gives_no_request_other_objects(link: Link) -> None:
    """North confirms its request, which deletes it, and brings it back with south's objects below it."""
    asked, south = link.send("north", own="a"), link.send("south", own="b")
    link.fetch("north")
    link.confirm("north", asked.object_id)
    reply = link.reply(asked, text="yes")
    wanted = only(south, asked) - {south.object_id}
    again = ObjectTree(object_id=asked.object_id, children=[ObjectTree(object_id=one) for one in wanted])
    for tree in (again, ObjectTree(object_id=reply.object_id, children=[again])):
        assert refuses(link, "north", reply, tree)
    assert not any(link.pull("north", one).object_found for one in wanted)


def test_a_reply_whose_answer_was_lost_may_be_pushed_again(link: Link) -> None:
    asked = link.send("north", own="a")
    link.fetch("north")
    link.confirm("north", asked.object_id)
    reply = link.reply(asked, text="yes")
    link.push("north", reply)
    assert link.push("north", reply).objects_to_push == []
    assert link.state.num_message_res() == 1
