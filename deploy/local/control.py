"""The SuperLink's Control API: register nodes, start a run, follow it.

It is what `flwr supernode register`, `flwr run` and `flwr list` call; calling it from here spares a Python
process of a second per question. `flwr run --stream` exits 0 when the run failed, so the status is asked.

It does not authenticate: Flower's Control API has no authentication, which is why it stays on loopback.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import EngineFailed

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RunStatus:
    """State of a run; `details` is the ServerApp's own message when it failed."""

    finished: bool
    completed: bool
    text: str
    details: str


class Control:
    """A connection to one SuperLink on loopback; close it."""

    def __init__(self, address: str, authority: Path) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        self._client = ControlHttpClient(
            f"https://{address}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            verify=context,
        )
        # Proxy settings of the environment are for the internet, not for loopback.
        self._client._client.close()
        self._client._client = httpx.Client(verify=context, timeout=_TIMEOUT_S, trust_env=False)
        self._health = f"https://{address}/health"

    def close(self) -> None:
        self._client.close()

    def is_up(self) -> bool:
        """Tell whether the SuperLink answers, with a certificate of the given authority."""
        try:
            return bool(self._client._client.get(self._health, timeout=2.0).is_success)
        except httpx.TransportError:
            return False

    def register_node(self, public_key_pem: bytes, *, name: str) -> int:
        """Admit a node key and return the node id that the SuperLink gave it."""
        response = self._client.RegisterNode(RegisterNodeRequest(public_key=public_key_pem, name=name))
        if not response.node_id:
            raise EngineFailed(f"the SuperLink refused the node key of {name}")
        return int(response.node_id)

    def online_nodes(self) -> set[int]:
        """Return the ids of the nodes whose SuperNode is connected; none while the SuperLink is busy."""
        try:
            nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        except httpx.HTTPError:
            return set()
        return {int(node.node_id) for node in nodes if node.status == "online"}

    def nodes(self) -> dict[int, bytes]:
        """Return the registered nodes: id to public key in PEM."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {int(node.node_id): bytes(node.public_key) for node in nodes if node.status != "unregistered"}

    def unregister_node(self, node_id: int) -> None:
        """Put a node out: from now on its key opens nothing."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def stop_run(self, run_id: int) -> None:
        self._client.StopRun(StopRunRequest(run_id=run_id))

    def start_run(self, fab_directory: Path, run_config: Mapping[str, str | int | float | bool]) -> int:
        """Bundle the FAB, start a run with it and return the run id."""
        content = build_fab_from_disk(fab_directory)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        response = self._client.StartRun(
            StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        )
        if not response.HasField("run_id"):
            raise EngineFailed(f"the SuperLink did not start the run: {response.note or 'no reason given'}")
        return int(response.run_id)

    def unfinished_runs(self) -> list[int]:
        """Return the ids of runs that have not ended."""
        runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return [int(run_id) for run_id, run in runs.items() if run.status.status != Status.FINISHED]

    def run_status(self, run_id: int) -> RunStatus:
        """Ask how a run is."""
        status = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
        return RunStatus(
            finished=status.status == Status.FINISHED,
            completed=status.sub_status == SubStatus.COMPLETED,
            text=f"{status.status}:{status.sub_status}".rstrip(":"),
            details=status.details,
        )

    def log_text(self, run_id: int, after_timestamp: float) -> Iterator[tuple[str, float]]:
        """Yield pieces of the ServerApp's output with their timestamps until the run has finished."""
        request = StreamLogsRequest(run_id=run_id, after_timestamp=after_timestamp)
        for response in self._client.StreamLogs(request):
            yield response.log_output, response.latest_timestamp
