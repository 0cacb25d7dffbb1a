"""The door's configuration as text: what is named, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConsortiumInvalid
from deploy.proxy.render import (
    FLEET_CALLS,
    Door,
    KnownNode,
    caddy_configuration,
    nginx_configuration,
    nginx_sites,
)


def door(**changes: object) -> Door:
    values: dict[str, object] = {
        "listen": "127.0.0.1:8443",
        "superlink_port": 9400,
        "api_port": 9401,
        **{
            name: Path("/srv") / name
            for name in ("state", "logs", "certificate", "key", "authority", "crl", "internal_authority")
        },
    }
    return Door(**{**values, **changes})  # type: ignore[arg-type]


def test_flowers_node_calls_are_named_and_registering_oneself_is_not() -> None:
    text = nginx_configuration(door())
    assert all(call in text for call in FLEET_CALLS)
    assert "register-node" not in text and "v1/control" not in text and "v1/runtime" not in text
    assert "{{" not in text and "{{" not in caddy_configuration(door(), [], [])


def test_flower_has_the_calls_that_the_door_lets_in() -> None:
    from flwr.superlink.routers.fleet.router import router

    known = {route.path.removeprefix("/v1/fleet/") for route in router.routes}
    assert known - set(FLEET_CALLS) == {"register-node", "unregister-node"}
    assert set(FLEET_CALLS) <= known


@pytest.mark.parametrize("value", ['/srv/"a', "/srv/a;b", "/srv/{a}", "/srv/a\nb", "/srv/$uri"])
def test_a_path_that_could_end_a_directive_is_refused(value: str) -> None:
    with pytest.raises(ConsortiumInvalid, match="without quotes"):
        nginx_configuration(door(certificate=Path(value)))
    with pytest.raises(ConsortiumInvalid, match="without quotes"):
        caddy_configuration(door(certificate=Path(value)), [], [])


def test_a_site_is_let_in_with_its_own_node_key_only() -> None:
    lines = nginx_sites([KnownNode("north", "AAA"), KnownNode("south", "BBB")]).splitlines()
    assert lines == ['"SUCCESS CN=north QUFB" 1;', '"SUCCESS CN=south QkJC" 1;']
    caddy = caddy_configuration(door(), [KnownNode("north", "AAA")], [255])
    assert '"CN=north QUFB" 1' in caddy and "\t\t255 1\n" in caddy
