"""The ServerApp of a deployed study: the rounds of `server.app`, over the study's own sites only.

The nodes that a study may talk to lie in its directory (`nodes.json`, written by `fedrad-server up` from the
registry and read again before every round). Guarantees: no message goes to a node of another site, also not
to ask who it is; a node that says it is another site than the one whose key it holds is not believed; a
revoked site is out at the next round. It writes how the study ended to `outcome.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp

from common.errors import FedRadError
from common.files import write_atomic
from common.relay import RECORD
from server.app import run_study

NODES_NAME = "nodes.json"
OUTCOME_NAME = "outcome.json"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in run_config `study-dir` to its end, or to a named failure."""
    directory = Path(str(context.run_config["study-dir"]))
    try:
        run_study(StudyGrid(grid, directory / NODES_NAME), directory)
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
        sites = read_nodes(self._path)
        self._site_of = {node: site for site, node in sites.items()}
        return [node for node in self._grid.get_node_ids(*arguments, **named) if node in self._site_of]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        allowed = list(messages)
        for message in allowed:
            node = message.metadata.dst_node_id
            if node not in self._site_of:
                raise StudyNodeUnknown(f"expected a node of this study's sites, got node {node}")
        ids = list(self._grid.push_messages(allowed))
        for message_id, message in zip(ids, allowed, strict=True):
            self._whoami[message_id] = message.metadata.dst_node_id
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            node = self._whoami.pop(reply.metadata.reply_to_message_id, 0)
            self._correct_claim(reply, self._site_of.get(node, ""))
        return replies

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
