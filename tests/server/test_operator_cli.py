from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from common.canonical import canonical_json
from common.errors import CheckpointInvalid
from server.cli import app
from server.operator_cli import draw
from server.status import read_view
from tests.server.study_folder import SITES, START_UNIX_S, eventful, serve_round, write_folder

ROOT = Path(__file__).parents[2]


def text_of(directory: Path, *, now_s: float = START_UNIX_S + 100.0, width: int = 120) -> str:
    console = Console(width=width, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(draw([read_view(directory)], now_s=now_s))
    return captured.get()


def test_the_terminal_says_what_is_going_on_in_words(tmp_path: Path) -> None:
    eventful(tmp_path)
    text = text_of(tmp_path, width=200)
    for words in ("round 9 of 14", "release ε", "missing", "only the site can raise it", "not-connected × 2"):
        assert words in text, words
    assert all(site in text for site in SITES)


def test_an_open_attempt_is_shown_with_the_time_it_has_left(tmp_path: Path) -> None:
    study = write_folder(tmp_path)
    serve_round(tmp_path, study, 0)
    pending = {
        "round": 1, "attempt": 2, "cohort": list(SITES), "deadline_unix_s": START_UNIX_S + 160.0,
        "nonce": "0" * 32, "histories": {}, "sizes": {},
    }  # fmt: skip
    (tmp_path / "pending.json").write_bytes(canonical_json(pending))
    assert "round 2 attempt 2 is open: 60.0 s to the deadline" in text_of(tmp_path)
    late = text_of(tmp_path, now_s=START_UNIX_S + 500.0)
    assert "is open: past the deadline; up to 4.3 min more for sites still at work" in " ".join(late.split())
    assert "deadline passed" in text_of(tmp_path, now_s=START_UNIX_S + 5000.0)


def test_a_late_site_is_shown_with_how_late_it_was(tmp_path: Path) -> None:
    serve_round(tmp_path, write_folder(tmp_path), 0, late={"west": 95.0})
    assert "answered 1.6 min past the deadline" in text_of(tmp_path, width=200)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    eventful(tmp_path)
    assert max(map(len, text_of(tmp_path, width=width).splitlines())) <= width


def test_without_a_directory_it_is_the_servers_own(tmp_path: Path) -> None:
    eventful(tmp_path / "studies" / "chest")
    done = CliRunner().invoke(app, ["status", "--json"], env={"FEDRAD_SERVER_HOME": str(tmp_path)})
    assert [view["id"] for view in json.loads(done.stdout)] == ["chest"]


def test_a_server_without_studies_yet_says_so_and_another_folder_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert isinstance(refused.exception, CheckpointInvalid)
    (tmp_path / "server.json").write_text("{}")
    assert CliRunner().invoke(app, ["status", str(tmp_path)]).stdout == "no study yet\n"
    assert json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).stdout) == []


def test_json_is_one_document(tmp_path: Path) -> None:
    eventful(tmp_path)
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    (view,) = json.loads(done.stdout)
    assert (done.exit_code, view["missing_now"]) == (0, {"east": "BudgetExceeded"})


def test_watch_and_json_together_are_a_usage_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["status", str(tmp_path), "--watch", "--json"]).exit_code == 2


def test_a_folder_without_studies_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "status", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: CheckpointInvalid: ")
    assert done.stderr.count("\n") == 1


def test_watch_follows_the_files_until_it_is_told_to_stop(tmp_path: Path) -> None:
    study = eventful(tmp_path)
    out = tmp_path / "screen"
    with out.open("w") as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "status", str(tmp_path), "--watch", "--every", "0.5"],
            cwd=ROOT, stdout=screen, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip
        try:
            wait_for(out, "round 9 of 14", process)
            serve_round(tmp_path, study, 9)
            wait_for(out, "round 10 of 14", process)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
            assert process.stderr is not None
            process.stderr.close()


def wait_for(path: Path, words: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    while words not in path.read_text():
        assert process.poll() is None and time.monotonic() < until, path.read_text()[-2000:]
        time.sleep(0.1)


def test_backup_and_restore_by_command(tmp_path: Path) -> None:
    eventful(tmp_path / "study")
    (tmp_path / "passphrase").write_text("correct horse battery staple\n")
    file, new = str(tmp_path / "b.fedrad"), str(tmp_path / "new")
    secret = ["--passphrase-file", str(tmp_path / "passphrase")]
    done = CliRunner().invoke(app, ["backup", str(tmp_path / "study"), file, *secret, "--json"])
    assert (done.exit_code, json.loads(done.stdout)["keys"]) == (0, 1)
    done = CliRunner().invoke(app, ["restore", file, new, *secret])
    assert done.exit_code == 0
    assert "never run the old server again" in done.stdout
