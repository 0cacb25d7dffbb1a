"""`fedrad-site status`: one sentence per fact, what is wrong first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.enrolment import install_bundle, request_enrolment
from client.heartbeat import whoami
from client.home import SiteHome, approve_study, create_home, receive_study, refuse_study
from client.state import Seen, SiteState
from common.config import format_study
from common.enrolment import fingerprint_of
from common.errors import ProxyUnsupported
from common.identity import Purpose
from common.model.tiny import tiny_base_directory
from deploy.site.status import read_status, words
from server.consortium import create_server_home
from server.enrolment import approve
from server.studies import study_template
from server.submission import submit_study

ROOT = Path(__file__).parents[3]
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiteHome, Any, str]:
    """An enrolled site with one received study, not running."""
    directory = tmp_path_factory.mktemp("status")
    server = create_server_home(directory / "srv", consortium="lab", address="server:8443", now=NOW)
    home = create_home(
        directory / "north", site="north", operator_key=server.message_key().public, data=directory,
        bases={"tiny": tiny_base_directory()},
    )  # fmt: skip
    request = request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    signed = approve(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=NOW)
    install_bundle(home, signed)
    text = study_template(id="chest", base="tiny", sites=("north",), mode="plain", rounds=20, patients=40)
    study = submit_study(server, text, source="test", base=tiny_base_directory()).study
    encoded = format_study(study)
    receive_study(home, encoded, server.message_key().sign(Purpose.STUDY, encoded))
    return home, study, study.sha256


def write_run(home: SiteHome, *, link: dict[str, Any], programs: dict[str, Any] | None = None) -> None:
    run = home.directory / "run"
    run.mkdir(exist_ok=True)
    (run / "up.json").write_text(json.dumps({**whoami(), "programs": programs or {}}))
    (run / "agent.json").write_text(json.dumps(whoami()))
    whole = {"connected": True, "error": "", "clock_ahead_s": 0.1, "gateway_last_s": 0, **whoami()}
    (run / "link.json").write_text(json.dumps({**whole, **link}))


def said(home: SiteHome, *, later_s: float = 0.0) -> str:
    now = datetime.now(UTC).timestamp() + later_s
    return words(read_status(home, now=now), now=now)


def test_before_enrolment_it_says_what_to_do(tmp_path: Path) -> None:
    home = create_home(tmp_path / "new", site="new", operator_key="", data=tmp_path, bases={})
    assert said(home).startswith("Site new is not enrolled yet: send the request")
    assert "No study was received yet." in said(home)


def test_not_running_is_said_first(scene: tuple[SiteHome, Any, str]) -> None:
    home, _, sha256 = scene
    assert said(home).splitlines()[0] == (
        "Site north is enrolled at server:8443 but not running: start `fedrad-site up`."
    )
    assert f"Study chest ({sha256[:12]}) is waiting for your decision" in said(home)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ({"gateway_last_s": 10**11}, "Site north is connected to server:8443."),
        ({}, "its SuperNode is not connected"),
        ({"connected": False, "error": "ServerUnreachable: proxy"}, "has no connection to server:8443"),
        (
            {"connected": False, "error": "ServerUnreachable: proxy p:1: expected"},
            "ServerUnreachable: proxy p:1",
        ),
        ({"gateway_error": "server x: expected a connection"}, "server x: expected a connection"),
        ({"clock_ahead_s": -200.4}, "ClockSkewed: this machine's clock is 200 s behind the server's"),
    ],
)
def test_the_connection_is_said_in_words(
    scene: tuple[SiteHome, Any, str], link: dict[str, Any], expected: str
) -> None:
    write_run(scene[0], link=link)
    assert expected in said(scene[0])


def test_a_proxy_of_an_unknown_kind_is_refused_before_anything_starts(
    scene: tuple[SiteHome, Any, str],
) -> None:
    from deploy.site.cli import app

    with pytest.raises(ProxyUnsupported, match="https"):
        app(["up", "--home", str(scene[0].directory), "--proxy", "https://proxy:3129"], standalone_mode=False)
    assert not (scene[0].directory / "run" / "supervisor.lock").exists()


def test_a_link_of_its_own_logs_without_data(scene: tuple[SiteHome, Any, str]) -> None:
    """`fedrad-site link` as a unit starts it; the proxy's password is in neither log nor status."""
    home = scene[0]
    log, status = home.directory / "logs" / "link.jsonl", home.directory / "run" / "link.json"
    status.unlink(missing_ok=True)
    with subprocess.Popen(
        [sys.executable, "-m", "deploy.site.cli", "link", "--home", str(home.directory), "--port", "0"],
        cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "FEDRAD_PROXY": "http://it:s3cret@127.0.0.1:1"},
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + 60
            while not (log.is_file() and log.read_bytes().endswith(b"\n") and status.is_file()):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.terminate()
    assert process.returncode == 0
    line = json.loads(log.read_text().splitlines()[0])
    assert (line["logger"], line["values"]) == ("fedrad.link", ["ServerUnreachable"])
    assert "does not serve this site" in line["event"]
    assert "127.0.0.1:1" in json.loads(status.read_text())["error"]
    assert "s3cret" not in log.read_text() + status.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_program_that_does_not_run_is_named_with_its_log(scene: tuple[SiteHome, Any, str]) -> None:
    programs = {
        "agent": {"running": False, "ends": 3, "last_end": "exit 1"},
        "link": {"running": True, "ends": 0, "last_end": ""},
    }
    write_run(scene[0], link={}, programs=programs)
    assert "The agent is not running (it ended 3 times, last: exit 1); see logs/agent.log." in said(scene[0])
    assert "The link" not in said(scene[0])


def test_what_was_written_long_ago_does_not_count(scene: tuple[SiteHome, Any, str]) -> None:
    write_run(scene[0], link={})
    assert "not running" in said(scene[0], later_s=3600)


def test_services_of_their_own_count_as_running(scene: tuple[SiteHome, Any, str]) -> None:
    write_run(scene[0], link={"gateway_last_s": 10**11})
    (scene[0].directory / "run" / "up.json").unlink()
    assert said(scene[0]).startswith("Site north is connected")


@pytest.mark.parametrize("silence", ["never", "old", "gone", "another namespace, old"])
def test_a_dead_agent_is_named_where_nothing_supervises_it(
    scene: tuple[SiteHome, Any, str], silence: str
) -> None:
    home = scene[0]
    write_run(home, link={"gateway_last_s": 10**11})
    run = home.directory / "run"
    (run / "up.json").unlink()
    agent = run / "agent.json"
    if silence == "never":
        agent.unlink()
    elif silence == "gone":
        process = subprocess.Popen(["/bin/true"])
        process.wait()
        agent.write_text(json.dumps({**whoami(), "pid": process.pid}))
    else:
        if silence.startswith("another"):
            agent.write_text(json.dumps({"pid": 1, "pid_namespace": "pid:[1]"}))
        os.utime(agent, (1, 1))
    lines = said(home).splitlines()
    assert lines[0].startswith("Site north is not at work") and "its agent does not serve" in lines[0]
    assert lines[1].startswith("The agent has given no sign of life for 90 s")
    assert not read_status(home, now=time.time())["agent"]


def test_an_agent_in_another_container_counts_while_its_sign_is_fresh(
    scene: tuple[SiteHome, Any, str],
) -> None:
    write_run(scene[0], link={"gateway_last_s": 10**11, "pid": 10**7, "pid_namespace": "pid:[1]"})
    (scene[0].directory / "run" / "up.json").unlink()
    (scene[0].directory / "run" / "agent.json").write_text(
        json.dumps({"pid": 10**7, "pid_namespace": "pid:[2]"})
    )
    assert said(scene[0]).startswith("Site north is connected")


def test_an_agent_alone_is_told_that_its_link_is_missing(scene: tuple[SiteHome, Any, str]) -> None:
    write_run(scene[0], link={})
    for name in ("up.json", "link.json"):
        (scene[0].directory / "run" / name).unlink()
    assert "has no connection to server:8443" in said(scene[0])
    assert "The link has given no sign of life" in said(scene[0])


def test_a_studys_way_is_told(scene: tuple[SiteHome, Any, str]) -> None:
    home, study, sha256 = scene
    approve_study(home, sha256)
    assert f"Study chest ({sha256[:12]}) is approved." in said(home)
    SiteState(home.state_directory(sha256), study=sha256).see(Seen(6, "ab" * 32, "cd" * 32))
    assert f"is approved; 7 of {study.rounds} rounds are done." in said(home)
    refuse_study(home, sha256, "no")
    assert "is refused" in said(home)
    assert "ε 0.00 spent, 0.00 committed of 20.00" in said(home)
