"""Programs that are started again, and end with their supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import EngineBusy
from deploy.local.guardian import marked_processes
from deploy.supervision import MAX_LOG_BYTES, Account, Program, supervisor

ENVIRONMENT = {"PATH": os.environ["PATH"]}
SLEEPER = ["/bin/sh", "-c", "echo up; sleep 1000 & sleep 1000"]


def program(name: str, *command: str, account: Account | None = None) -> Program:
    return Program(name, command or SLEEPER, ENVIRONMENT, account)


def until(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 90
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_program_is_started_again_after_a_pause(tmp_path: Path) -> None:
    with supervisor(tmp_path / "run", logs=tmp_path / "logs") as programs:
        programs.start(program("one"))
        first = programs.pid("one")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        ended: list[str] = []
        until(lambda: ended.extend(programs.tick()) or ended)
        assert programs.pid("one") is None and ended == ["one"]
        started = time.monotonic()
        until(lambda: programs.tick() or programs.pid("one"))
        assert time.monotonic() - started > 0.8
        assert programs.state()["one"] == {"running": True, "ends": 1, "last_end": "SIGKILL"}


def test_a_program_that_does_not_stay_up_says_its_last_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    with supervisor(tmp_path / "run", logs=tmp_path / "logs") as programs:
        programs._clock = lambda: now[0]
        programs.start(program("one", "/bin/sh", "-c", "echo the port is taken; exit 3"))
        for _ in range(2):
            until(programs.tick)
            now[0] += 100.0
            programs.tick()
        assert "does not stay up" not in caplog.text
        until(programs.tick)
    assert "one does not stay up" in caplog.text and "the port is taken" in caplog.text


def test_pauses_grow_up_to_a_minute(tmp_path: Path) -> None:
    now = [0.0]
    with supervisor(tmp_path / "run", logs=tmp_path / "logs") as programs:
        programs._clock = lambda: now[0]
        programs.start(program("one", "/bin/false"))
        for pause in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
            until(programs.tick)
            now[0] += pause - 0.01
            programs.tick()
            assert programs.pid("one") is None, pause
            ends = programs.state()["one"]["ends"]
            now[0] += 0.02
            programs.tick()
            assert programs._running["one"].process is not None and ends == programs.state()["one"]["ends"]


def test_no_log_grows_without_end(tmp_path: Path) -> None:
    """A program's, and the proxy's beside it; the program goes on writing to the same file."""
    logs, now = tmp_path / "logs", [0.0]
    with supervisor(tmp_path / "run", logs=logs) as programs:
        programs._clock = lambda: now[0]
        programs.start(program("one", "/bin/sh", "-c", "while sleep 0.05; do echo again; done"))
        mine, door = logs / "one.log", logs / "nginx-access.log"
        for mark in (b"0", b"1", b"2"):
            for path in (mine, door):
                with path.open("ab") as file:
                    file.write(mark * (MAX_LOG_BYTES + 1))
            programs.tick()  # too soon after the last look, but for the first
            now[0] += 60.0
            programs.tick()
            assert mine.stat().st_size < 1000 and door.stat().st_size == 0
            for path in (mine, door):
                assert mark * 1000 in path.with_suffix(".log.1").read_bytes()
            until(lambda: mine.read_bytes().startswith(b"again\n"))
        assert sum(path.stat().st_size for path in logs.iterdir()) < 3 * MAX_LOG_BYTES


def test_a_log_that_cannot_be_cut_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs = tmp_path / "logs"
    with supervisor(tmp_path / "run", logs=logs) as programs:
        programs.start(program("one"))
        with (logs / "one.log").open("ab") as file:
            file.truncate(MAX_LOG_BYTES + 1)
        (logs / "one.log.1" / "in the way").mkdir(parents=True)
        programs.tick()
        assert programs.pid("one") is not None
        assert (logs / "one.log").stat().st_size > MAX_LOG_BYTES
    assert "a log could not be cut" in caplog.text


def test_leaving_ends_every_program_and_its_children(tmp_path: Path) -> None:
    with supervisor(tmp_path / "run", logs=tmp_path / "logs") as programs:
        programs.start(program("one"))
        programs.start(program("two"))
        token = (tmp_path / "run" / "supervisor.token").read_text()
        until(lambda: len(marked_processes(token)) >= 6)
    assert not marked_processes(token)


def test_two_supervisors_never_share_a_directory(tmp_path: Path) -> None:
    with (
        supervisor(tmp_path / "run", logs=tmp_path / "logs"),
        pytest.raises(EngineBusy, match="no other"),
        supervisor(tmp_path / "run", logs=tmp_path / "logs"),
    ):
        pass


def test_kill_9_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deploy.supervision import *\n"
        "d = Path(sys.argv[1])\n"
        "with supervisor(d / 'run', logs=d / 'logs') as p:\n"
        f"    p.start(Program('one', {SLEEPER!r}, {{'PATH': '/usr/bin:/bin'}}))\n"
        "    print('up', flush=True); time.sleep(1000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    token = (tmp_path / "run" / "supervisor.token").read_text()
    until(lambda: len(marked_processes(token)) >= 3)
    process.kill()
    process.communicate()
    until(lambda: not marked_processes(token))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_program_runs_as_its_account_without_root_or_its_groups(tmp_path: Path) -> None:
    with supervisor(tmp_path / "run", logs=tmp_path / "logs") as programs:
        programs.start(program("one", account=Account(65534, 65534, (65533,))))
        pid = programs.pid("one")
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = {line.split(":")[0]: line.split(":")[1].split() for line in lines}
        assert fields["Uid"] == ["65534"] * 4 and fields["Gid"] == ["65534"] * 4
        assert fields["Groups"] == ["65533"] and fields["CapEff"] == ["0" * 16]


def test_a_tethered_program_ends_with_its_parent_though_it_hides(tmp_path: Path) -> None:
    """As nginx does, which wipes its environment so that no marker is left to find it by."""
    script = Path(__file__).parents[2] / "deploy" / "tethered.py"
    code = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-I', '-S', {str(script)!r}, str(os.getpid()), "
        "'/usr/bin/env', '-i', '/bin/sleep', '1000'])\n"
        "print(p.pid, flush=True); time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().decode().strip()
    until(lambda: b"sleep" in (child / "cmdline").read_bytes())
    parent.kill()
    parent.communicate()
    until(lambda: not child.exists() or " Z " in (child / "stat").read_text())


def test_a_tether_to_somebody_else_is_refused(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "deploy" / "tethered.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, "1", "/bin/true"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "parent" in done.stderr
