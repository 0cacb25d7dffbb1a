"""The door's files on disk, and whether a running proxy must read them again.

Guarantees: both configurations are written whole; `read_by` differs whenever something that this proxy has
read differs, and not because a site's certificate was renewed: a reload ends other sites' connections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from common.files import write_atomic
from deploy.proxy.render import Door, KnownNode, caddy_configuration, nginx_configuration, nginx_sites


def write_door(door: Door, nodes: Sequence[KnownNode], revoked: Sequence[int]) -> None:
    """Write both configurations, also where another proxy than ours reads them."""
    door.state.mkdir(parents=True, exist_ok=True)
    write_atomic(door.state / "sites.map", nginx_sites(nodes).encode())
    write_atomic(door.state / "nginx.conf", nginx_configuration(door).encode())
    write_atomic(door.state / "Caddyfile", caddy_configuration(door, nodes, revoked).encode())


def read_by(door: Door, *, caddy: bool) -> bytes:
    """Return the SHA-256 over all files that nginx, or Caddy, reads when it starts."""
    own = (
        [door.state / "Caddyfile"]
        if caddy
        else [door.state / "nginx.conf", door.state / "sites.map", door.crl]
    )
    total = hashlib.sha256()
    for path in (*own, door.certificate, door.key, door.authority, door.internal_authority):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.digest()
