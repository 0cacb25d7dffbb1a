"""When the proxy must read its files again: for a site that comes or goes, not for one that renews."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.enrolment import load_ec_key, tls_key_path
from common.ec_keys import make_csr
from deploy.local.certificates import write_loopback_tls
from deploy.proxy.files import read_by
from deploy.server.up import Proxy
from server.consortium import create_server_home
from server.enrolment import renew
from tests.deploy.lab import RealConsortium, running
from tests.deploy.proxy.door import Backend, Lab, door_of


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A consortium with north and south, and a door that nobody holds."""
    now = datetime.now(UTC)
    home = create_server_home(tmp_path / "srv", consortium="lab", address="localhost:8443", now=now)
    internal = write_loopback_tls(tmp_path / "internal", now=now)
    door = door_of(home, 8443, internal, superlink_port=9400, api_port=9401)
    made = Lab(home, door, Proxy.NGINX, Backend())
    for site in ("north", "south"):
        made.enter(site)
    made.write()
    return made


@pytest.mark.parametrize("caddy", [False, True])
def test_a_renewed_certificate_changes_nothing_that_the_proxy_reads(lab: Lab, caddy: bool) -> None:
    before = read_by(lab.door, caddy=caddy)
    lab.renew("north")
    lab.write()
    assert read_by(lab.door, caddy=caddy) == before


@pytest.mark.parametrize("caddy", [False, True])
def test_a_site_that_comes_or_goes_does_and_so_does_the_servers_own_certificate(
    lab: Lab, caddy: bool
) -> None:
    seen = [read_by(lab.door, caddy=caddy)]

    def changed() -> bool:
        lab.write()
        seen.append(read_by(lab.door, caddy=caddy))
        return seen[-1] not in seen[:-1]

    lab.enter("west")
    assert changed()
    lab.revoke("south")
    assert changed()
    lab.home.certificate.write_bytes(lab.home.certificate.read_bytes() + b"\n")
    assert changed()


def workers(consortium: RealConsortium) -> set[int]:
    master = int((consortium.directory / "srv" / "proxy" / "nginx.pid").read_text())
    return {int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
def test_one_sites_renewal_ends_no_connection_of_another(tmp_path: Path) -> None:
    """`up` with nginx: a reload would give it other workers, and the old ones end within 10 s."""
    with running(tmp_path, enrolled=("north", "south")) as consortium:
        consortium.start_server()
        consortium.wait(lambda: consortium.status()["ready"], "the SuperLink")
        before = workers(consortium)
        assert len(before) == 2

        def known() -> int:
            return int(consortium.status()["sites"]["north"]["certificate_until_s"])

        was = known()
        server = consortium.server
        csr = make_csr("north", load_ec_key(tls_key_path(consortium.home("north"))))
        renew(server, server.authority(), "north", csr, now=datetime.now(UTC) + timedelta(minutes=1))
        consortium.wait(lambda: known() > was, "the renewal in force")
        assert workers(consortium) == before
        consortium.revoke("south")
        consortium.wait(lambda: not workers(consortium) & before, "the revocation in force")
