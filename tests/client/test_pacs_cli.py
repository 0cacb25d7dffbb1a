"""`fedrad-site pacs`: example, check, list, retry, as a PACS administrator types them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client.pacs.jobs import NEVER_S, Delivery, JobQueue, Stage, mark_failed
from tests.client.pacs.nodes import archive


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client.cli", "pacs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    assert run("example", str(tmp_path / "pacs.toml")).returncode == 0
    return tmp_path / "pacs.toml"


def test_example_is_written_once(config: Path) -> None:
    again = run("example", str(config))
    assert again.returncode == 1 and again.stderr.startswith("error: PacsConfigInvalid")


def test_check_asks_the_destination(config: Path) -> None:
    with archive() as kept:
        text = config.read_text().replace("port = 4242", f"port = {kept.port}")
        config.write_text(text.replace('ae_title = "PACS"', 'ae_title = "ARCHIVE"'))
        found = run("check", str(config), "--json")
        assert json.loads(found.stdout)["destination"] == "ARCHIVE"
    away = run("check", str(config))
    assert away.returncode == 1 and "DestinationUnreachable" in away.stderr


def test_dead_job_is_listed_with_its_reason_and_revived(config: Path, tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "pacs")
    path = tmp_path / f"{'ab' * 20}.dcm"
    path.write_bytes(b"image")
    job = queue.take(path, now_s=1)
    assert job
    job = replace(job, stage=Stage.DRAFTED, deliveries={"sr": Delivery("sr.dcm")})
    queue.bury(mark_failed(job, "sr", due_s=NEVER_S, reason="status A900"), reason="sr: status A900")
    (listed,) = json.loads(run("list", str(config), "--json").stdout)["jobs"]
    assert listed["stage"] == "dead" and "A900" in listed["reason"]
    assert run("retry", str(config), "ffff").returncode == 1
    assert run("retry", str(config), "abab").returncode == 0
    assert [one.stage for one in queue.open_jobs()] == [Stage.DRAFTED]
