"""The Flower engine: real SuperLink, SuperExecs, SuperNodes, ServerApp and ClientApp processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from common.errors import EngineFailed, ProcessDied, RunFailed
from deploy.local.flower import FAB, FlowerEngine, flower_engine
from deploy.local.guardian import marked_processes
from deploy.local.inprocess import run_inprocess
from deploy.local.processes import command_line
from tests.deploy import echo_client, echo_server

ECHO_FAB = Path(__file__).parent / "fab"
SITES = {"north": "unix:///run/north agent.sock", "south": "unix:///run/south.sock"}

# One study of two exchanges on one site, as fedrad-local would run it.
STUDY = """
import sys
from pathlib import Path
from deploy.local.flower import flower_engine
directory, fab = Path(sys.argv[1]), Path(sys.argv[2])
with flower_engine(directory / "engine", sites={"north": "unix:///run/north.sock"}) as engine:
    engine.run({"study-dir": str(directory)}, fab=fab, on_log=lambda line: print(line, flush=True))
print("over", flush=True)
"""


def test_the_bundle_carries_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(FAB))) as bundle:
        assert set(bundle.namelist()) == {"pyproject.toml", "README.md", ".info/CONTENT"}


@pytest.mark.parametrize("site", ["", "a/b", 'a"b', "../up", "a b"])
def test_a_site_id_that_is_no_file_name_is_refused(tmp_path: Path, site: str) -> None:
    with (
        pytest.raises(EngineFailed, match="site id"),
        flower_engine(tmp_path / "engine", sites={site: "unix:///run/a.sock"}),
    ):
        pass


@pytest.mark.parametrize("agent", ["", "/run/a.sock", "https://elsewhere", 'unix:///run/a" evil="1'])
def test_an_agent_address_that_is_no_socket_is_refused(tmp_path: Path, agent: str) -> None:
    with (
        pytest.raises(EngineFailed, match="agent address"),
        flower_engine(tmp_path / "engine", sites={"north": agent}),
    ):
        pass


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerEngine]:
    with flower_engine(tmp_path_factory.mktemp("flower") / "engine", sites=SITES) as running:
        yield running


def answers(study: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in study.iterdir() if path.name != "stages"}


@pytest.mark.slow
def test_both_engines_carry_the_same_bytes(engine: FlowerEngine, tmp_path: Path) -> None:
    for name in ("flower", "inprocess"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stages").write_text("turn:6000000 who fail")
    engine.run({"study-dir": str(tmp_path / "flower")}, fab=ECHO_FAB)
    run_inprocess(
        echo_server.app,
        echo_client.app,
        node_configs={engine.nodes[site]: {"site": site, "agent": agent} for site, agent in SITES.items()},
        run_config={"study-dir": str(tmp_path / "inprocess")},
    )
    over_flower = answers(tmp_path / "flower")
    assert over_flower == answers(tmp_path / "inprocess")
    assert over_flower["who-north"] == b"north unix:///run/north agent.sock"
    assert over_flower["fail-south"] == b"error 2: <class 'ValueError'>:<'asked to fail'>"
    assert len(over_flower["turn-north"]) == 6_000_000


@pytest.mark.slow
def test_the_client_app_process_imports_no_torch(engine: FlowerEngine, tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("heavy")
    engine.run({"study-dir": str(tmp_path)}, fab=ECHO_FAB)
    assert answers(tmp_path) == {"heavy-north": b"", "heavy-south": b""}


@pytest.mark.slow
def test_a_failing_server_app_is_a_named_error_with_its_log(engine: FlowerEngine, tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("echo raise")
    lines: list[str] = []
    with pytest.raises(RunFailed, match="the ServerApp was asked to fail"):
        engine.run({"study-dir": str(tmp_path)}, fab=ECHO_FAB, on_log=lines.append)
    assert any(line.startswith("exchange echo took") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["superexec", "superexec-north"])
def test_without_the_secret_nobody_gets_a_task(engine: FlowerEngine, whose: str) -> None:
    command = Path(f"/proc/{engine.processes.pid(whose)}/cmdline").read_text().split("\0")
    address = command[command.index("--runtime-api-address") + 1]
    authority = (engine.processes.directory / "tls" / "ca.crt").read_bytes()
    request = AcquireTaskRequest(supported_task_types=list(TaskType))

    def ask(secret: bytes | None) -> AcquireTaskResponse:
        interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
        if secret is not None:
            protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
            interceptors.append(
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)
            )
        client = RuntimeHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=authority,
            interceptors=interceptors,
        )
        with contextlib.closing(client):
            return client.AcquireTask(request)

    for wrong in (None, b"x" * 32):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            ask(wrong)
    assert not ask((engine.processes.directory / "keys" / "superexec.secret").read_bytes()).token


@pytest.mark.slow
def test_a_killed_supernode_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("echo sleep")
    killed_at: list[float] = []

    def kill_supernode(pid: int) -> None:
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    with flower_engine(tmp_path / "engine", sites={"north": "unix:///run/north.sock"}) as running:
        token = (tmp_path / "engine" / "token").read_text()
        pid = running.processes.pid("supernode-north")
        timer: list[threading.Timer] = []

        def on_log(line: str) -> None:
            if line.startswith("exchange echo"):
                timer.append(threading.Timer(0.1, kill_supernode, [pid]))
                timer[0].start()

        with pytest.raises(ProcessDied, match=r"supernode-north.*SIGKILL"):
            running.run({"study-dir": str(tmp_path)}, fab=ECHO_FAB, on_log=on_log)
        assert time.monotonic() - killed_at[0] < 15.0
    assert not marked_processes(token)


@pytest.mark.slow
def test_a_killed_server_app_is_named_long_before_its_lease_ends(
    engine: FlowerEngine, tmp_path: Path
) -> None:
    (tmp_path / "stages").write_text("echo sleep")
    token = (engine.processes.directory / "token").read_text()
    killed_at: list[float] = []

    def on_log(line: str) -> None:
        if line.startswith("exchange echo"):
            killed_at.append(time.monotonic())
            [pid] = [pid for pid in marked_processes(token) if "flwr-serverapp" in command_line(pid)]
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(RunFailed, match="killed"):
        engine.run({"study-dir": str(tmp_path)}, fab=ECHO_FAB, on_log=on_log)
    assert time.monotonic() - killed_at[0] < 30.0


@pytest.mark.slow
def test_after_kill_9_the_same_command_runs_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("echo sleep")
    command = [sys.executable, "-c", STUDY, str(tmp_path), str(ECHO_FAB)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("exchange echo"):
            break
    else:
        pytest.fail("the first run ended before it was killed")
    token = (tmp_path / "engine" / "token").read_text()
    assert len(marked_processes(token)) >= 5
    first.kill()
    first.communicate()
    (tmp_path / "stages").write_text("echo:100")
    second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert second.stdout.splitlines()[-1] == "over"
    assert (tmp_path / "echo-north").read_bytes() == echo_server.payload(0, 100)
    assert not marked_processes(token)
