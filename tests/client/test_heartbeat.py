"""Signs of life: how long they count, whose process they name, and what ends them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.heartbeat import STALE_S, beat_until, heard, whoami


def written(path: Path, **change: object) -> Path:
    path.write_text(json.dumps({**whoami(), **change}))
    return path


def gone() -> int:
    """Return the number of a process that is no more."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    return process.pid


def test_a_fresh_sign_of_a_living_process_is_heard_and_an_old_one_is_not(tmp_path: Path) -> None:
    path = written(tmp_path / "agent.json")
    assert (heard(path, now=time.time()) or {})["pid"] == os.getpid()
    assert heard(path, now=time.time() + STALE_S + 1) is None


def test_a_process_that_is_gone_is_not_heard_where_its_number_means_something(tmp_path: Path) -> None:
    dead = gone()
    assert heard(written(tmp_path / "mine.json", pid=dead), now=time.time()) is None
    container = written(tmp_path / "container.json", pid=dead, pid_namespace="pid:[1]")
    assert heard(container, now=time.time()) is not None
    assert heard(container, now=time.time() + STALE_S + 1) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{"])
def test_what_is_no_sign_is_not_heard(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "agent.json").write_bytes(content)
    assert heard(tmp_path / "agent.json", now=time.time()) is None
    assert heard(tmp_path / "none.json", now=time.time()) is None


def test_signs_are_given_until_the_end_and_none_is_left(tmp_path: Path) -> None:
    path, stop = tmp_path / "run" / "agent.json", threading.Event()
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(beat_until, stop, path=path, keys=[], tick_s=0.01, beat_s=0.05)
        until(path.exists)
        first = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > first)
        stop.set()
        assert ends.result(timeout=30) is False
    assert not path.exists()


@pytest.mark.parametrize("changed", [0, 1])
def test_a_changed_key_ends_it_and_a_missing_one_does_not(tmp_path: Path, changed: int) -> None:
    keys = [tmp_path / "message.key", tmp_path / "witness.key"]
    for key in keys:
        key.write_bytes(b"old")
    path, stop = tmp_path / "agent.json", threading.Event()
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(beat_until, stop, path=path, keys=keys, tick_s=0.01, beat_s=0.05)
        until(path.exists)
        keys[changed].unlink()
        beaten = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > beaten)
        assert not ends.done()
        keys[changed].write_bytes(b"new")
        assert ends.result(timeout=30) is True
    assert not path.exists()


def test_where_nothing_can_be_written_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(beat_until, stop, path=tmp_path / "run" / "a", keys=[], tick_s=0.01, beat_s=0.01)
        stop.set()
        assert ends.result(timeout=30) is False


def until(ready: object) -> None:
    end = time.monotonic() + 90
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)
