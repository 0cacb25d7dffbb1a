"""Flower's SuperLink with what it has no option for: a tolerant clock, a rate per site, own messages only.

Flower takes a node's signed timestamp when it is at most 300 s old, but only 5 s ahead of the server. Here it
may be ahead by the consortium's tolerance: `python -m deploy.server.superlink SECONDS ARGUMENTS…`.
A call of the Fleet API counts for the node key that it names, which the door has compared with the site's
certificate, and gets 429 beyond the rate that nginx also keeps: Debian's Caddy keeps none. One that names two
keys gets 400: door, rate and Flower need not read the same one of them. What a node may fetch, confirm and
push is the business of `own_messages`. SQLite gets 8 MB of cache for each connection in place of 64, and maps
no file: with a connection for each thread, most of the SuperLink's memory was that.
"""

from __future__ import annotations

import sys
from typing import Any

from common.errors import TooFrequent
from common.pace import Pace
from deploy.proxy.render import FLEET_BURST, FLEET_PER_S
from deploy.server.own_messages import guard_fleet

SQLITE_MEMORY = {"cache_size": "-8000", "mmap_size": "0"}  # kibibytes where negative; bytes
_FLEET = "/v1/fleet/"
_NODE_KEY = b"flwr-public-key"


class FleetPace:
    """ASGI middleware: passes a fleet call on, or answers 400 or 429 before its body is read."""

    def __init__(self, app: Any, pace: Pace) -> None:
        self._app, self._pace = app, pace

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_FLEET):
            nodes = [value for name, value in scope["headers"] if name == _NODE_KEY]
            if len(nodes) > 1:
                await _refuse(send, 400)
                return
            try:
                self._pace.take(b"".join(nodes).decode("latin-1"))
            except TooFrequent:
                await _refuse(send, 429, (b"retry-after", b"1"))
                return
        await self._app(scope, receive, send)


async def _refuse(send: Any, status: int, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close"), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def spare_memory(pragmas: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return Flower's settings of SQLite with ours in place of those for its memory."""
    return tuple((name, SQLITE_MEMORY.get(name, value)) for name, value in pragmas)


def main() -> None:
    """Set tolerance, memory, rate and whose messages are whose, and become `flower-superlink`."""
    from flwr.supercore import sql_mixin
    from flwr.superlink import main as superlink
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.routers.fleet import node_auth
    from flwr.superlink.servicer.fleet import fleet_handlers

    node_auth.SYSTEM_TIME_TOLERANCE = float(sys.argv[1])
    sql_mixin.SQLITE_PRAGMAS = spare_memory(sql_mixin.SQLITE_PRAGMAS)
    guard_fleet(fleet_handlers)
    create_app = superlink.create_app

    def paced(*arguments: Any, **options: Any) -> Any:
        app = create_app(*arguments, **options)
        app.add_middleware(FleetPace, pace=Pace(burst=FLEET_BURST, per_minute=60.0 * FLEET_PER_S))
        return app

    superlink.create_app = paced
    sys.argv = ["flower-superlink", *sys.argv[2:]]
    flower_superlink()


if __name__ == "__main__":
    main()
