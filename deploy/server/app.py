"""The ServerApp of a deployed study: the rounds of `server.app`, over the study's own sites only.

The nodes that a study may talk to lie in its directory (`nodes.json`, written by `fedrad-server up` from the
registry and read again before every round). Guarantees: no message goes to a node of another site, also not
to ask who it is; a node that says it is another site than the one whose key it holds is not believed; a site
that was revoked or withdrew is out at the next round, and what would still go to it counts as lost. It writes
how the study ended to `outcome.json`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from common.errors import FedRadError
from common.files import write_atomic
from common.relay import RECORD
from server.app import run_study

NODES_NAME = "nodes.json"
OUTCOME_NAME = "outcome.json"
_NO_LONGER = Error(ErrorCode.NODE_UNAVAILABLE, "this site no longer takes part in the study")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in run_config `study-dir` to its end, or to a named failure."""
    directory = Path(str(context.run_config["study-dir"]))
    try:
        nodes = directory / NODES_NAME
        run_study(StudyGrid(grid, nodes), directory, expected=lambda: read_nodes(nodes))
    except FedRadError as error:
        _write_outcome(directory, "failed", f"{error.code}: {error}")
        raise
    _write_outcome(directory, "finished", "")


class StudyGrid(Grid):
    """Flower's Grid, cut down to the nodes of one study."""

    def __init__(self, grid: Grid, nodes: Path) -> None:
        self._grid = grid
        self._path = nodes
        self._site_of: dict[int, str] = {}
        self._gone: set[int] = set()
        self._unsent: dict[str, Message] = {}
        self._whoami: dict[str, int] = {}

    def set_run(self, run_id: int) -> None:
        self._grid.set_run(run_id)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        return self._grid.create_message(*arguments, **named)

    def get_node_ids(self, *arguments: Any, **named: Any) -> Iterable[int]:
        """Return the connected nodes of this study's sites, as the registry has them now."""
        before = self._gone | self._site_of.keys()
        self._site_of = {node: site for site, node in read_nodes(self._path).items()}
        self._gone = before - self._site_of.keys()
        return [node for node in self._grid.get_node_ids(*arguments, **named) if node in self._site_of]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send to the study's nodes; what is for one that was taken out since stays here, undelivered."""
        given = list(messages)
        for message in given:
            node = message.metadata.dst_node_id
            if node not in self._site_of and node not in self._gone:
                raise StudyNodeUnknown(f"expected a node of this study's sites, got node {node}")
        allowed = [message for message in given if message.metadata.dst_node_id in self._site_of]
        pushed = iter(self._grid.push_messages(allowed)) if allowed else iter(())
        ids = []
        for message in given:
            node = message.metadata.dst_node_id
            if node in self._site_of:
                ids.append(next(pushed))
                self._whoami[ids[-1]] = node
            else:
                ids.append(f"unsent-{secrets.token_hex(8)}")
                self._unsent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = list(message_ids)
        unsent = [self._unsent.pop(name) for name in asked if name in self._unsent]
        sent = [name for name in asked if not name.startswith("unsent-")]
        replies = list(self._grid.pull_messages(sent)) if sent else []
        for reply in replies:
            node = self._whoami.pop(reply.metadata.reply_to_message_id, 0)
            self._correct_claim(reply, self._site_of.get(node, ""))
        return [*replies, *(Message(_NO_LONGER, reply_to=message) for message in unsent)]

    def send_and_receive(self, *arguments: Any, **named: Any) -> Iterable[Message]:
        raise NotImplementedError("a study pushes and pulls")

    @staticmethod
    def _correct_claim(reply: Message, site: str) -> None:
        """Take away a node's word that it is another site than its registered key says."""
        record = reply.content.get(RECORD) if reply.has_content() else None
        if isinstance(record, ConfigRecord) and record.get("site", site) != site:
            record["site"] = ""


class StudyNodeUnknown(FedRadError):
    """A message was addressed to a node that no site of the study holds."""


def read_nodes(path: Path) -> dict[str, int]:
    """Read site to node id; empty where there is no file, so that nobody is spoken to."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return {str(site): int(node) for site, node in value.items()}


def read_outcome(directory: Path) -> tuple[str, str]:
    """Return how a study ended (`finished`, `failed` or empty) and why."""
    try:
        value = json.loads((directory / OUTCOME_NAME).read_text())
    except (OSError, ValueError):
        return "", ""
    return str(value.get("state", "")), str(value.get("reason", ""))


def _write_outcome(directory: Path, state: str, reason: str) -> None:
    write_atomic(directory / OUTCOME_NAME, json.dumps({"state": state, "reason": reason}).encode())
