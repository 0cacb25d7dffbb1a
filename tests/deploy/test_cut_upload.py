"""Uploads that are cut: a connection that breaks, a ClientApp that is killed; real Flower processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.supernode import patient
from common.canonical import sha256_hex
from common.relay import PART_BYTES
from deploy.local import flower
from deploy.local.flower import flower_engine
from tests.deploy.cut_study import REPLY_BYTES, SITE, reply_body
from tests.deploy.cutting_proxy import CuttingProxy

CUT_FAB = Path(__file__).parent / "cut_fab"


@pytest.mark.parametrize(
    ("error", "gives_up"),
    [
        (httpx.ReadError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"), False),
        (httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out"), False),
        (httpx.ConnectError("[Errno 111] Connection refused"), False),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), True),
        (ValueError("something else"), True),
    ],
)
def test_only_a_wrong_certificate_ends_the_trying(error: Exception, gives_up: bool) -> None:
    assert patient(lambda error: True)(error) is gives_up


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CuttingProxy]]:
    """Put a proxy between SuperNode and SuperLink."""
    made: list[CuttingProxy] = []
    start = flower._Start.supernode

    def behind(self: Any, *arguments: Any) -> None:
        made.append(CuttingProxy(self.address))
        direct, self.address = self.address, made[0].address
        try:
            start(self, *arguments)
        finally:
            self.address = direct

    monkeypatch.setattr(flower._Start, "supernode", behind)
    yield made
    for one in made:
        one.close()


def run(directory: Path, on_log: Callable[[str], None]) -> dict[str, Any]:
    calls = directory / "calls"
    calls.mkdir(exist_ok=True)
    with flower_engine(directory / "engine", sites={SITE: f"unix://{calls}"}) as engine:
        engine.run({"study-dir": str(directory)}, fab=CUT_FAB, on_log=on_log)
    outcome: dict[str, Any] = json.loads((directory / "outcome.json").read_text())
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("reset", [True, False], ids=["rst", "fin"])
def test_an_upload_cut_in_the_middle_goes_on_where_it_was(
    tmp_path: Path, proxy: list[CuttingProxy], reset: bool
) -> None:
    def on_log(line: str) -> None:
        if line.startswith("asking"):
            proxy[0].cut(after=REPLY_BYTES // 2, reset=reset, away_s=3.0)

    outcome = run(tmp_path, on_log)
    assert outcome["got"] == [sha256_hex(reply_body())] and outcome["missing"] == {}
    assert outcome["messages"]["contribute-up"] == 1  # a busy machine may be asked twice
    assert proxy[0].cuts == 1
    assert proxy[0].up - REPLY_BYTES < 2 * PART_BYTES + (1 << 20), "more than two parts went up twice"


@pytest.mark.slow
def test_a_client_app_killed_before_it_answered_is_asked_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    (calls / "wait").touch()

    def kill() -> None:
        end = time.monotonic() + 60
        while not (calls / "call-0").exists():
            if time.monotonic() > end:
                return
            time.sleep(0.2)
        time.sleep(0.5)
        os.kill(int((calls / "call-0").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(tmp_path, lambda line: None)
    killer.join()
    assert outcome["got"] == [sha256_hex(reply_body())] and outcome["missing"] == {}
    assert outcome["messages"] == {"contribute-down": 2, "contribute-up": 1}
    assert len(list(calls.glob("call-*"))) == 2
