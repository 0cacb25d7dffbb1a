"""The firewall rules for `up --relay-user`, loaded as they are into a namespace of this machine."""

from __future__ import annotations

import subprocess

import pytest

from tests.deploy.packaging.commands import DEPLOY
from tests.deploy.packaging.networks import attempt, greeter, inside, join, may_filter, network

SITE_USER, RELAY_USER = 10001, 10002
HERE, THERE = "198.18.7.1", "198.18.7.2"


@pytest.mark.skipif(not may_filter(), reason="needs root, iproute2, nftables")
def test_the_rules_leave_the_relays_user_loopback_and_nothing_else() -> None:
    rules = (DEPLOY / "nftables" / "fedrad-relay.nft").read_text()
    assert rules.count('"fedrad-relay"') == 1
    rules = rules.replace('"fedrad-relay"', str(RELAY_USER))  # this machine has no such account
    with network() as machine, network() as outside:
        join(machine, outside, addresses=(HERE, THERE))
        with greeter(outside, THERE) as far, greeter(machine, "127.0.0.1") as near:
            assert attempt(machine, THERE, far, user=RELAY_USER) == "hello"
            for _ in range(2):  # loaded again, they are the same
                subprocess.run(inside(machine, "nft", "-f", "-"), input=rules, text=True, check=True)
                assert attempt(machine, THERE, far, user=RELAY_USER) == "ECONNREFUSED"
                assert attempt(machine, THERE, far, user=SITE_USER) == "hello"
                assert attempt(machine, "127.0.0.1", near, user=RELAY_USER) == "hello"
