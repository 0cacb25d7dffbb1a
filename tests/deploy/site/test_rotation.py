"""New keys at a site that runs: the link fetches the operator's answer, and nothing is started by hand."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.enrolment import request_rotation
from common.enrolment import fingerprint_of
from deploy.server.endpoint import SiteEndpoint
from deploy.server.up import Proxy
from server.enrolment import read_sites, rotate
from tests.deploy.lab import running
from tests.deploy.proxy.door import Lab, running_lab
from tests.deploy.site.test_link import Scene

pytestmark = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"
)


@pytest.fixture()
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A server's endpoint behind its proxy; the endpoint does not mind how often it is asked."""
    with running_lab(tmp_path / "lab", Proxy.NGINX) as made:
        endpoint = SiteEndpoint(
            made.home, made.home.authority(), port=0, clock=lambda: datetime.now(UTC),
            pace_clock=lambda: 1000 * time.monotonic(),
        )  # fmt: skip
        endpoint.start()
        made.door = replace(made.door, api_port=endpoint.port)
        made.restart()
        try:
            yield made
        finally:
            endpoint.stop()


@pytest.mark.parametrize("all_four", [False, True])
def test_the_link_takes_up_a_rotation_once_the_operator_has_answered(
    lab: Lab, tmp_path: Path, all_four: bool
) -> None:
    scene = Scene(lab, tmp_path)
    home, server = scene.home, lab.home
    before = {path.name: path.read_bytes() for path in (home.directory / "keys").iterdir()}
    now = datetime.now(UTC)
    request = request_rotation(home, software="fedrad 0.1.0", now=now, message_keys=all_four)
    for _ in range(2):
        assert scene.ask()["error"] == ""  # nobody has answered: the old keys serve
    assert {path.name: path.read_bytes() for path in (home.directory / "keys").iterdir()} == before
    rotate(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=now)
    lab.restart()
    noted = scene.ask()
    assert noted["error"] == "" and noted["connected"]
    after = {path.name: path.read_bytes() for path in (home.directory / "keys").iterdir()}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == ({"tls.key", "node.key"} | ({"message.key", "witness.key"} if all_four else set()))
    assert home.message_key().public == read_sites(server)[home.site].message_key
    assert not (home.directory / "next").exists()
    assert scene.ask()["error"] == ""


@pytest.mark.slow
def test_a_running_site_serves_a_study_of_its_new_keys(tmp_path: Path) -> None:
    """All four keys change while `up` runs on both sides; nobody installs or starts anything."""
    with running(tmp_path, enrolled=("north",)) as consortium:
        consortium.start_server()
        consortium.start_site("north")
        consortium.wait(lambda: consortium.online("north"), "north")
        now, home, server = datetime.now(UTC), consortium.home("north"), consortium.server
        before = home.message_key().public
        request = request_rotation(home, software="fedrad 0.1.0", now=now, message_keys=True)
        rotate(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=now)
        consortium.submit("chest", ("north",), rounds=2)
        consortium.wait(lambda: home.message_key().public != before, "the new keys to be taken up")
        consortium.approve("north")
        consortium.wait(lambda: consortium.study_state("chest") == "finished", "the end", timeout_s=400)
        assert consortium.rounds("chest") == 2
