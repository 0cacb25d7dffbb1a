"""A running server follows the model store: `serve` and `model use` as processes of their own, under load."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.access import AccessLog, Action
from client.releases import Current, ModelStore
from client.serving.source import ReleaseSource
from client.serving.switching import ReleaseSwitch
from tests.client.serving.hosting import hosted, png
from tests.client.serving.models import talkative_base
from tests.client.serving.release_store import PublishedSite

PICTURES = 3


@dataclass
class Serving:
    """A `fedrad-site serve` process and what its clients got."""

    home: Path
    pid: int
    url: str
    token: str
    answers: list[tuple[int, str, str, int, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def health(self) -> dict[str, Any]:
        value: dict[str, Any] = httpx.get(f"{self.url}health", timeout=60).json()
        return value

    def workers(self) -> int:
        """Count the server's engine processes."""
        return len(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())

    def until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for the health until it is so; the load goes on meanwhile."""
        for _ in range(3000):
            if what(value := self.health()):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"not seen: {value}")

    def fedrad_site(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the site in a process of its own."""
        command = [sys.executable, "-m", "client.cli", *arguments, "--home", str(self.home), "--json"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def use(self, version: int, pin: str = "") -> httpx.Response:
        url = f"{self.url}v1/admin/use/{version}"
        return httpx.post(url, params={"pin": pin}, headers=self.headers, timeout=600)

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Have three clients ask in a row for as long as the block runs."""
        stop = threading.Event()

        def ask(client: int) -> None:
            with httpx.Client(headers=self.headers, timeout=600) as http:
                for number in range(1_000_000):
                    if stop.is_set():
                        return
                    seed = (client + number) % PICTURES
                    try:
                        got = http.post(f"{self.url}v1/report", content=png(seed))
                        if got.status_code != 200:
                            raise ValueError(f"{got.status_code}: {got.text}")
                        value = got.json()
                    except (httpx.HTTPError, ValueError) as error:
                        self.lost.append(repr(error))
                        continue
                    model = value["model"]
                    self.answers.append(
                        (
                            seed,
                            value["text"],
                            value["picture_sha256"],
                            model["version"],
                            model["adapter_sha256"],
                        )
                    )

        threads = [threading.Thread(target=ask, args=(client,)) for client in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@contextmanager
def serving(home: Path, *more: str) -> Iterator[Serving]:
    command = [
        sys.executable, "-m", "client.cli", "serve", "--home", str(home), "--no-guard", "--no-page", "--port",
        "0", "--per-minute", "1000000000", *more,
    ]  # fmt: skip
    log = home.parent / "serve.log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, env=os.environ, start_new_session=True) as process,
    ):
        try:
            found = None
            while found is None and process.poll() is None:
                time.sleep(0.1)
                found = re.search(r"drafting on (http://\S+?)(?:#token=(\S+))?\n", log.read_text())
            assert found is not None, log.read_text()
            yield Serving(home, process.pid, found[1], found[2] or "")
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
    with pytest.raises(ProcessLookupError):  # no worker outlives the server
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_a_release_chosen_by_another_process_is_taken_up_or_put_back(tmp_path: Path) -> None:
    site = PublishedSite(tmp_path, scales=(0.2, 0.2, 1e30))
    site.run("model", "use", 1)
    store = ModelStore(site.home / "models")
    with serving(site.home) as server, server.under_load():
        server.until(lambda _: len(server.answers) >= 6)
        assert json.loads(server.fedrad_site("model", "use", "2").stdout)["version"] == 2
        server.until(lambda health: health["model"]["version"] == 2)
        enough = len(server.answers) + 12
        server.until(lambda _: len(server.answers) >= enough)

        assert server.fedrad_site("model", "use", "3").returncode == 0
        held = server.until(lambda health: bool(health["held_back"]))
        assert "version 3: CanaryFailed" in held["held_back"] and held["model"]["version"] == 2
        assert store.current() == Current(2, 1)  # a restart does not run the bad one
        assert store.decisions()[-1] | {"time_s": 0} == {
            "by": "local:canary", "frm": 3, "time_s": 0, "to": 2, "why": "failed: CanaryFailed",
        }  # fmt: skip

        refused = server.fedrad_site("model", "rollback")
        assert refused.returncode == 1 and "RollbackNotPermitted" in refused.stderr
        assert server.fedrad_site("model", "rollback", "--pin", "worse here").returncode == 0
        back = server.until(lambda health: health["model"]["version"] == 1)
        assert back["held_back"] == ""

        forward = server.use(2)
        assert (forward.status_code, forward.json()["version"]) == (200, 2)
        assert store.current() == Current(2, 1)
        bad = server.use(3)
        assert (bad.status_code, bad.json()["error"]["code"]) == (409, "CanaryFailed")
        assert server.use(1).json()["error"]["code"] == "RollbackNotPermitted"
        assert server.use(9).json()["error"]["code"] == "VersionUnknown"
        assert store.current() == Current(2, 1) and server.health()["model"]["version"] == 2
        enough = len(server.answers) + 6
        server.until(lambda _: len(server.answers) >= enough)

    assert server.lost == []
    adapters: dict[int, set[str]] = {}
    texts: dict[tuple[int, str], set[str]] = {}
    for _, text, picture, version, adapter in server.answers:
        adapters.setdefault(version, set()).add(adapter)
        texts.setdefault((version, picture), set()).add(text)
    assert sorted(adapters) == [1, 2] and all(len(found) == 1 for found in adapters.values())
    assert len(texts) == 2 * PICTURES and all(len(found) == 1 for found in texts.values())
    assert any(texts[1, picture] != texts[2, picture] for version, picture in texts if version == 1)
    records = list(AccessLog(site.home / "access").records())
    assert sum(record.action is Action.DRAFT for record in records) >= len(server.answers)
    switched = [record.model_version for record in records if record.action is Action.SWITCH_MODEL]
    assert switched == [2, 1, 2]


@pytest.mark.slow
def test_the_last_of_two_decisions_stands(tmp_path: Path) -> None:
    site = PublishedSite(tmp_path, scales=(0.2, 0.2, 0.2))
    site.run("model", "use", 1)
    with serving(site.home) as server:
        site.run("model", "use", 3)
        server.until(lambda _: server.workers() == 2)  # version 3 is being tried
        site.run("model", "use", 2, "--pin", "no, that one")
        server.until(lambda health: health["model"]["version"] == 2)
        assert ModelStore(site.home / "models").current() == Current(2, 3)
        assert "version 3 to be in use still" in (tmp_path / "serve.log").read_text()
    with serving(site.home) as server:
        assert server.health()["model"]["version"] == 2


@pytest.mark.slow
def test_a_switch_that_cannot_be_recorded_is_taken_back_and_following_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One server in this process: a full access log, then a model store damaged beyond a named error."""
    site = PublishedSite(tmp_path, scales=(0.2, 0.2))
    site.run("model", "use", 1)
    store = ModelStore(site.home / "models")
    source = ReleaseSource(store.folder(1), talkative_base(), version=1)
    with hosted(tmp_path / "server", source=source) as host:
        switch = ReleaseSwitch(host.service, store, source)
        host.run(switch.look())
        log = host.folder / "access" / "access.jsonl"
        log.mkdir()  # nothing can be appended
        with pytest.raises(IsADirectoryError):
            host.run(switch.use(2, "", "alice"), 600)
        assert host.service.model.version == 1 and store.current() == Current(1, 0)
        assert host.service.switch_failure == "version 2: IsADirectoryError: Is a directory"
        assert [line["why"] for line in store.decisions()][-1] == "failed: IsADirectoryError"
        log.rmdir()

        (store.directory / "current.json").write_bytes(b"[" * 100_000)

        async def mend_then_leave(_: float) -> None:
            if host.service.model.version == 2:
                raise asyncio.CancelledError
            (store.directory / "current.json").write_text('{"version": 2, "previous": 1}')

        following = ReleaseSwitch(host.service, store, source, sleep=mend_then_leave)

        async def follow() -> None:
            with pytest.raises(asyncio.CancelledError):
                await following.follow()

        with caplog.at_level(logging.WARNING, "fedrad.serving"):
            host.run(follow(), 600)
        assert [line for line in caplog.messages if "follow" in line] == [
            "cannot follow the model store: RecursionError; it is tried again",
            "the model store is followed again",
        ]
        assert host.service.model.version == 2

        lock = log.with_name("lock")
        lock.unlink()
        lock.mkdir()  # nothing can be recorded
        site.run("model", "rollback", "--pin", "worse here")
        waits: list[float] = []

        async def make_room_then_leave(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == 2:
                lock.rmdir()
            if len(waits) == 3:
                raise asyncio.CancelledError

        following = ReleaseSwitch(host.service, store, source, sleep=make_room_then_leave)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fedrad.serving"):
            host.run(follow(), 600)
        assert caplog.messages == [
            "cannot follow the model store: IsADirectoryError; it is tried again",
            "the model store is followed again",
        ]
        assert waits == [4, 8, 2] and host.service.model.version == 1
    switched = [record.model_version for record in AccessLog(log.parent).records()]
    assert switched == [2, 1]


def test_a_store_that_cannot_be_read_is_looked_at_less_and_less_often_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, waits = ModelStore(tmp_path / "models"), []
    store.directory.mkdir()
    current = store.directory / "current.json"
    current.write_bytes(b"torn")
    with hosted(tmp_path / "server") as host:

        async def sleep(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == 10:
                current.unlink()
            if len(waits) == 12:
                raise asyncio.CancelledError

        source = ReleaseSource(tmp_path, talkative_base(), version=host.service.model.version)

        async def follow() -> None:
            with pytest.raises(asyncio.CancelledError):
                await ReleaseSwitch(host.service, store, source, sleep=sleep).follow()

        with caplog.at_level(logging.WARNING, "fedrad.serving"):
            host.run(follow())
    assert waits == [4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 2, 2]
    assert caplog.messages == [
        "cannot follow the model store: VersionUnknown; it is tried again",
        "the model store is followed again",
    ]
