"""The door's configuration, for nginx and for Caddy: from paths, ports and the registry to text.

Guarantees: a path that is not one of the ten fleet calls or FedRad's own is not named; a value that could end
a directive is refused. It starts nothing and reads nothing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from common.errors import ConsortiumInvalid

# What a registered SuperNode calls (flwr.supernode.fleet_http_client, 1.41); it may not register itself.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
BODY_MB = 8  # Flower cuts objects at 5 MiB
FLEET_PER_S, FLEET_BURST = 100, 400  # a site's calls of Flower; a 20 MB reply is a dozen
API_PER_MINUTE, API_BURST = 60, 30  # a site's requests for renewal and studies
ADDRESS_PER_MINUTE, ADDRESS_BURST = 1200, 300  # an address's: behind a load balancer that of all sites
CLIENT_HEADER = "X-FedRad-Client"  # the door names the address that asks, whatever the client said
_SAFE = re.compile(r"[A-Za-z0-9_./:+=|\[\] -]+")


@dataclass(frozen=True, kw_only=True)
class Door:
    """What a proxy needs to know; `listen` is HOST:PORT."""

    listen: str
    state: Path
    logs: Path
    certificate: Path
    key: Path
    authority: Path
    crl: Path
    internal_authority: Path
    superlink_port: int
    api_port: int
    fleet_per_s: int = FLEET_PER_S
    fleet_burst: int = FLEET_BURST
    api_per_minute: int = API_PER_MINUTE
    api_burst: int = API_BURST
    address_per_minute: int = ADDRESS_PER_MINUTE
    address_burst: int = ADDRESS_BURST
    connections: int = 32


@dataclass(frozen=True)
class KnownNode:
    """A site that takes part and the node key, in PEM, that its certificate may be used with."""

    site: str
    node_key: str

    @property
    def header(self) -> str:
        """What Flower's SuperNode sends as `flwr-public-key`."""
        return base64.b64encode(self.node_key.encode()).decode()


def nginx_configuration(door: Door) -> str:
    """Write nginx.conf, which includes `sites.map` from the state folder."""
    return _fill(_template("nginx.conf.template"), {**_values(door), "fleet_calls": "|".join(FLEET_CALLS)})


def nginx_sites(nodes: Iterable[KnownNode]) -> str:
    """Write `sites.map`: verified certificate, site and node key of every site that takes part."""
    return "".join(f'"SUCCESS CN={_safe(n.site)} {_safe(n.header)}" 1;\n' for n in nodes)


def caddy_configuration(door: Door, nodes: Iterable[KnownNode], revoked: Iterable[int]) -> str:
    """Write the Caddyfile; sites and revoked serial numbers are part of it."""
    host, _, port = door.listen.rpartition(":")
    return _fill(
        _template("Caddyfile.template"),
        {
            **_values(door),
            "listen_host": host.strip("[]"),
            "listen_port": port,
            "sites": "\n".join(f'\t\t"CN={_safe(n.site)} {_safe(n.header)}" 1' for n in nodes),
            "revoked": "\n".join(f"\t\t{serial:d} 1" for serial in revoked),
            "fleet_paths": " ".join(f"/v1/fleet/{call}" for call in FLEET_CALLS),
        },
        multiline=("sites", "revoked"),
    )


def _values(door: Door) -> dict[str, str]:
    return {**{name: str(value) for name, value in vars(door).items()}, "body_mb": str(BODY_MB)}


def _template(name: str) -> str:
    return files("deploy.proxy").joinpath(name).read_text()


def _fill(template: str, values: Mapping[str, str], *, multiline: tuple[str, ...] = ()) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        return values[name] if name in multiline else _safe(values[name])

    return re.sub(r"\{\{([a-z_]+)\}\}", value, template)


def _safe(value: str) -> str:
    if not _SAFE.fullmatch(value):
        raise ConsortiumInvalid(f"expected a value without quotes, braces or semicolons, got {value!r}")
    return value
