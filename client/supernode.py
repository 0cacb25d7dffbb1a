"""Flower's SuperNode, which goes on after a cut connection: `python -m client.supernode` takes its arguments.

Flower 1.41 repeats each request until it gets through, but takes every TLS error for a wrong certificate: a
connection that ends in the middle of TLS (a proxy restarted, a firewall's time-out) makes it throw the reply
away, and one that ends in the handshake makes it leave its loop while its process lives on and does nothing
(docs/protocol/secagg.md, Transfer). Here only a certificate that does not verify ends the trying. It also
waits for ever for the rest of a reply whose ClientApp was killed while handing it over; here such a reply is
given up after `STALLED_S` without a new part.

Parts of a message that have arrived are not sent again, unless nothing arrived for 180 s: then the SuperLink
forgets the message, and the server asks again (`server/cohort.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx

from common.errors import RelayInvalid

if TYPE_CHECKING:
    from flwr.supercore.object_store import ObjectStore

STALLED_S = 20.0


def patient(give_up: Callable[[Exception], bool]) -> Callable[[Exception], bool]:
    """Wrap Flower's decision whether to give up: a cut connection is no reason, a certificate is."""

    def decide(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower():
            return False
        return give_up(error)

    return decide


class StalledStore:
    """Flower's object store, in which a part that does not come for `STALLED_S` is an error, not a wait."""

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._awaited = ""
        self._since = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, object_id: str) -> bytes | None:
        """Return a part, b"" while it is awaited; raises RelayInvalid when it was for too long."""
        content: bytes | None = self._store.get(object_id)
        if content != b"":
            return content
        if self._awaited != object_id:
            self._awaited, self._since = object_id, self._clock()
        elif self._clock() - self._since > STALLED_S:
            raise RelayInvalid(f"expected the rest of a ClientApp's reply within {STALLED_S:.0f} s, got none")
        return content


def main() -> None:
    """Run `flower-supernode` with the arguments of this process."""
    from flwr.supercore.retry import RetryInvoker
    from flwr.supernode import cli, fleet_http_connection, start_client_internal

    make = fleet_http_connection.make_simple_http_retry_invoker

    def make_patient() -> RetryInvoker:
        invoker = make()
        if invoker.should_giveup is None:
            raise RelayInvalid("expected Flower's rule when to give up a request, got none")
        invoker.should_giveup = patient(invoker.should_giveup)
        return invoker

    push = start_client_internal._push_messages

    def push_what_is_whole(state: Any, object_store: ObjectStore, **to: Any) -> None:
        push(state, StalledStore(object_store), **to)  # type: ignore[arg-type]

    fleet_http_connection.make_simple_http_retry_invoker = make_patient
    start_client_internal._push_messages = push_what_is_whole
    cli.flower_supernode()


if __name__ == "__main__":
    main()
