"""`fedrad-site serve` as a process: it says where it is, answers, and ends with 0 when told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from client.cli import app
from client.serving.users import TokenFile
from client.serving.worklist import Patient, Worklist
from common.errors import ServingRefused, VersionUnknown
from tests.client.serving.hosting import png
from tests.client.serving.models import talkative_base, talkative_release


def test_tokens_are_made_listed_and_revoked(tmp_path: Path) -> None:
    run = CliRunner().invoke
    token = run(app, ["token", "add", "dr.bob", "--home", str(tmp_path)]).stdout.strip()
    assert TokenFile(tmp_path / "serving" / "tokens.json").user(token).name == "dr.bob"
    assert "dr.bob" in run(app, ["token", "list", "--home", str(tmp_path)]).stdout
    assert run(app, ["token", "revoke", "dr.bob", "--home", str(tmp_path)]).exit_code == 0
    again = run(app, ["token", "revoke", "dr.bob", "--home", str(tmp_path)])
    assert isinstance(again.exception, ServingRefused)


def test_serving_without_a_release_or_with_half_a_tls_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert isinstance(run(app, ["serve", "--home", str(tmp_path)]).exception, VersionUnknown)
    half = run(app, ["serve", "--home", str(tmp_path), "--tls-cert", "x.pem"])
    assert isinstance(half.exception, ServingRefused)


@pytest.mark.slow
def test_a_served_release_answers_and_ends_in_order(tmp_path: Path) -> None:
    home = tmp_path / "home"
    worklist = Worklist(home / "serving" / "page" / "worklist")
    waiting, decided = (
        worklist.add(png(n), kind="png", source="upload", received_s=1, indication="", patient=Patient())
        for n in (1, 2)
    )
    worklist.decide(decided.id, {"time_s": 1}, accepted=True)
    command = [
        sys.executable, "-m", "client.cli", "serve", "--home", str(home),
        "--release", str(talkative_release()), "--base", str(talkative_base()),
        "--no-guard", "--no-page", "--port", "0", "--keep-cases", "30",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        found = None
        for line in process.stderr:
            found = re.search(r"drafting on (http://\S+)#token=(\S+)", line)
            if found:
                break
        assert found is not None
        url, token = found.groups()
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.post(f"{url}v1/report", headers=headers, content=png(1), timeout=300)
        assert answer.status_code == 200 and answer.json()["text"]
        assert (home / "run" / "drafting.sock").exists()
        assert [case.id for case in worklist.cases()] == [waiting.id]  # old decided cases went at the start
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
