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

# The clocks that a site's programs ask: Flower's, the link's, the agent's. libfaketime breaks sleeping,
# cryptography refuses a false datetime class, and gRPC reckons its time-outs with time.time.
WRONG_CLOCK = """
import datetime, sys, time
_time, _offset = time.time, datetime.timedelta(seconds={offset_s})
import client.enrolment, flwr.supercore.date
_flower, _site = flwr.supercore.date.now, client.enrolment.utc_now
flwr.supercore.date.now = lambda: _flower() + _offset
client.enrolment.utc_now = lambda: _site() + _offset
if "client.cli" in sys.orig_argv:
    time.time = lambda: _time() + {offset_s}
    import client.agent  # its clock is bound here
    time.time = _time
"""
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


def test_clocks_four_minutes_off_serve_and_say_so(consortium: RealConsortium) -> None:
    """Both ways: Flower alone refuses a node whose clock is more than five seconds ahead."""
    for site, offset_s in (("north", 240), ("south", -240)):
        folder = consortium.directory / f"clock-{site}"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(WRONG_CLOCK.replace("{offset_s}", str(offset_s)))
        consortium.start_site(site, PYTHONPATH=str(folder))
    consortium.submit("chest", ("north", "south"), rounds=2, deadline_s=600)
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the end", timeout_s=600)
    assert cohorts(consortium) == [["north", "south"]] * 2
    for site, offset_s, direction in (("north", 240, "ahead of"), ("south", -240, "behind")):
        status = read_status(consortium.home(site), now=time.time())
        assert abs(status["clock_ahead_s"] - offset_s) < 10
        assert direction in words(status, now=time.time())
