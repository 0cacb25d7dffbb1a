"""A site's stages as traces: from the agent's own socket to a collector on this machine, and no other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.agent import Progress, SiteAgent
from client.cli import app
from client.home import open_home
from client.service import ProgressBoard, start_service
from client.traces import StageSpans, follow
from common.traces import Collector, Outbox, trace_id
from tests.otlp_collector import attributes, collector
from tests.simulator import POOL, Consortium, build

SITE = "alpha"
STUDY = "ef" * 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("traces"), mode="plain")


def spans() -> StageSpans:
    return StageSpans(SITE, lambda: {"chest": STUDY})


def test_a_contribution_has_its_length_and_the_servers_trace() -> None:
    made = spans()
    assert made.take("chest", 4, "contribute", 0, now=100.0) == []
    assert made.take("chest", 4, "contribute", 50, now=101.0) == []
    [span] = made.take("chest", 4, "contribute", 100, now=107.5)
    assert (span.trace, span.name, span.end_unix_s) == (trace_id(STUDY, 4), "contribute", 107.5)
    assert span.attributes == {
        "study": "chest", "round": 4, "stage": "contribute", "seconds": 107.5 - span.start_unix_s
    }  # fmt: skip
    assert span.start_unix_s == 100.0


def test_a_stage_without_a_beginning_is_a_mark_and_a_refused_one_is_forgotten() -> None:
    made = spans()
    [mark] = made.take("chest", 0, "keys", 100, now=5.0)
    assert mark.start_unix_s == mark.end_unix_s == 5.0
    made.take("chest", 0, "contribute", 0, now=6.0)
    made.take("chest", 1, "contribute", 0, now=50.0)
    [late] = made.take("chest", 0, "contribute", 100, now=60.0)
    assert late.start_unix_s == 60.0


def test_the_agents_progress_arrives_at_the_collector(world: Consortium, tmp_path: Path) -> None:
    board, path, stop = ProgressBoard(), tmp_path / "agent.sock", threading.Event()
    agent = SiteAgent(open_home(world.out / "sites" / SITE), models=POOL, report=board.post)
    service = start_service(agent, board, path, version="test")
    try:
        with collector() as there:
            outbox = Outbox(Collector(f"{there.url}/v1/traces"))
            thread = threading.Thread(
                target=follow, args=(f"unix:{path}", spans(), outbox), kwargs={"stop": stop}
            )
            thread.start()
            while not there.came.wait(0.05):  # until the watcher is there
                board.post(Progress("chest", 1, "hello", 100))
            stop.set()
            thread.join()
            found = there.spans()
    finally:
        stop.set()
        service.stop(0).wait()
        agent.close()
    assert attributes(found[0]) == {
        "fedrad.study": "chest", "fedrad.round": "1", "fedrad.stage": "hello", "fedrad.seconds": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "words"), [("", "expected a collector's URL"), ("http://10.0.0.7:4318", "--beyond-loopback")]
)
def test_the_command_refuses_no_collector_and_one_elsewhere(
    world: Consortium, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    done = CliRunner().invoke(app, ["traces", "--home", str(world.out / "sites" / SITE)])
    assert done.exit_code == 1
    assert words in str(done.exception)
