"""What site A can do with its Flower key, its certificate and the authority's: nothing but act as site A.

Each attempt is made by this test as a program of its own, through the real nginx and, where the door already
says no, also past it, straight at the SuperLink's port on the server's loopback.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import sqlite3
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.enrolment import authority_path, certificate_path, load_ec_key, node_key_path, tls_key_path
from common.ledger.audit import verify_bundle
from common.ledger.findings import Status
from deploy.local.control import Control
from deploy.local.guardian import marked_processes
from deploy.server.app import read_nodes
from server.bundles import export_run
from tests.deploy.lab import RealConsortium, listening_addresses, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@dataclass
class Scene:
    """A running consortium in which the attacker is site `north`, or holds what it holds."""

    consortium: RealConsortium

    @property
    def nodes(self) -> dict[str, int]:
        return read_nodes(self.consortium.directory / "srv" / "state" / "nodes.json")

    def node_key(self, site: str) -> ec.EllipticCurvePrivateKey:
        return load_ec_key(node_key_path(self.consortium.home(site)))

    def context(self, site: str | None) -> ssl.SSLContext:
        """TLS as this site's: its certificate, its key, the consortium's authority."""
        north = self.consortium.home("north")
        context = ssl.create_default_context(cafile=str(authority_path(north)))
        if site is not None:
            home = self.consortium.home(site)
            context.load_cert_chain(str(certificate_path(home)), str(tls_key_path(home)))
        return context

    @property
    def superlink(self) -> str:
        """Flower's port, which only the server's own loopback reaches."""
        lines = (self.consortium.directory / "srv" / "proxy" / "nginx.conf").read_text()
        return "127.0.0.1:" + lines.split("upstream superlink { server 127.0.0.1:")[1].split(";")[0]

    @property
    def inside(self) -> ssl.SSLContext:
        return ssl.create_default_context(
            cafile=str(self.consortium.directory / "srv" / "state" / "tls" / "ca.crt")
        )

    @contextlib.contextmanager
    def fleet(
        self, key: ec.EllipticCurvePrivateKey, *, certificate: str | None = "north", past_door: bool = False
    ) -> Iterator[FleetHttpClient]:
        address = self.superlink if past_door else f"localhost:{self.consortium.port}"
        with FleetHttpClient(
            f"https://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
            verify=self.inside if past_door else self.context(certificate),
        ) as client:
            yield client


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("scene")
    with running(directory, enrolled=("north", "south")) as consortium:
        consortium.start_server()
        consortium.start_site("south")
        consortium.wait(lambda: consortium.online("south"), "south online")
        yield Scene(consortium)


def refused(error: pytest.ExceptionInfo[httpx.HTTPStatusError], *status: int) -> bool:
    return error.value.response.status_code in status


def test_north_itself_is_served(scene: Scene) -> None:
    """The attempts below fail for who asks, not for how."""
    with scene.fleet(scene.node_key("north")) as fleet:
        key = public_key_to_bytes(scene.node_key("north").public_key())
        answer = fleet.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30))
        assert answer.node_id == scene.nodes["north"]
        assert not fleet.PullMessages(
            PullMessagesRequest(node=Node(node_id=scene.nodes["north"]))
        ).messages_list


@pytest.mark.parametrize("whose", ["srv/state", "south/run"])
def test_all_but_the_door_listens_on_loopback_only(scene: Scene, whose: str) -> None:
    """The door itself is nginx, which hides from the marker; here it is told to listen on loopback too."""
    token = (scene.consortium.directory / whose / "supervisor.token").read_text()
    pids = set(marked_processes(token))
    assert len(pids) >= 2
    assert listening_addresses(pids) == {"127.0.0.1"}


@pytest.mark.parametrize("past_door", [False, True])
def test_north_cannot_pull_as_south(scene: Scene, past_door: bool) -> None:
    with scene.fleet(scene.node_key("north"), past_door=past_door) as fleet:
        with pytest.raises(httpx.HTTPStatusError) as error:
            fleet.PullMessages(PullMessagesRequest(node=Node(node_id=scene.nodes["south"])))
        assert refused(error, 401)


@pytest.mark.parametrize("past_door", [False, True])
def test_north_cannot_activate_south(scene: Scene, past_door: bool) -> None:
    key = public_key_to_bytes(scene.node_key("south").public_key())
    with scene.fleet(scene.node_key("north"), past_door=past_door) as fleet:
        with pytest.raises(httpx.HTTPStatusError) as error:
            fleet.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30))
        assert refused(error, 401)


def test_norths_certificate_does_not_carry_souths_stolen_node_key(scene: Scene) -> None:
    with scene.fleet(scene.node_key("south"), certificate="north") as fleet:
        with pytest.raises(httpx.HTTPStatusError) as error:
            fleet.PullMessages(PullMessagesRequest(node=Node(node_id=scene.nodes["south"])))
        assert refused(error, 403)


def test_a_node_key_alone_does_not_get_in(scene: Scene) -> None:
    with scene.fleet(scene.node_key("north"), certificate=None) as fleet:
        with pytest.raises(httpx.HTTPStatusError) as error:
            fleet.PullMessages(PullMessagesRequest(node=Node(node_id=scene.nodes["north"])))
        assert refused(error, 403)


@pytest.mark.parametrize("past_door", [False, True])
def test_north_cannot_bring_in_a_node_of_its_own(scene: Scene, past_door: bool) -> None:
    fresh = ec.generate_private_key(ec.SECP384R1())
    key = public_key_to_bytes(fresh.public_key())
    with scene.fleet(fresh, past_door=past_door) as fleet:
        for call in (
            lambda: fleet.RegisterNode(RegisterNodeFleetRequest(public_key=key)),
            lambda: fleet.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30)),
        ):
            with pytest.raises(httpx.HTTPStatusError) as error:
                call()
            assert error.value.response.is_client_error, error.value.response.text
    assert set(scene.nodes) == {"north", "south"}


@pytest.mark.parametrize("call", ["start-run", "list-nodes", "list-runs", "register-node", "unregister-node"])
def test_north_cannot_call_the_control_api(scene: Scene, call: str) -> None:
    with httpx.Client(verify=scene.context("north")) as client:
        answer = client.post(f"https://localhost:{scene.consortium.port}/v1/control/{call}", content=b"")
        assert answer.status_code == 404


def test_north_cannot_start_a_run_or_list_nodes(scene: Scene) -> None:
    """With Flower's own client, as `flwr run` and `flwr supernode list` would."""
    with ControlHttpClient(
        f"https://localhost:{scene.consortium.port}",
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        verify=scene.context("north"),
    ) as control:
        for request in (
            lambda: control.StartRun(StartRunRequest()),
            lambda: control.ListNodes(ListNodesRequest()),
        ):
            with pytest.raises(httpx.HTTPStatusError) as error:
                request()
            assert refused(error, 404)


def test_an_old_signature_of_souths_opens_nothing_later(scene: Scene) -> None:
    """Flower's node signature covers a timestamp only; caught today, it is worth nothing in ten minutes."""
    key = scene.node_key("south")
    for minutes in (-10, 10):
        when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
        stamp = when.isoformat()
        headers = {
            "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": b64encode(sign_message(key, stamp.encode())).decode(),
            "content-type": "application/protobuf",
        }
        body = PullMessagesRequest(node=Node(node_id=scene.nodes["south"])).SerializeToString()
        with httpx.Client(verify=scene.context("south")) as client:
            url = f"https://localhost:{scene.consortium.port}/v1/fleet/pull-messages"
            assert client.post(url, content=body, headers=headers).status_code == 401


PROJECT = """
[project]
name = "evil"
version = "0.1.0"
description = "code for the sites"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "mallory"
[tool.flwr.app.components]
serverapp = "evil_server:app"
clientapp = "evil_client:app"
[tool.flwr.app.config]
out = ""
"""
EVIL_CLIENT = """
from pathlib import Path
Path("{mark}").write_text("here")
from flwr.clientapp import ClientApp
app = ClientApp()
"""
EVIL_SERVER = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(1)
    ask = RecordDict({"fedrad": ConfigRecord({"stage": "whoami", "envelope": b""})})
    ids = set(grid.push_messages([Message(ask, dst_node_id=n, message_type="query.relay") for n in nodes]))
    for _ in range(120):
        for reply in grid.pull_messages(ids):
            said = "error" if reply.has_error() else str(reply.content["fedrad"]["site"])
            with open(context.run_config["out"], "a") as file:
                file.write(said + chr(10))
            ids.discard(reply.metadata.reply_to_message_id)
        if not ids:
            break
        time.sleep(1)
"""


def test_a_run_started_on_the_servers_own_loopback_brings_no_code_to_a_site(
    scene: Scene, tmp_path: Path
) -> None:
    """Even with the operator's machine in foreign hands: the site's installed ClientApp answers."""
    mark, out, fab = tmp_path / "mark", tmp_path / "out", tmp_path / "fab"
    fab.mkdir()
    (fab / "pyproject.toml").write_text(PROJECT)
    (fab / "evil_client.py").write_text(EVIL_CLIENT.replace("{mark}", str(mark)))
    (fab / "evil_server.py").write_text(EVIL_SERVER)
    authority = scene.consortium.directory / "srv" / "state" / "tls" / "ca.crt"
    with contextlib.closing(Control(scene.superlink, authority)) as control:
        run_id = control.start_run(fab, {"out": str(out)})
        scene.consortium.wait(lambda: control.run_status(run_id).finished, "the run's end", timeout_s=300)
    assert "south" in out.read_text().splitlines()
    assert not mark.exists()


ASKING_SERVER = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(1)
    ask = RecordDict({"fedrad": ConfigRecord({"stage": "whoami", "envelope": b""})})
    list(grid.push_messages([Message(ask, dst_node_id=n, message_type="query.relay") for n in nodes]))
    for _ in range(300):
        if Path(context.run_config["out"]).exists():
            break
        time.sleep(1)
"""
REPLY_OBJECTS = """
WITH RECURSIVE part(id) AS (
    SELECT message_id FROM message_res WHERE src_node_id = ? AND run_id = ?
    UNION SELECT child_id FROM object_children JOIN part ON parent_id = part.id
)
SELECT object_id FROM part JOIN objects ON object_id = id WHERE is_available
"""


def signed(number: int) -> int:
    """As SQLite holds Flower's unsigned ids."""
    return number - (1 << 64) if number >= 1 << 63 else number


def test_north_cannot_fetch_what_south_has_answered(scene: Scene, tmp_path: Path) -> None:
    """A run asks both and does not take the answers; north knows the ids of south's and asks for them."""
    out, fab = tmp_path / "out", tmp_path / "fab"
    fab.mkdir()
    (fab / "pyproject.toml").write_text(PROJECT)
    (fab / "evil_client.py").write_text("from flwr.clientapp import ClientApp\napp = ClientApp()\n")
    (fab / "evil_server.py").write_text(ASKING_SERVER)
    state = scene.consortium.directory / "srv" / "state"
    database = f"file:{state / 'superlink.db'}?mode=ro"
    nodes, north = scene.nodes, Node(node_id=scene.nodes["north"])
    with (
        contextlib.closing(Control(scene.superlink, state / "tls" / "ca.crt")) as control,
        contextlib.closing(sqlite3.connect(database, uri=True)) as store,
        scene.fleet(scene.node_key("north")) as outside,
        scene.fleet(scene.node_key("north"), past_door=True) as inside,
    ):
        key = public_key_to_bytes(scene.node_key("north").public_key())
        outside.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=60))
        run_id = control.start_run(fab, {"out": str(out)})
        try:
            found: list[str] = []

            def answered() -> bool:
                asked = (signed(nodes["south"]), signed(run_id))
                found[:] = [row[0] for row in store.execute(REPLY_OBJECTS, asked)]
                return len(found) > 1

            scene.consortium.wait(answered, "south's answer at the SuperLink")
            for fleet in (outside, inside):
                for object_id in found:
                    answer = fleet.PullObject(
                        PullObjectRequest(node=north, run_id=run_id, object_id=object_id)
                    )
                    assert not answer.object_found and not answer.object_content
            own = outside.PullMessages(PullMessagesRequest(node=north))
            for object_id in _object_ids(own.message_object_trees[0]):  # what is north's own, it gets
                answer = outside.PullObject(PullObjectRequest(node=north, run_id=run_id, object_id=object_id))
                assert answer.object_available and answer.object_content
        finally:
            outside.DeactivateNode(DeactivateNodeRequest(node_id=north.node_id))  # for its own SuperNode
            out.touch()
            scene.consortium.wait(lambda: control.run_status(run_id).finished, "the run's end")


@dataclass
class Caught:
    """A study whose request to south is on its way: south's SuperNode is dead, its message waits."""

    run_id: int
    message_id: str
    object_ids: list[str]


@pytest.fixture(scope="module")
def caught(scene: Scene) -> Iterator[Caught]:
    """Let a stage's request to south wait at the SuperLink, and read it there as south's node would.

    South's programs are killed, not stopped: its node has said no goodbye, so it still counts as there, and
    is sent what only it may read, not the `whoami` that is the same for all.
    """
    consortium = scene.consortium
    consortium.submit("chest", ("north", "south"), rounds=2)
    consortium.start_site("north")
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.rounds("chest") >= 1, "one round")
    consortium.kill("south")
    with scene.fleet(scene.node_key("south"), certificate="south") as fleet:
        node = Node(node_id=scene.nodes["south"])
        key = public_key_to_bytes(scene.node_key("south").public_key())
        answer: Any = None
        end = time.monotonic() + 240
        while not (answer and answer.messages_list) and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):  # once the node counts as gone
                fleet.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=60))
            answer = fleet.PullMessages(PullMessagesRequest(node=node))
            time.sleep(0.5)
        assert answer.messages_list
        proto = answer.messages_list[0]
        objects = sorted(_object_ids(answer.message_object_trees[0]))
    yield Caught(proto.metadata.run_id, proto.metadata.message_id, objects)


def _object_ids(tree: Any) -> set[str]:
    return {tree.object_id, *(one for child in tree.children for one in _object_ids(child))}


@pytest.mark.parametrize("past_door", [False, True])
def test_north_cannot_fetch_a_message_to_south(scene: Scene, caught: Caught, past_door: bool) -> None:
    """Not by naming itself south, and not by asking, as itself, for objects whose ids it knows."""
    assert len(caught.object_ids) > 1
    with scene.fleet(scene.node_key("north"), past_door=past_door) as fleet:
        for object_id in caught.object_ids:
            answer = fleet.PullObject(
                PullObjectRequest(
                    node=Node(node_id=scene.nodes["north"]), run_id=caught.run_id, object_id=object_id
                )
            )
            assert not answer.object_found and not answer.object_content
            with pytest.raises(httpx.HTTPStatusError) as error:
                fleet.PullObject(
                    PullObjectRequest(
                        node=Node(node_id=scene.nodes["south"]), run_id=caught.run_id, object_id=object_id
                    )
                )
            assert refused(error, 401)
    with scene.fleet(scene.node_key("south"), certificate="south") as fleet:
        for object_id in caught.object_ids:  # they are there, for whom they are
            assert fleet.PullObject(
                PullObjectRequest(
                    node=Node(node_id=scene.nodes["south"]), run_id=caught.run_id, object_id=object_id
                )
            ).object_found


def test_north_cannot_delete_a_message_to_south(scene: Scene, caught: Caught) -> None:
    """Flower deletes what a node says it has received, whosever it is."""
    with scene.fleet(scene.node_key("north")) as fleet:
        fleet.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=Node(node_id=scene.nodes["north"]),
                run_id=caught.run_id,
                message_object_id=caught.message_id,
            )
        )
    with scene.fleet(scene.node_key("south"), certificate="south") as fleet:
        assert fleet.PullObject(
            PullObjectRequest(
                node=Node(node_id=scene.nodes["south"]), run_id=caught.run_id, object_id=caught.message_id
            )
        ).object_found


def test_a_reply_pushed_by_north_as_south_is_not_taken(scene: Scene, caught: Caught) -> None:
    """The SuperLink takes none in another's name; were one taken, it would lack south's message key."""
    TaskIdentity.run_id, TaskIdentity.node_id = caught.run_id, scene.nodes["south"]
    TaskIdentity.task_id = 1
    reply = Message(
        RecordDict({"fedrad": ConfigRecord({"stage": "hello", "envelope": b"forged"})}),
        dst_node_id=1,
        message_type="query.relay",
    )
    reply.metadata.__dict__.update(
        _src_node_id=scene.nodes["south"],
        _reply_to_message_id=caught.message_id,
        _run_id=caught.run_id,
    )
    reply.metadata.__dict__["_message_id"] = reply.object_id
    tree = get_object_tree(reply)
    pushed = message_to_proto(remove_content_from_message(reply))

    def push(fleet: FleetHttpClient, as_whom: str) -> None:
        node = Node(node_id=scene.nodes[as_whom])
        answer = fleet.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[pushed],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.1],
            )
        )
        for object_id, value in get_all_nested_objects(reply).items():
            if object_id in answer.objects_to_push:
                fleet.PushObject(
                    PushObjectRequest(
                        node=node,
                        run_id=caught.run_id,
                        session_id=answer.session_id,
                        object_id=object_id,
                        object_content=value.deflate(),
                    )
                )

    with scene.fleet(scene.node_key("north")) as fleet:
        with pytest.raises(httpx.HTTPStatusError) as error:
            push(fleet, "south")
        assert refused(error, 401)
    for past_door in (False, True):  # a node's own session, with another's name inside
        with scene.fleet(scene.node_key("north"), past_door=past_door) as fleet:
            with pytest.raises(httpx.HTTPStatusError) as error:
                push(fleet, "north")
            assert refused(error, 403)
    scene.consortium.start_site("south")
    scene.consortium.wait(
        lambda: scene.consortium.study_state("chest") == "finished", "the study's honest end", timeout_s=400
    )
    for event in scene.consortium.events("chest"):
        if event["event"] == "round":  # south was away for a while: missed, never replaced
            assert event["cohort"] == ["north", "south"] and set(event["missing"]) <= {"south"}
    study = scene.consortium.directory / "srv" / "studies" / "chest"
    bundle = export_run(study, exported_s=int(time.time()), software="fedrad 0.1.0")
    found = {finding.control: finding.status for finding in verify_bundle(bundle).findings}
    assert found["contribution-signatures"] is Status.PASS  # every contribution carries its site's signature


def test_souths_files_are_nowhere_on_the_server(scene: Scene, caught: Caught) -> None:
    """The server's directory holds no image, no report, no site key of anybody."""
    from client.data.store import read_pairs

    server = scene.consortium.directory / "srv"
    data = scene.consortium.directory / "data" / "south"
    pairs = read_pairs(data)
    words = [pair.findings.encode() for pair in pairs if len(pair.findings) > 40][:10]
    assert words
    keys = [
        path.read_bytes().split(b"\n")[1]
        for path in (scene.consortium.directory / "south" / "keys").iterdir()
    ]
    for path in (p for p in Path(server).rglob("*") if p.is_file() and not p.is_symlink()):
        content = path.read_bytes()
        assert b"\x89PNG" not in content[:8], path
        assert not any(secret in content for secret in (*words, *keys)), path
