"""What a site may ask over the endpoint, and what it is refused."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.config import format_study, parse_study
from common.ec_keys import make_csr
from common.enrolment import (
    Ask,
    SiteRequest,
    fingerprint_of,
    format_site_request,
    parse_bundle,
    sign_site_request,
    verify_bundle,
)
from common.errors import (
    ApprovalOutdated,
    ClockSkewed,
    EnrolmentInvalid,
    ListenAddressInvalid,
    ManifestInvalid,
    SignatureInvalid,
    SiteNotEnrolled,
    SiteRevoked,
    StudyNotReady,
    StudyUnknown,
)
from common.identity import Purpose
from common.ledger.entries import RevocationReason
from common.model.tiny import tiny_base_directory
from deploy.proxy.render import ADDRESS_BURST, API_BURST, CLIENT_HEADER
from deploy.server.endpoint import PATH, SiteEndpoint, answer_request
from deploy.server.up import verify_free
from server.consortium import ServerHome, create_server_home
from server.enrolment import approve, revoke
from server.studies import study_template
from server.submission import (
    Submitted,
    broken_studies,
    find_submitted,
    submit_study,
    submitted_studies,
    verify_ready,
)
from tests.common.test_enrolment import Keys

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Scene:
    """A consortium with three sites, two of which share a study."""

    def __init__(self, directory: Path) -> None:
        self.home: ServerHome = create_server_home(
            directory / "srv", consortium="lab", address="localhost:8443", now=NOW
        )
        self.authority = self.home.authority()
        self.keys = {site: Keys() for site in ("north", "south", "west")}
        for site, keys in self.keys.items():
            request = keys.request(site)
            approve(self.home, self.authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
        self.submitted = self.submit("chest", ("north", "south"))

    def submit(self, name: str, sites: tuple[str, ...]) -> Submitted:
        text = study_template(id=name, base="tiny", sites=sites, mode="plain", rounds=2, patients=40)
        return submit_study(self.home, text, source="test", base=tiny_base_directory())

    def ask(
        self, site: str, ask: Ask, argument: str = "", *, at: datetime = NOW, signer: str = ""
    ) -> dict[str, Any]:
        request = SiteRequest(
            site=site, ask=ask, argument=argument, time_s=int(at.timestamp()), nonce="ab" * 16
        )
        signed = sign_site_request(request, self.keys[signer or site].message)
        return answer_request(self.home, self.authority, format_site_request(signed), now=NOW)

    def approval(self, site: str) -> str:
        manifest = format_study(self.submitted.study)
        return self.keys[site].message.sign(Purpose.APPROVAL, manifest).hex()

    def decide(self, site: str, decision: str, *, decided_s: int, at: datetime = NOW) -> None:
        """Send a decision as a site's link does."""
        words = self.approval(site) if decision == "approve" else "-"
        self.ask(site, Ask.APPROVAL, f"{self.submitted.study.sha256} {words} {decided_s}", at=at)

    def held(self, site: str) -> bool:
        [offer] = self.ask(site, Ask.STUDIES)["studies"]
        return bool(offer["approved"])

    def missing(self) -> dict[str, str]:
        return find_submitted(self.home, "chest").missing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture()
def scene(made: Scene) -> Scene:
    shutil.rmtree(made.submitted.directory / "approvals", ignore_errors=True)
    return made


def test_a_site_renews_its_certificate(scene: Scene) -> None:
    answer = scene.ask("north", Ask.RENEW, make_csr("north", scene.keys["north"].tls))
    signed = parse_bundle(answer["bundle"].encode())
    verify_bundle(signed, operator_key=scene.home.message_key().public)
    assert signed.bundle.site == "north"


def test_a_site_gets_the_studies_that_name_it_and_no_other(scene: Scene) -> None:
    [offer] = scene.ask("north", Ask.STUDIES)["studies"]
    assert parse_study(offer["manifest"].encode()) == scene.submitted.study
    assert scene.ask("west", Ask.STUDIES)["studies"] == []


def test_a_study_is_ready_when_every_site_has_approved(scene: Scene) -> None:
    assert scene.missing() == {"north": "has not approved", "south": "has not approved"}
    answer = scene.ask("north", Ask.APPROVAL, f"{scene.submitted.study.sha256} {scene.approval('north')}")
    assert answer == {"approved": True, "missing": {"south": "has not approved"}}
    with pytest.raises(StudyNotReady, match="south has not approved"):
        verify_ready(find_submitted(scene.home, "chest"))
    scene.ask("south", Ask.APPROVAL, f"{scene.submitted.study.sha256} {scene.approval('south')}")
    verify_ready(find_submitted(scene.home, "chest"))
    scene.ask("south", Ask.APPROVAL, f"{scene.submitted.study.sha256} -")
    assert scene.missing() == {"south": "withdrew its approval"}


def test_a_site_is_told_whether_its_approval_is_held(scene: Scene) -> None:
    assert not scene.held("north")
    scene.decide("north", "approve", decided_s=100)
    assert scene.held("north") and not scene.held("south")
    path = scene.submitted.directory / "approvals" / "north.sig"
    path.write_text("00" * 64)  # damaged: it does not count, so it is not held
    assert not scene.held("north")
    scene.decide("north", "approve", decided_s=100)
    scene.decide("north", "withdraw", decided_s=101)
    assert not scene.held("north")


def test_an_approval_from_before_the_withdrawal_is_refused(scene: Scene) -> None:
    scene.decide("north", "approve", decided_s=100)
    scene.decide("north", "withdraw", decided_s=200)
    for decided_s in (0, 100, 200):
        with pytest.raises(ApprovalOutdated, match="approve it again"):
            scene.decide("north", "approve", decided_s=decided_s)
    assert scene.missing()["north"] == "withdrew its approval"
    scene.decide("north", "approve", decided_s=201)
    assert "north" not in scene.missing()


def test_a_withdrawal_is_taken_whatever_is_held(scene: Scene) -> None:
    scene.decide("north", "approve", decided_s=300)
    scene.decide("north", "withdraw", decided_s=200)  # a replayed one: the approval after it is sent again
    assert not scene.held("north")
    scene.decide("north", "approve", decided_s=300)
    assert scene.held("north")
    for decided_s in (400, 100):  # and one that comes again later takes nothing back
        scene.decide("north", "withdraw", decided_s=decided_s)
    with pytest.raises(ApprovalOutdated):
        scene.decide("north", "approve", decided_s=400)


def test_a_replayed_approval_does_not_undo_a_withdrawal(scene: Scene) -> None:
    """Also in the form of a release that sent no time: the request's own counts."""
    study = scene.submitted.study.sha256
    approval, withdrawal = f"{study} {scene.approval('north')}", f"{study} -"
    scene.ask("north", Ask.APPROVAL, approval, at=NOW - timedelta(minutes=20))
    scene.ask("north", Ask.APPROVAL, withdrawal, at=NOW - timedelta(minutes=10))
    with pytest.raises(ApprovalOutdated):
        scene.ask("north", Ask.APPROVAL, approval, at=NOW - timedelta(minutes=20))
    assert scene.missing()["north"] == "withdrew its approval"
    scene.ask("north", Ask.APPROVAL, approval)
    assert "north" not in scene.missing()


def test_a_decision_out_of_the_future_counts_as_of_an_hour_from_its_request(scene: Scene) -> None:
    scene.decide("north", "withdraw", decided_s=10**11)
    with pytest.raises(ApprovalOutdated):
        scene.ask("north", Ask.APPROVAL, f"{scene.submitted.study.sha256} {scene.approval('north')}")
    scene.decide("north", "approve", decided_s=10**11, at=NOW + timedelta(minutes=1))
    assert scene.held("north")


def test_an_approval_of_an_earlier_release_still_counts(scene: Scene) -> None:
    folder = scene.submitted.directory / "approvals"
    folder.mkdir()
    (folder / "north.sig").write_text(scene.approval("north"))
    assert scene.held("north") and "north" not in scene.missing()
    scene.decide("north", "withdraw", decided_s=100)
    assert scene.missing()["north"] == "withdrew its approval"


def test_an_approval_counts_only_with_the_sites_own_signature(scene: Scene) -> None:
    study = scene.submitted.study.sha256
    with pytest.raises(SignatureInvalid):
        scene.ask("north", Ask.APPROVAL, f"{study} {scene.approval('south')}")
    with pytest.raises(ManifestInvalid, match="one of its sites"):
        scene.ask("west", Ask.APPROVAL, f"{study} {scene.approval('west')}")
    with pytest.raises(StudyUnknown):
        scene.ask("north", Ask.APPROVAL, f"{'0' * 64} {scene.approval('north')}")
    for argument in ("", study, f"{study} xyz", f"{study} - -", f"{study} - 1 2", f"{study} - 1{'0' * 12}"):
        with pytest.raises((EnrolmentInvalid, SignatureInvalid)):
            scene.ask("north", Ask.APPROVAL, argument)
    assert scene.missing() == {"north": "has not approved", "south": "has not approved"}


def test_a_request_signed_by_another_site_is_refused(scene: Scene) -> None:
    with pytest.raises(SignatureInvalid):
        scene.ask("south", Ask.STUDIES, signer="north")


def test_a_clock_off_by_minutes_is_served_and_by_hours_is_named(scene: Scene) -> None:
    for minutes in (-55, -5, 5, 55):
        scene.ask("north", Ask.STUDIES, at=NOW + timedelta(minutes=minutes))
    with pytest.raises(ClockSkewed, match="ahead"):
        scene.ask("north", Ask.STUDIES, at=NOW + timedelta(hours=2))
    with pytest.raises(ClockSkewed, match="behind"):
        scene.ask("north", Ask.STUDIES, at=NOW - timedelta(hours=2))


def test_a_study_over_a_site_that_is_not_enrolled_is_refused(scene: Scene) -> None:
    with pytest.raises(SiteNotEnrolled, match="nowhere"):
        scene.submit("other", ("north", "nowhere"))


def test_a_study_of_another_operator_never_counts_as_submitted(scene: Scene, tmp_path: Path) -> None:
    foreign = Scene(tmp_path)
    source = foreign.submitted.directory
    target = scene.home.studies / "foreign"
    target.mkdir()
    for name in ("study.json", "operator.sig"):
        (target / name).write_bytes((source / name).read_bytes())
    assert [one.study.study.id for one in submitted_studies(scene.home)] == ["chest"]
    assert "this operator" in broken_studies(scene.home)["foreign"]


def test_over_http_a_refusal_has_a_name_and_the_servers_time(scene: Scene) -> None:
    endpoint = SiteEndpoint(scene.home, scene.authority, port=0, clock=lambda: NOW)
    endpoint.start()
    try:

        def post(path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
            connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=10)
            connection.request("POST", path, body, headers or {})
            answer = connection.getresponse()
            value = json.loads(answer.read())
            connection.close()
            return answer.status, value

        request = SiteRequest(
            site="north", ask=Ask.STUDIES, argument="", time_s=int(NOW.timestamp()), nonce="ab" * 16
        )
        signed = format_site_request(sign_site_request(request, scene.keys["north"].message))
        status, value = post(PATH, signed)
        assert status == 200 and len(value["studies"]) == 1 and value["time_s"] == NOW.timestamp()
        status, value = post(PATH, signed.replace(b"north", b"south"))
        assert (status, value["error"]) == (403, "SignatureInvalid")
        assert post(PATH, b"nonsense")[1]["error"] == "EnrolmentInvalid"
        assert post("/else", signed)[0] == 404
        assert post(PATH, b"x" * 70_000)[0] == 413
    finally:
        endpoint.stop()


def post_all(endpoint: SiteEndpoint, *bodies: bytes, client: str) -> list[int]:
    """Post each body as a door that names this client does; return the statuses."""
    statuses = []
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=10)
    for body in bodies:
        connection.request("POST", PATH, body, {CLIENT_HEADER: client})
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    return statuses


def test_many_sites_behind_one_address_do_not_use_up_each_others_rate(scene: Scene) -> None:
    """As behind a load balancer; a site's own rate counts only what it has signed, from wherever it asks."""
    endpoint = SiteEndpoint(scene.home, scene.authority, port=0, clock=lambda: NOW, pace_clock=lambda: 0.0)
    endpoint.start()
    try:

        def signed(site: str, signer: str) -> bytes:
            request = SiteRequest(
                site=site, ask=Ask.STUDIES, argument="", time_s=int(NOW.timestamp()), nonce="ab" * 16
            )
            return format_site_request(sign_site_request(request, scene.keys[signer].message))

        forged = post_all(endpoint, *[signed("south", "north")] * (API_BURST + 5), client="203.0.113.1")
        assert set(forged) == {403}
        north = [signed("north", "north")] * (API_BURST + 5)
        assert set(post_all(endpoint, *north, client="203.0.113.1")[-5:]) == {429}
        assert post_all(endpoint, north[0], client="203.0.113.2") == [429]
        for site in ("south", "west"):
            assert post_all(endpoint, signed(site, site), client="203.0.113.1") == [200]
        flood = [b"nonsense"] * ADDRESS_BURST
        assert 429 in post_all(endpoint, *flood, client="203.0.113.1")
        assert post_all(endpoint, signed("west", "west"), client="203.0.113.2") == [200]
    finally:
        endpoint.stop()


def test_a_revoked_site_is_told_so_and_holds_up_its_studies(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for site in ("north", "south"):
        scene.ask(site, Ask.APPROVAL, f"{scene.submitted.study.sha256} {scene.approval(site)}")
    verify_ready(find_submitted(scene.home, "chest"))
    revoke(scene.home, scene.authority, "south", reason=RevocationReason.LEFT, now=NOW)
    with pytest.raises(SiteRevoked, match="left"):
        scene.ask("south", Ask.STUDIES)
    assert scene.missing() == {"south": "revoked"}
    scene.keys["south"] = Keys()
    request = scene.keys["south"].request("south")
    approve(scene.home, scene.authority, request, fingerprint=fingerprint_of(request.keys), now=NOW)
    assert "new keys" in scene.missing()["south"]


def test_a_port_that_is_taken_is_refused_by_name(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenAddressInvalid, match="--api-port"):
            SiteEndpoint(scene.home, scene.authority, port=port, clock=lambda: NOW)
        with pytest.raises(ListenAddressInvalid, match="in use"):
            verify_free(f"127.0.0.1:{port}", within_s=0.0)
    verify_free(f"127.0.0.1:{port}", within_s=0.0)


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1", ":8443", "192.0.2.1:8443"])
def test_an_address_that_this_machine_cannot_listen_on_is_refused(listen: str) -> None:
    with pytest.raises(ListenAddressInvalid):
        verify_free(listen, within_s=0.0)
