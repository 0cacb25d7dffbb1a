"""A site behind a proxy that cuts, after a reboot, with a wrong clock: real processes, real nginx."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.guardian import marked_processes
from deploy.site.status import read_status, words
from tests.deploy.lab import RealConsortium, running
from tests.deploy.site.test_gateway import connect_proxy

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@pytest.fixture()
def consortium(tmp_path: Path) -> Iterator[RealConsortium]:
    with running(tmp_path, enrolled=("north", "south")) as made:
        made.start_server()
        yield made


def cohorts(consortium: RealConsortium) -> list[list[str]]:
    return [event["cohort"] for event in consortium.events("chest") if event["event"] == "round"]


def test_a_site_behind_a_proxy_survives_cuts_and_serves_again(consortium: RealConsortium) -> None:
    with connect_proxy() as proxy:
        consortium.start_site("north", "--proxy", f"http://127.0.0.1:{proxy.port}")
        consortium.start_site("south")
        consortium.submit("chest", ("north", "south"), rounds=12)
        for site in ("north", "south"):
            consortium.approve(site)
        consortium.wait(lambda: len(cohorts(consortium)) >= 2, "two rounds", timeout_s=400)
        proxy.down = True
        proxy.cut()
        consortium.wait(
            lambda: "proxy" in read_status(consortium.home("north"), now=time.time())["error"],
            "the site to say what is wrong",
        )
        assert consortium.study_state("chest") == "running"
        proxy.down = False
        consortium.wait(lambda: consortium.study_state("chest") == "finished", "the end", timeout_s=600)
        assert len(cohorts(consortium)) == 12
        assert cohorts(consortium)[0] == cohorts(consortium)[-1] == ["north", "south"]
        assert {line.split(" ")[1] for line in proxy.asked} == {f"localhost:{consortium.port}"}
        assert read_status(consortium.home("north"), now=time.time())["error"] == ""


def test_a_site_that_was_switched_off_comes_back(consortium: RealConsortium) -> None:
    for site in ("north", "south"):
        consortium.start_site(site)
    consortium.submit("chest", ("north", "south"), rounds=20)
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: len(cohorts(consortium)) >= 2, "two rounds", timeout_s=400)
    token = (consortium.directory / "north" / "run" / "supervisor.token").read_text()
    consortium.kill("north")
    end = time.monotonic() + 15
    while marked_processes(token) and time.monotonic() < end:
        time.sleep(0.1)
    assert not marked_processes(token)
    consortium.start_site("north")
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the end", timeout_s=900)
    assert len(cohorts(consortium)) == 20
    assert cohorts(consortium)[-1] == ["north", "south"]


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs faketime (make system)")
def test_clocks_four_minutes_off_serve_and_say_so(consortium: RealConsortium) -> None:
    for site, offset in (("north", "+4m"), ("south", "-4m")):
        consortium.start_site(
            site, LD_PRELOAD=str(FAKETIME), FAKETIME=offset, FAKETIME_DONT_FAKE_MONOTONIC="1"
        )
    consortium.submit("chest", ("north", "south"), rounds=2, deadline_s=600)
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the end", timeout_s=600)
    assert cohorts(consortium) == [["north", "south"]] * 2
    for site, offset_s, direction in (("north", 240, "ahead of"), ("south", -240, "behind")):
        status = read_status(consortium.home(site), now=time.time())
        assert abs(status["clock_ahead_s"] - offset_s) < 10
        assert direction in words(status, now=time.time())
