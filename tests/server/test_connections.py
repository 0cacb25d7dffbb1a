"""The server's own state in status, page and metrics: who is enrolled, connected, and until when."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from typer.testing import CliRunner

from server.cli import app
from server.connections import read_server
from server.metrics import registry_of
from server.operator_page.page import make_page
from tests.server.study_folder import START_UNIX_S, eventful

STATUS: dict[str, Any] = {
    "consortium": "[bold]chests & <co>", "address": "fedrad.example.org:8443", "ready": True, "programs": {},
    "sites": {
        "north": {"state": "approved", "online": True, "certificate_until_s": START_UNIX_S + 3 * 86400},
        "south": {"state": "approved", "online": False, "certificate_until_s": START_UNIX_S + 7200},
        "west": {"state": "revoked", "online": False, "certificate_until_s": 0},
    },
    "studies": {}, "broken_studies": {}, "warnings": {"node south": "south uses a node key of before"},
}  # fmt: skip


def write_status(directory: Path, **changes: Any) -> None:
    (directory / "server.json").write_text("{}")
    (directory / "state").mkdir(exist_ok=True)
    (directory / "state" / "supervisor.lock").touch()
    (directory / "status.json").write_text(json.dumps(STATUS | changes))


@contextmanager
def up(directory: Path) -> Iterator[None]:
    """Hold the lock that a running `up` holds."""
    with (directory / "state" / "supervisor.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def page_of(directory: Path) -> str:
    page = make_page(directory, hosts=("127.0.0.1",), clock=lambda: float(START_UNIX_S))
    return TestClient(page, base_url="http://127.0.0.1").get("/").text


def terminal(directory: Path) -> str:
    return CliRunner().invoke(app, ["status", str(directory)]).stdout


def test_before_the_first_study_the_sites_are_shown_with_their_connections(tmp_path: Path) -> None:
    write_status(tmp_path)
    with up(tmp_path):
        told, page = terminal(tmp_path), page_of(tmp_path)
    assert "no study yet" in told and "[bold]chests & <co>" in told and "node key of before" in told
    assert "chests &amp; &lt;co&gt;" in page and "ends in 3.0 days" in page and "ends in 2 h" in page
    for words in ("connected", "not connected", "revoked"):
        assert words in told and words in page
    assert "not running" not in told + page


def test_connections_are_not_known_while_up_is_not_running(tmp_path: Path) -> None:
    write_status(tmp_path)
    server = read_server(tmp_path)
    assert server is not None and server.running is False
    assert {site.online for site in server.sites} == {None}
    assert "up is not running" in terminal(tmp_path) and "up is not running" in page_of(tmp_path)


def test_beside_a_study_the_sites_are_shown_too(tmp_path: Path) -> None:
    eventful(tmp_path / "studies" / "chest")
    write_status(tmp_path)
    with up(tmp_path):
        told, page = terminal(tmp_path), page_of(tmp_path)
    assert "round 9 of 14" in told and "certificate" in told
    assert "9<span> of 14</span>" in page and "Sites of [bold]chests" in page


def test_metrics_say_who_is_connected_and_when_certificates_end(tmp_path: Path) -> None:
    write_status(tmp_path)
    with up(tmp_path):
        text = generate_latest(registry_of(tmp_path)).decode()
    assert 'fedrad_site_online{site="north"} 1.0' in text
    assert 'fedrad_site_online{site="south"} 0.0' in text
    assert 'certificate_end_time_seconds{site="south"}' in text and 'site="west"' not in text
    assert "fedrad_server_warnings 1.0" in text


@pytest.mark.parametrize("content", ["", "[]", '{"sites": 1}', '{"sites": {"a": {}}, "warnings": {}}'])
def test_a_status_of_another_form_is_left_out(tmp_path: Path, content: str) -> None:
    write_status(tmp_path)
    (tmp_path / "status.json").write_text(content)
    assert read_server(tmp_path) is None and terminal(tmp_path) == "no study yet\n"
