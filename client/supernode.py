"""Flower's SuperNode, which goes on after a cut connection: `python -m client.supernode` takes its arguments.

Flower 1.41 repeats each request until it gets through, but takes every TLS error for a wrong certificate: a
connection that ends in the middle of TLS (a proxy restarted, a firewall's time-out) makes it throw the reply
away, and one that ends in the handshake makes it leave its loop while its process lives on and does nothing
(docs/protocol/secagg.md, Transfer). Here only a certificate that does not verify ends the trying.

Parts of a message that have arrived are not sent again, unless nothing arrived for 180 s: then the SuperLink
forgets the message, and the server asks again (`server/cohort.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import httpx

from common.errors import RelayInvalid


def patient(give_up: Callable[[Exception], bool]) -> Callable[[Exception], bool]:
    """Wrap Flower's decision whether to give up: a cut connection is no reason, a certificate is."""

    def decide(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower():
            return False
        return give_up(error)

    return decide


def main() -> None:
    """Run `flower-supernode` with the arguments of this process."""
    from flwr.supercore.retry import RetryInvoker
    from flwr.supernode import cli, fleet_http_connection

    make = fleet_http_connection.make_simple_http_retry_invoker

    def make_patient() -> RetryInvoker:
        invoker = make()
        if invoker.should_giveup is None:
            raise RelayInvalid("expected Flower's rule when to give up a request, got none")
        invoker.should_giveup = patient(invoker.should_giveup)
        return invoker

    fleet_http_connection.make_simple_http_retry_invoker = make_patient
    cli.flower_supernode()


if __name__ == "__main__":
    main()
