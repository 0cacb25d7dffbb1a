"""The site's link against a real endpoint behind a real nginx: studies, approvals, renewal, clocks."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from client.enrolment import install_bundle, read_enrolled, request_enrolment
from client.home import SiteHome, approve_study, create_home, list_studies, refuse_study
from common.canonical import sha256_hex
from common.enrolment import Ask, fingerprint_of, parse_site_request
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


class Before:
    """What stands before the endpoint: nothing, a crowd (no approval gets through), or an earlier release.

    Releases before 2026-11-22 did not say whether they held an approval, and took two words, not three.
    """

    def __init__(self, endpoint: SiteEndpoint) -> None:
        before = self
        self.crowded = self.earlier = False
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = parse_site_request(body).request
                words = request.argument.split(" ") if request.ask is Ask.APPROVAL else []
                before.asked.append(f"{request.ask.value} {len(words)}".removesuffix(" 0"))
                if words and before.crowded:
                    return self.answer(429, {"error": "TooFrequent"})
                if before.earlier and len(words) > 2:
                    message = "approval: expected a study's hash and a signature, or a hyphen to withdraw"
                    return self.answer(403, {"error": "EnrolmentInvalid", "message": message})
                connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=20)
                connection.request("POST", self.path, body)
                got = connection.getresponse()
                value = json.loads(got.read())
                connection.close()
                if before.earlier:
                    for study in value.get("studies", []):
                        del study["approved"]
                return self.answer(got.status, value)

            def answer(self, status: int, value: dict[str, Any]) -> None:
                body = json.dumps({"time_s": datetime.now(UTC).timestamp(), **value}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Before]]:
    directory = tmp_path_factory.mktemp("link")
    with running_lab(directory, Proxy.NGINX) as lab:
        endpoint = SiteEndpoint(
            lab.home, lab.home.authority(), port=0, clock=lambda: datetime.now(UTC),
            pace_clock=lambda: 1000 * time.monotonic(),
        )  # fmt: skip
        endpoint.start()
        before = Before(endpoint)
        lab.door = type(lab.door)(**{**vars(lab.door), "api_port": before.server.server_address[1]})
        lab.restart()
        try:
            yield lab, before
        finally:
            before.server.shutdown()
            before.server.server_close()
            endpoint.stop()


@pytest.fixture(scope="module")
def lab(behind: tuple[Lab, Before]) -> Lab:
    return behind[0]


@pytest.fixture()
def before(behind: tuple[Lab, Before]) -> Iterator[Before]:
    before = behind[1]
    before.asked.clear()
    yield before
    before.crowded = before.earlier = False


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


@dataclass
class Decided:
    """A study that the site has received, and what the server holds of the site's decision."""

    scene: Scene
    sha256: str
    directory: Path

    @property
    def missing(self) -> str:
        return find_submitted(self.scene.lab.home, self.sha256).missing.get("east", "")

    @property
    def site_directory(self) -> Path:
        return self.scene.home.study_directory(self.sha256)

    def approve(self, *, later_s: float = 0.0) -> None:
        approve_study(self.scene.home, self.sha256, clock=lambda: time.time() + later_s)

    def refuse(self) -> None:
        refuse_study(self.scene.home, self.sha256, "second thoughts")


@pytest.fixture()
def study(scene: Scene, request: pytest.FixtureRequest) -> Iterator[Decided]:
    name = sha256_hex(request.node.name.encode())[:16]
    text = study_template(id=name, base="tiny", sites=("east", "north"), mode="plain", rounds=2, patients=40)
    submitted = submit_study(scene.lab.home, text, source="test", base=tiny_base_directory())
    scene.lab.restart()  # nginx counts a minute's requests anew
    scene.ask()
    yield Decided(scene, submitted.study.sha256, submitted.directory)
    shutil.rmtree(submitted.directory)
    shutil.rmtree(scene.home.study_directory(submitted.study.sha256))


def test_an_approval_that_the_server_lost_is_sent_again(study: Decided) -> None:
    study.approve()
    study.scene.ask()
    assert study.missing == ""
    shutil.rmtree(study.directory / "approvals")  # a server restored from a copy of before
    assert study.missing == "has not approved"
    study.scene.ask()
    assert study.missing == ""


def test_a_withdrawal_that_the_server_lost_is_sent_again(study: Decided, tmp_path: Path) -> None:
    study.approve()
    study.scene.ask()
    shutil.copytree(study.directory / "approvals", tmp_path / "approvals")
    study.refuse()
    study.scene.ask()
    assert study.missing == "withdrew its approval"
    shutil.rmtree(study.directory / "approvals")
    shutil.copytree(tmp_path / "approvals", study.directory / "approvals")
    assert study.missing == ""
    study.scene.ask()
    assert study.missing == "withdrew its approval"


def test_a_site_restored_from_before_its_withdrawal_does_not_come_back_by_that(
    study: Decided, tmp_path: Path
) -> None:
    study.approve()
    study.scene.ask()
    shutil.copytree(study.site_directory, tmp_path / "copy")
    study.refuse()
    study.scene.ask()
    shutil.rmtree(study.site_directory)
    shutil.copytree(tmp_path / "copy", study.site_directory, copy_function=shutil.copyfile)
    noted = study.scene.ask()
    assert "ApprovalOutdated" in str(noted["error"]) and noted["connected"]
    assert study.missing == "withdrew its approval"
    study.approve(later_s=5.0)
    assert study.scene.ask()["error"] == ""
    assert study.missing == ""


def test_an_approval_that_was_refused_for_a_moment_is_sent_again(study: Decided, before: Before) -> None:
    study.approve()
    before.crowded = True
    link = study.scene.link()
    assert link._changed()
    link._ask()
    assert "TooFrequent" in link._status["error"]
    assert not link._changed()  # not at once: after a pause
    assert study.missing == "has not approved"
    before.crowded = False
    link._ask()
    assert link._status["error"] == ""
    assert study.missing == ""
    asked = len(before.asked)
    link._ask()
    assert before.asked[asked:] == ["studies"]  # what the server holds is not sent again


def test_a_study_that_came_by_file_is_approved_once_the_server_has_it(study: Decided, tmp_path: Path) -> None:
    away = tmp_path / "study"
    shutil.move(study.directory, away)
    study.approve()
    assert study.scene.ask()["error"] == ""
    shutil.move(away, study.directory)
    assert study.missing == "has not approved"
    study.scene.ask()
    assert study.missing == ""


def test_one_refused_decision_does_not_hold_up_another(study: Decided, before: Before) -> None:
    text = study_template(
        id="another", base="tiny", sites=("east", "north"), mode="plain", rounds=2, patients=40
    )
    other = submit_study(study.scene.lab.home, text, source="test", base=tiny_base_directory())
    study.scene.ask()
    for sha256 in (study.sha256, other.study.sha256):
        approve_study(study.scene.home, sha256)
        (study.scene.home.study_directory(sha256) / "approval.sig").write_text("00" * 64)
    approve_study(study.scene.home, other.study.sha256)
    assert "SignatureInvalid" in str(study.scene.ask()["error"])
    assert "east" not in find_submitted(study.scene.lab.home, "another").missing
    assert study.missing == "has not approved"


def test_an_earlier_server_gets_each_decision_as_it_understands_it(study: Decided, before: Before) -> None:
    before.earlier = before.crowded = True
    study.approve()
    assert "TooFrequent" in str(study.scene.ask()["error"])
    before.crowded = False
    assert study.scene.ask()["error"] == ""
    assert study.missing == ""
    study.scene.ask()
    study.refuse()
    study.scene.ask()
    assert study.missing == "withdrew its approval"
    assert before.asked == [
        *("studies", "approval 2", "studies", "approval 2"),
        *("studies", "studies", "approval 2"),
    ]
    before.earlier = False  # it is upgraded
    assert study.scene.ask()["error"] == ""


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
