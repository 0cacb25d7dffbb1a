"""A full disk, at a site and at the server: real ENOSPC on a small tmpfs; needs root to mount one."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.local.guardian import marked_processes
from tests.deploy.faults.consortium import faulty
from tests.deploy.lab import running

pytestmark = pytest.mark.slow
needs_a_disk = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs"),
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@contextmanager
def small_disk(path: Path, *, megabytes: int) -> Iterator[None]:
    path.mkdir()
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(path)], check=True)


@contextmanager
def full(path: Path) -> Iterator[None]:
    """Fill a disk to its last byte; it has room again on leaving."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as handle:
        try:
            while True:
                handle.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize("whose", [pytest.param(name, marks=needs_a_disk) for name in ("alpha", "srv")])
def test_a_full_disk_is_waited_out_and_changes_nothing(tmp_path: Path, whose: str) -> None:
    with small_disk(tmp_path / whose, megabytes=200), faulty(tmp_path) as consortium:
        study = consortium.submit("undisturbed")
        consortium.finish(study)
        adapter = consortium.adapter(study)
        study = consortium.submit("disturbed")
        consortium.at(study, "keys", "alpha")
        with full(tmp_path / whose):
            time.sleep(20)
            assert all(process.poll() is None for process in consortium.lab.processes.values()), (
                f"a full disk ended `up`: {consortium.lab.log(whose)}"
            )
            assert not consortium.over(study), "the study ended on a full disk"
        consortium.finish(study)
        assert consortium.verify_outcome(study, adapter=adapter) == ""


@pytest.mark.parametrize("whose", ["north", "srv"])
def test_up_goes_on_where_nothing_can_be_written_and_writes_again(tmp_path: Path, whose: str) -> None:
    with running(tmp_path, enrolled=("north",), patients=2) as lab:
        if whose == "north":
            lab.start_site("north")
            status = tmp_path / "north" / "run" / "up.json"
        else:
            lab.start_server("--proxy", "none")
            status = tmp_path / "srv" / "status.json"
        lab.wait(status.exists, "the first status")
        up = lab.processes[whose]
        unlimited = resource.RLIM_INFINITY
        resource.prlimit(up.pid, resource.RLIMIT_FSIZE, (0, unlimited))  # every write fails from here on
        [token] = [path.read_text() for path in (tmp_path / whose).glob("*/supervisor.token")]
        os.kill(marked_processes(token)[0], signal.SIGKILL)
        before = status.read_bytes()
        time.sleep(8)
        assert up.poll() is None, "`up` ended because it could not write its status"
        assert status.read_bytes() == before
        resource.prlimit(up.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        lab.wait(lambda: status.read_bytes() != before, "a new status")


@pytest.mark.parametrize("whose", [pytest.param("disk", marks=needs_a_disk)])
def test_the_disk_of_these_tests_is_really_full(tmp_path: Path, whose: str) -> None:
    with small_disk(tmp_path / whose, megabytes=1):
        with full(tmp_path / whose), pytest.raises(OSError, match="No space left"):
            (tmp_path / whose / "one-more").write_bytes(b"x")
        (tmp_path / whose / "one-more").write_bytes(b"x")
