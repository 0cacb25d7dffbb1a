"""The door as real nginx and real Caddy hold it: who gets in, where to, and who does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.proxy.render import BODY_MB, FLEET_CALLS
from deploy.server.up import Proxy
from tests.deploy.proxy.door import PULL, SITE_API, Lab, running_lab

REFUSED = {0, 400, 403}  # by TLS, by the certificate check, by the rule


def available(proxy: Proxy) -> bool:
    return shutil.which(proxy.value, path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin") is not None


@pytest.fixture(scope="module", params=list(Proxy)[:2], ids=str)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not available(request.param):
        pytest.skip(f"{request.param.value} is not installed (make system)")
    with running_lab(tmp_path_factory.mktemp("door"), request.param) as lab:
        yield lab


@pytest.mark.parametrize("call", FLEET_CALLS)
def test_a_site_reaches_every_call_of_its_supernode(lab: Lab, call: str) -> None:
    assert lab.ask(f"/v1/fleet/{call}", certificate="north", node="north") == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "//v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/flwr.proto.Runtime/AcquireTask",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
    ],
)
def test_no_other_path_gets_through_even_with_a_sites_certificate(lab: Lab, path: str) -> None:
    before = list(lab.backend.seen)
    assert lab.ask(path, certificate="north", node="north") in {400, 403, 404}
    assert lab.ask(path, certificate="north", node="north", method="GET") in {400, 403, 404, 405}
    assert lab.backend.seen == before


def test_without_a_certificate_nobody_gets_through(lab: Lab) -> None:
    before = list(lab.backend.seen)
    assert lab.ask(PULL, certificate=None, node="north") in REFUSED
    assert lab.backend.seen == before


def test_a_sites_certificate_does_not_carry_another_sites_node_key(lab: Lab) -> None:
    before = list(lab.backend.seen)
    assert lab.ask(PULL, certificate="north", node="south") in REFUSED
    assert lab.ask(PULL, certificate="south", node="north") in REFUSED
    assert lab.ask(PULL, certificate="north") in REFUSED
    assert lab.backend.seen == before


def test_of_two_node_keys_the_superlink_sees_at_most_the_sites_own(lab: Lab) -> None:
    """nginx passes on the one that it compared; Caddy compares both as one text, and refuses."""
    before = len(lab.backend.nodes)
    assert lab.ask(PULL, certificate="north", node="south", also="north") in REFUSED
    assert len(lab.backend.nodes) == before
    passed = lab.ask(PULL, certificate="north", node="north", also="south") == 200
    assert lab.backend.nodes[before:] == [[lab.node("north")]] * passed


def test_a_certificate_of_another_authority_is_refused(lab: Lab, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from cryptography.hazmat.primitives.serialization import Encoding

    from server.authority import create_authority

    foreign = create_authority(tmp_path / "ca", consortium="lab", now=datetime.now(UTC))
    forged = foreign.issue_site(
        "north",
        lab.sites["north"].tls.public_key(),
        now=datetime.now(UTC),
        lifetime=lab.home.policy.lifetime,
    )
    lab.sites["forged"], lab.certificates["forged"] = lab.sites["north"], forged.public_bytes(Encoding.PEM)
    before = list(lab.backend.seen)
    assert lab.ask(PULL, certificate="forged", node="north") in REFUSED
    assert lab.backend.seen == before


def test_a_signed_request_gets_to_the_endpoint_with_and_without_certificate(lab: Lab) -> None:
    assert lab.ask(SITE_API, certificate="north") == 200
    assert lab.ask(SITE_API, certificate=None) == 200
    assert lab.ask(SITE_API, certificate=None, method="GET") in {404, 405}


def test_the_endpoint_learns_the_true_address_whatever_a_client_claims(lab: Lab) -> None:
    assert lab.ask(SITE_API, certificate=None, claims="203.0.113.9") == 200
    assert lab.backend.clients[-1] == "127.0.0.1"


def test_a_body_over_the_limit_is_refused(lab: Lab) -> None:
    before = list(lab.backend.seen)
    chunk, too_long = b"x" * (5 << 20), b"x" * ((BODY_MB << 20) + 1)
    assert lab.ask(PULL, certificate="north", node="north", body=chunk) == 200
    assert lab.ask(PULL, certificate="north", node="north", body=too_long) in {
        0,
        413,
        502,
    }
    assert lab.ask(SITE_API, certificate=None, body=b"x" * (65 << 10)) in {0, 413, 502}
    assert lab.backend.seen == [*before, PULL] or lab.proxy is Proxy.CADDY


def test_the_proxys_own_logs_may_be_cut_while_it_writes_them(lab: Lab) -> None:
    """`deploy.supervision.cap_logs` empties a file in place, which needs a writer that appends."""
    assert lab.process is not None
    flags = {}
    for link in Path(f"/proc/{lab.process.pid}/fd").iterdir():
        if link.resolve().parent == lab.door.logs and link.resolve().name != "proxy.log":
            info = Path(f"/proc/{lab.process.pid}/fdinfo/{link.name}").read_text()
            flags[link.resolve().name] = int(info.split("flags:")[1].split()[0], 8)
    named = {"nginx-access.log", "nginx-error.log"} if lab.proxy is Proxy.NGINX else {"caddy.log"}
    assert set(flags) == named
    assert all(flag & os.O_APPEND for flag in flags.values())


def test_a_site_may_not_ask_without_end(tmp_path: Path) -> None:
    if not available(Proxy.NGINX):
        pytest.skip("nginx is not installed (make system)")
    limits = {
        "fleet_per_s": 1,
        "fleet_burst": 3,
        "api_burst": 3,
        "address_per_minute": 1,
        "api_per_minute": 1,
        "address_burst": 20,
    }
    with running_lab(tmp_path, Proxy.NGINX, **limits) as lab:
        answers = [lab.ask(PULL, certificate="north", node="north") for _ in range(8)]
        assert 4 <= answers.count(200) < 8 and set(answers) == {200, 429}
        assert lab.ask(PULL, certificate="south", node="south") == 200  # one site's flood is its own
        assert 429 in [lab.ask(SITE_API, certificate="north") for _ in range(8)]
        assert lab.ask(SITE_API, certificate="south") == 200  # though from the same address
        assert lab.ask(SITE_API, certificate=None) == 200
        assert 429 in [lab.ask(SITE_API, certificate=None) for _ in range(24)]  # the address's own, at last


def test_revoked_expired_and_rotated_certificates_are_refused(lab: Lab) -> None:
    """Last in the module: it changes the registry."""
    lab.enter("west")
    lab.enter("old", days_ago=8)
    lab.restart()
    assert lab.ask(PULL, certificate="west", node="west") == 200
    before = list(lab.backend.seen)
    assert lab.ask(PULL, certificate="old", node="old") in REFUSED
    assert lab.backend.seen == before
    lab.renew("old")
    assert lab.ask(PULL, certificate="old", node="old") == 200
    lab.revoke("west")
    lab.restart()
    before = list(lab.backend.seen)
    assert lab.ask(PULL, certificate="west", node="west") in REFUSED
    assert lab.ask(SITE_API, certificate="west") in {200, *REFUSED}
    assert [path for path in lab.backend.seen if path != SITE_API] == [
        path for path in before if path != SITE_API
    ]
    assert lab.ask(PULL, certificate="south", node="south") == 200
