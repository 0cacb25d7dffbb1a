"""New keys at a site that runs: the link fetches the operator's answer, and nothing is started by hand.

What is not in order when the answer comes (a key that is a credential, a full disk, a kill) keeps the site
from its new keys until it is, and from nothing else.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from client.enrolment import (
    certificate_fits_key,
    load_ec_key,
    read_enrolled,
    request_rotation,
    tls_key_path,
)
from client.home import SiteHome, approve_study, list_studies
from common.ec_keys import load_csr, make_csr
from common.enrolment import fingerprint_of
from common.errors import CertificateInvalid
from common.model.tiny import tiny_base_directory
from deploy.server.endpoint import SiteEndpoint
from deploy.server.up import Proxy
from server.enrolment import read_sites, renew, rotate
from server.studies import study_template
from server.submission import find_submitted, submit_study
from tests.deploy.lab import running
from tests.deploy.proxy.door import Lab, running_lab
from tests.deploy.site.test_link import Scene
from tests.full_disk import room_for

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


def rotated(lab: Lab, home: SiteHome, *, all_four: bool = False) -> None:
    """Let the site ask for new keys and the operator answer."""
    now = datetime.now(UTC)
    request = request_rotation(home, software="fedrad 0.1.0", now=now, message_keys=all_four)
    rotate(lab.home, lab.home.authority(), request, fingerprint=fingerprint_of(request.keys), now=now)
    lab.restart()


def issued(lab: Lab) -> int:
    return len(read_sites(lab.home)["east"].certificates)


def test_a_site_left_with_its_new_key_and_the_old_certificate_renews_at_once(
    lab: Lab, tmp_path: Path
) -> None:
    """As a kill between the two left a site of before 2026-11-22 evening."""
    scene = Scene(lab, tmp_path)
    rotated(lab, scene.home, all_four=True)
    for path in (scene.home.directory / "next").iterdir():
        path.replace(scene.home.directory / "keys" / path.name)
    (scene.home.directory / "next").rmdir()
    assert not certificate_fits_key(scene.home)
    noted = scene.ask()
    assert noted["error"] == "" and noted["connected"]
    assert certificate_fits_key(scene.home)


def test_an_answer_behind_a_credential_is_not_asked_for_and_holds_up_nothing_else(
    lab: Lab, tmp_path: Path
) -> None:
    scene = Scene(lab, tmp_path)
    rotated(lab, scene.home)
    credentials, key = tmp_path / "credentials", scene.home.directory / "keys" / "tls.key"
    credentials.mkdir()
    shutil.move(key, credentials / "fedrad-tls.key")
    text = study_template(
        id="chest", base="tiny", sites=("east", "north"), mode="plain", rounds=2, patients=40
    )
    submit_study(lab.home, text, source="test", base=tiny_base_directory())
    before = issued(lab)
    home = scene.home
    scene.home = replace(home, credentials=credentials)
    link = scene.link()
    for _ in range(3):
        link._ask()
        assert "KeyFileInvalid" in link._status["error"] and "tls.key" in link._status["error"]
        assert link._status["connected"]
        for sha256 in list_studies(home):
            approve_study(home, sha256)
    assert "east" not in find_submitted(lab.home, "chest").missing
    assert issued(lab) == before
    shutil.move(credentials / "fedrad-tls.key", key)
    link._ask()
    assert link._status["error"] == "" and certificate_fits_key(home)
    assert issued(lab) == before + 1


def test_on_a_full_disk_no_certificate_is_asked_for(lab: Lab, tmp_path: Path) -> None:
    scene = Scene(lab, tmp_path)
    rotated(lab, scene.home)
    before, empty = issued(lab), tmp_path / "empty"
    empty.touch()
    link = scene.link()
    with room_for(empty, 32 << 10):  # the server in this process writes less
        for _ in range(3):
            link._ask()
            assert "this machine: " in link._status["error"]
    assert issued(lab) == before
    link._ask()
    assert link._status["error"] == "" and issued(lab) == before + 1


@pytest.mark.parametrize("rotation", [True, False])
def test_a_certificate_that_cannot_be_written_is_not_asked_for_again(
    lab: Lab, tmp_path: Path, rotation: bool
) -> None:
    scene = Scene(lab, tmp_path)
    folder = scene.home.directory / ("next" if rotation else "tls")
    if rotation:
        rotated(lab, scene.home)
    else:
        public = load_csr(make_csr("east", load_ec_key(tls_key_path(scene.home))), site="east")
        five_days_ago = datetime.now(UTC) - timedelta(days=5)
        old = lab.home.authority().issue_site("east", public, now=five_days_ago, lifetime=timedelta(days=7))
        (folder / "certificate.pem").write_bytes(old.public_bytes(Encoding.PEM))
    before, link = issued(lab), scene.link()
    in_the_way = folder / f".certificate.pem.{os.getpid()}.partial"
    in_the_way.mkdir()
    for _ in range(3):
        link._ask()
        assert "this machine: " in link._status["error"] and link._status["connected"]
        assert issued(lab) == before + 1
    in_the_way.rmdir()
    link._ask()
    assert link._status["error"] == "" and certificate_fits_key(scene.home)
    assert issued(lab) == before + 1
    assert read_enrolled(scene.home).not_after > datetime.now(UTC) + timedelta(days=6)


def test_a_refusal_of_the_new_keys_certificate_is_said(lab: Lab, tmp_path: Path) -> None:
    scene = Scene(lab, tmp_path)
    rotated(lab, scene.home)
    now, coming = datetime.now(UTC), scene.home.directory / "next" / "tls.key"
    with pytest.raises(CertificateInvalid):
        while True:
            renew(lab.home, lab.home.authority(), "east", make_csr("east", load_ec_key(coming)), now=now)
    noted = scene.ask()
    assert "CertificateInvalid" in str(noted["error"]) and "renew in a loop" in str(noted["error"])


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
