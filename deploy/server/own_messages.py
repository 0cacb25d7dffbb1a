"""What a node gets from the SuperLink and gives it: messages to itself, and replies in its own name.

Flower proves which node asks, and then hands any object of the store to whoever knows its id, deletes any
message that a node says it has received, and takes from a node what only a ServerApp should send. Guarantees,
on Flower's own database, so that they hold across a restart: an object is found only by a node with a message
in this run whose tree holds it (one object may belong to the messages of many nodes); nobody confirms
another's message or a reply; a node pushes nothing but replies under its own name, in trees that name no
other message. An id that is not found says nothing of whether it exists.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Protocol

from fastapi import HTTPException

log = logging.getLogger("flwr")

_ADDRESSED = """
WITH RECURSIVE mine(id) AS (
    SELECT message_id FROM message_ins WHERE dst_node_id = :node AND run_id = :run
    UNION
    SELECT child_id FROM object_children JOIN mine ON parent_id = mine.id
)
SELECT 1 AS found FROM mine WHERE id = :object LIMIT 1
"""
_NOT_TO_CONFIRM = """
SELECT 1 AS found FROM message_ins WHERE message_id = :id AND dst_node_id != :node
UNION ALL SELECT 1 AS found FROM message_res WHERE message_id = :id LIMIT 1
"""
_NOT_IN_A_REPLY = """
SELECT 1 AS found FROM message_ins WHERE message_id IN (SELECT value FROM json_each(:ids))
UNION ALL SELECT 1 AS found FROM message_res
    WHERE message_id IN (SELECT value FROM json_each(:ids)) AND src_node_id != :node LIMIT 1
"""


class Database(Protocol):
    """The part of Flower's LinkState on SQLite that is asked here."""

    def query(self, query: str, data: dict[str, Any], /) -> list[dict[str, Any]]: ...


def is_addressed(state: Database, *, node_id: int, run_id: int, object_id: str) -> bool:
    """Tell whether a message of this run to this node holds the object."""
    return bool(
        state.query(_ADDRESSED, {"node": _signed(node_id), "run": _signed(run_id), "object": object_id})
    )


def may_confirm(state: Database, *, node_id: int, message_id: str) -> bool:
    """Tell whether a node may say that it has received this: not a message to another, and nobody's reply."""
    return not state.query(_NOT_TO_CONFIRM, {"id": message_id, "node": _signed(node_id)})


def may_push(state: Database, *, node_id: int, metadata: Any, tree: Any) -> bool:
    """Tell whether a pushed message is a reply in the node's name, over a tree that is this reply's alone.

    A tree that could name a request would make that request, which Flower holds until it is answered, hold
    whatever objects the node likes to name below it.
    """
    return (
        metadata.src_node_id == node_id
        and metadata.reply_to_message_id != ""
        and metadata.message_id == tree.object_id
        and not state.query(
            _NOT_IN_A_REPLY, {"ids": json.dumps(sorted(_ids(tree))), "node": _signed(node_id)}
        )
    )


def _ids(tree: Any) -> set[str]:
    return {tree.object_id, *(one for child in tree.children for one in _ids(child))}


def _signed(value: int) -> int:
    """As SQLite holds Flower's unsigned ids."""
    return value - (1 << 64) if value >= 1 << 63 else value


def guard_fleet(handlers: Any) -> None:
    """Put the rules around Flower's fleet handlers, which its routes call by name."""
    from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse

    pull, confirm, push = handlers.pull_object, handlers.confirm_message_received, handlers.push_messages

    def pull_object(request: Any, state: Any) -> Any:
        node = request.node.node_id
        if not is_addressed(state, node_id=node, run_id=request.run_id, object_id=request.object_id):
            log.warning("[Fleet.PullObject] node %s has no message with what it asks for", node)
            return PullObjectResponse(object_found=False, object_available=False)
        return pull(request=request, state=state)

    def confirm_message_received(request: Any, state: Any, store: Any) -> Any:
        node = request.node.node_id
        if not may_confirm(state, node_id=node, message_id=request.message_object_id):
            log.warning("[Fleet.ConfirmMessageReceived] node %s confirms what is not its own", node)
            return ConfirmMessageReceivedResponse()
        return confirm(request=request, state=state, store=store)

    def push_messages(request: Any, state: Any) -> Any:
        node = request.node.node_id
        for message, tree in zip(request.messages_list, request.message_object_trees, strict=False):
            if not may_push(state, node_id=node, metadata=message.metadata, tree=tree):
                log.warning("[Fleet.PushMessages] node %s pushes what is no reply of its own", node)
                raise HTTPException(403, "not a reply of this node")
        return push(request=request, state=state)

    handlers.pull_object = pull_object
    handlers.confirm_message_received = confirm_message_received
    handlers.push_messages = push_messages
