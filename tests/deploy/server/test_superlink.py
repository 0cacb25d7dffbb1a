"""What the SuperLink is given here: a rate for each site behind a door that keeps none, and little memory."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import threading
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from client.enrolment import authority_path, certificate_path, tls_key_path
from common.pace import Pace
from deploy.proxy.render import FLEET_BURST, KnownNode
from deploy.server.superlink import SQLITE_MEMORY, FleetPace, spare_memory
from server.enrolment import read_sites
from tests.deploy.lab import RealConsortium, running

PULL = "/v1/fleet/pull-messages"


def ask(paced: FleetPace, path: str, *nodes: bytes) -> int:
    """Send one request through the middleware; return the status that it or the app answered."""
    statuses: list[int] = []

    async def send(event: dict[str, Any]) -> None:
        statuses.extend([event["status"]] if event["type"] == "http.response.start" else [])

    async def receive() -> dict[str, Any]:
        raise AssertionError("nobody reads a body here")

    scope = {"type": "http", "path": path, "headers": [(b"flwr-public-key", node) for node in nodes]}
    asyncio.run(paced(scope, receive, send))
    return statuses[0]


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_a_sites_flood_is_refused_before_its_body_is_read_and_is_its_own() -> None:
    paced = FleetPace(app, Pace(burst=3, per_minute=60, clock=lambda: 0.0))
    assert [ask(paced, PULL, b"north") for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(paced, PULL, b"south") == 200
    assert ask(paced, "/v1/control/list-runs", b"north") == 200


def test_a_call_that_names_two_keys_is_refused_and_charged_to_neither() -> None:
    paced = FleetPace(app, Pace(burst=1, per_minute=60, clock=lambda: 0.0))
    assert [ask(paced, PULL, b"north", b"south") for _ in range(3)] == [400] * 3
    assert ask(paced, PULL, b"north", b"north") == 400
    assert [ask(paced, PULL, node) for node in (b"north", b"south")] == [200, 200]


def test_the_superlinks_database_keeps_little_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Flower sets is there to be replaced, and all else stays as Flower sets it."""
    flowers = dict(sql_mixin.SQLITE_PRAGMAS)
    assert set(SQLITE_MEMORY) < set(flowers)
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", spare_memory(sql_mixin.SQLITE_PRAGMAS))
    assert dict(sql_mixin.SQLITE_PRAGMAS) == flowers | SQLITE_MEMORY
    store = SqlObjectStore(str(tmp_path / "superlink.db"))
    store.initialize()
    for name, value in SQLITE_MEMORY.items():
        assert store.query(f"PRAGMA {name}") == [{name: int(value)}]
    assert store.query("PRAGMA journal_mode") == [{"journal_mode": "wal"}]
    assert store._engine is not None
    store._engine.dispose()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("caddy") is None, reason="needs caddy")
def test_behind_caddy_a_site_may_not_ask_without_end(tmp_path: Path) -> None:
    """`up --proxy caddy`: the real Caddy and the real SuperLink, flooded over four connections."""
    with running(tmp_path, enrolled=("north", "south")) as consortium:
        consortium.start_server("--proxy", "caddy")
        consortium.wait(lambda: consortium.status()["ready"], "the SuperLink")
        consortium.wait(lambda: answers(consortium, "north", 1), "Caddy")
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.extend(answers(consortium, "north", FLEET_BURST)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 * FLEET_BURST
        assert 429 in found and found.count(429) < len(found)
        assert 429 not in answers(consortium, "south", 5)


def answers(consortium: RealConsortium, site: str, count: int) -> list[int]:
    """Ask as a site's node would, without a valid signature; [] while nobody listens."""
    home = consortium.home(site)
    context = ssl.create_default_context(cafile=str(authority_path(home)))
    context.load_cert_chain(str(certificate_path(home)), str(tls_key_path(home)))
    node = KnownNode(site, read_sites(consortium.server)[site].node_key).header
    connection = HTTPSConnection("localhost", consortium.port, context=context, timeout=30)
    statuses = []
    try:
        for _ in range(count):
            connection.request("POST", PULL, b"x", {"flwr-public-key": node})
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
    except OSError:
        return []
    finally:
        connection.close()
    return statuses
