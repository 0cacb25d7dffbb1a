"""A site behind a proxy that cuts, after a reboot, asleep, with a wrong clock: real processes, real nginx."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.metrics import SiteCollector
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
ASLEEP_S = 100
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


def test_a_site_that_sleeps_is_missed_alone_and_back_in_a_later_round(tmp_path: Path) -> None:
    """All of south's processes stand still for 100 s, as when its machine sleeps, and go on."""
    sites = ("north", "south", "west")
    with running(tmp_path, enrolled=sites) as consortium:
        consortium.start_server()
        for site in sites:
            consortium.start_site(site)
        consortium.submit("chest", sites, rounds=60)
        for site in sites:
            consortium.approve(site)
        consortium.wait(lambda: len(cohorts(consortium)) >= 2, "two rounds", timeout_s=400)
        assert cohorts(consortium)[0] == list(sites)
        with asleep(consortium, "south"):
            at = len(cohorts(consortium))
            time.sleep(ASLEEP_S)
            meanwhile = cohorts(consortium)[at:]
            status = read_status(consortium.home("south"), now=time.time())
            assert "not running" in words(status, now=time.time()) and not status["agent"]
        at = len(cohorts(consortium))
        assert ["north", "west"] in meanwhile and {"north", "west"} <= set(meanwhile[-1])
        consortium.wait(lambda: list(sites) in cohorts(consortium)[at:], "south in a round", timeout_s=300)
        consortium.wait(
            lambda: words(read_status(consortium.home("south"), now=time.time()), now=time.time()).startswith(
                f"Site south is connected to localhost:{consortium.port}."
            ),
            "south to say that it is well",
        )
        assert carried(consortium, "south") > 0


@contextlib.contextmanager
def asleep(consortium: RealConsortium, site: str) -> Iterator[None]:
    """Hold every process of a site still."""
    token = (consortium.directory / site / "run" / "supervisor.token").read_text()
    held = [consortium.processes[site].pid, *marked_processes(token)]
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def carried(consortium: RealConsortium, site: str) -> float:
    """Return the least of the site's own figures of bytes and seconds."""
    families = {family.name: family for family in SiteCollector(consortium.directory / site).collect()}
    wanted = ("fedrad_site_bytes", "fedrad_site_stage_seconds", "fedrad_site_stage_answers")
    return min(sum(sample.value for sample in families[name].samples) for name in wanted)


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
