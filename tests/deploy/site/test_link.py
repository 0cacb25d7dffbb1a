"""The site's link against a real endpoint behind a real nginx: studies, approvals, renewal, clocks."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.enrolment import install_bundle, read_enrolled, request_enrolment
from client.home import SiteHome, approve_study, create_home, list_studies, refuse_study
from common.enrolment import (
    fingerprint_of,
)
from common.errors import SiteRevoked
from common.ledger.entries import RevocationReason
from common.model.tiny import tiny_base_directory
from deploy.server.endpoint import SiteEndpoint
from deploy.server.up import Proxy
from deploy.site.link import SiteLink
from deploy.site.status import read_status, words
from server.enrolment import approve, revoke
from server.studies import study_template
from server.submission import find_submitted, submit_study
from tests.deploy.proxy.door import Lab, running_lab

pytestmark = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"
)


class Scene:
    """A door, an endpoint behind it, one site, and what time the site believes it is."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.offset = lab, timedelta(0)
        self.home: SiteHome = create_home(
            directory / "east", site="east", operator_key=lab.home.message_key().public,
            data=directory, bases={"tiny": tiny_base_directory()},
        )  # fmt: skip
        now = datetime.now(UTC)
        request = request_enrolment(self.home, software="fedrad 0.1.0", now=now)
        authority = lab.home.authority()
        fingerprint = fingerprint_of(request.keys)
        install_bundle(self.home, approve(lab.home, authority, request, fingerprint=fingerprint, now=now))

    def clock(self) -> datetime:
        return datetime.now(UTC) + self.offset

    def link(self) -> SiteLink:
        return SiteLink(self.home, port=0, proxy=lambda host: "", clock=self.clock)

    def ask(self) -> dict[str, object]:
        """Let the link do its work once, and say what it noted."""
        link = self.link()
        link._ask()
        return dict(link._status)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("link")
    with running_lab(directory, Proxy.NGINX) as lab:
        endpoint = SiteEndpoint(lab.home, lab.home.authority(), port=0, clock=lambda: datetime.now(UTC))
        endpoint.start()
        lab.door = type(lab.door)(**{**vars(lab.door), "api_port": endpoint.port})
        lab.restart()
        try:
            yield lab
        finally:
            endpoint.stop()


@pytest.fixture(scope="module")
def scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(lab, tmp_path_factory.mktemp("east"))


def test_a_study_comes_and_a_decision_goes_until_the_server_has_it(scene: Scene) -> None:
    text = study_template(
        id="eastern", base="tiny", sites=("east", "north"), mode="plain", rounds=2, patients=40
    )
    submitted = submit_study(scene.lab.home, text, source="test", base=tiny_base_directory())
    assert scene.ask()["connected"]
    assert list_studies(scene.home) == [submitted.study.sha256]
    assert "east" in find_submitted(scene.lab.home, "eastern").missing
    approve_study(scene.home, submitted.study.sha256)
    scene.ask()
    assert "east" not in find_submitted(scene.lab.home, "eastern").missing
    refuse_study(scene.home, submitted.study.sha256, "second thoughts")
    scene.ask()
    assert "east" in find_submitted(scene.lab.home, "eastern").missing


def test_a_certificate_is_renewed_at_two_thirds_and_after_its_end(scene: Scene) -> None:
    first = read_enrolled(scene.home)
    scene.ask()
    assert read_enrolled(scene.home) == first
    path = scene.home.directory / "tls" / "certificate.pem"
    now = datetime.now(UTC)
    from cryptography.hazmat.primitives.serialization import Encoding

    from client.enrolment import load_ec_key, tls_key_path
    from common.ec_keys import load_csr, make_csr

    public = load_csr(make_csr("east", load_ec_key(tls_key_path(scene.home))), site="east")
    for age in (timedelta(days=5), timedelta(days=9)):
        old = scene.lab.home.authority().issue_site("east", public, now=now - age, lifetime=timedelta(days=7))
        path.write_bytes(old.public_bytes(Encoding.PEM))
        noted = scene.ask()
        assert noted["error"] == "", noted
        assert read_enrolled(scene.home).not_after > now + timedelta(days=6)


@pytest.mark.parametrize("minutes", [-50, -4, 4, 50])
def test_a_wrong_clock_is_served_and_said(scene: Scene, minutes: int) -> None:
    scene.offset = timedelta(minutes=minutes)
    try:
        link = scene.link()
        link._ask()
        assert link._status["connected"], link._status
        assert abs(float(link._status["clock_ahead_s"]) - 60 * minutes) < 5
        link._write_status()
        (scene.home.directory / "run").mkdir(exist_ok=True)
        up = {"site": "east", "programs": {}, "socket": "", "pid": 1}
        (scene.home.directory / "run" / "up.json").write_text(json.dumps(up))
        now = datetime.now(UTC).timestamp()
        said = words(read_status(scene.home, now=now), now=now)
        assert f"ClockSkewed: this machine's clock is {60 * abs(minutes)}" in said.replace("239", "240"), said
        assert ("ahead of" if minutes > 0 else "behind") in said
    finally:
        scene.offset = timedelta(0)


def test_a_clock_off_by_hours_is_refused_by_name(scene: Scene) -> None:
    scene.offset = timedelta(hours=3)
    try:
        assert "ClockSkewed" in str(scene.ask()["error"])
    finally:
        scene.offset = timedelta(0)


def test_a_server_that_is_away_is_named_and_found_again(scene: Scene) -> None:
    scene.lab.stop()
    try:
        noted = scene.ask()
        assert not noted["connected"] and "refused" in str(noted["error"])
    finally:
        scene.lab.restart()
    assert scene.ask()["connected"]


def test_the_link_runs_and_stops(scene: Scene) -> None:
    stop = threading.Event()
    link = scene.link()
    thread = threading.Thread(target=link.run, args=(stop,))
    thread.start()
    path = scene.home.directory / "run" / "link.json"
    path.unlink(missing_ok=True)
    for _ in range(200):
        if path.is_file() and json.loads(path.read_text())["connected"]:
            break
        threading.Event().wait(0.1)
    stop.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert json.loads(path.read_text())["connected"]


def test_a_revoked_site_learns_it_by_name(scene: Scene) -> None:
    """Last in the module: it ends the site."""
    revoke(
        scene.lab.home,
        scene.lab.home.authority(),
        "east",
        reason=RevocationReason.LEFT,
        now=datetime.now(UTC),
    )
    scene.lab.restart()
    assert str(scene.ask()["error"]).startswith(SiteRevoked.__name__)
