"""Processes of an engine end with it, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import EngineBusy, EngineFailed, ProcessDied, ProcessNotReady
from deploy.local.guardian import MARKER, marked_processes
from deploy.local.processes import processes, tail

PATH_ONLY = {"PATH": os.defpath}

# A parent that starts a shell with a child of its own in the background, and says so.
PARENT = """
import sys, time
from pathlib import Path
from deploy.local.processes import processes
with processes(Path(sys.argv[1])) as group:
    family = "setsid sleep 300 & exec sleep 300"
    group.start("shell", ["sh", "-c", family], environment={"PATH": "/usr/bin:/bin"})
    time.sleep(0.3)
    print("started", flush=True)
    time.sleep(300)
"""


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def start_parent(directory: Path) -> tuple[subprocess.Popen[str], str]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(directory)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    token = (directory / "token").read_text()
    assert len(marked_processes(token)) == 2
    return parent, token


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_over_when_the_parent_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    parent, token = start_parent(tmp_path / "engine")
    parent.send_signal(number)
    parent.communicate()
    assert eventually(lambda: not marked_processes(token))


def test_next_run_ends_what_a_killed_one_left_even_without_its_guardian(tmp_path: Path) -> None:
    token = "f" * 32
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "token").write_text(token)
    (tmp_path / "engine" / "stale").touch()
    left = subprocess.Popen(["sleep", "300"], env={**PATH_ONLY, MARKER: token})
    with processes(tmp_path / "engine"):
        assert left.wait(10) == -signal.SIGKILL
        assert not (tmp_path / "engine" / "stale").exists()


def test_children_of_a_process_end_with_it(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group:
        group.start("shell", ["sh", "-c", "setsid sleep 300 & exec sleep 300"], environment=PATH_ONLY)
        token = (tmp_path / "engine" / "token").read_text()
        assert eventually(lambda: len(marked_processes(token)) == 2)
    assert not marked_processes(token)


def test_a_process_that_ends_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group:
        group.start("brave", ["sh", "-c", "echo it is over; exit 3"], environment=PATH_ONLY)
        with pytest.raises(ProcessDied, match=r"(?s)brave.*exit code 3.*it is over"):
            group.wait_until(lambda: False, what="nothing", timeout_s=10)


def test_a_killed_process_is_named_with_its_signal(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group:
        os.kill(group.start("victim", ["sleep", "300"], environment=PATH_ONLY), signal.SIGKILL)
        with pytest.raises(ProcessDied, match=r"victim.*SIGKILL"):
            group.wait_until(lambda: False, what="nothing", timeout_s=10)


def test_a_process_that_does_not_come_up_is_a_named_error(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group, pytest.raises(ProcessNotReady, match="the moon"):
        group.wait_until(lambda: False, what="the moon", timeout_s=0.1)


def test_a_stopped_process_is_not_missed(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group:
        group.start("short", ["sleep", "300"], environment=PATH_ONLY)
        group.stop("short")
        group.check()


def test_two_processes_of_one_name_are_refused(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group:
        group.start("twin", ["sleep", "300"], environment=PATH_ONLY)
        with pytest.raises(EngineFailed, match="twin"):
            group.start("twin", ["sleep", "300"], environment=PATH_ONLY)


def test_two_runs_on_one_directory_are_refused(tmp_path: Path) -> None:
    with (
        processes(tmp_path / "engine"),
        pytest.raises(EngineBusy, match="engine"),
        processes(tmp_path / "engine"),
    ):
        pass


def test_a_process_gets_exactly_the_environment_given(tmp_path: Path) -> None:
    with processes(tmp_path / "engine") as group:
        group.start("env", ["sh", "-c", "env; sleep 300"], environment={**PATH_ONLY, "A": "b"})
        log = group.logs / "env.log"
        assert eventually(lambda: MARKER in tail(log))
        names = {line.split("=")[0] for line in tail(log, 100).splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "A", MARKER}
