"""The study of the exchange benchmark: a vector of a given size, sites that compute nothing.

Everything else is FedRad's own: signed requests and replies, the server's `Cohort`, the relaying ClientApp,
the agent's socket service. The agents answer with as many random bytes as were asked, signed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from client.service import AgentService, ProgressBoard, start_service
from common.config import Study
from common.protocol import (
    MAX_OVERHEAD_BYTES,
    SERVER,
    Bytes,
    Envelope,
    Expected,
    Message,
    Stage,
    open_message,
    pack_body,
    read_header,
    seal_reply,
    seal_request,
)
from server.cohort import Cohort
from tests.common.ledger.consortium import key_of, study

SMALL_BYTES = 4_000  # about a survivor set with the shares of ten sites


@dataclass(frozen=True)
class Plan:
    """How many sites exchange how many bytes how often; `fresh` makes every site's bytes new each time."""

    sites: int
    size: int
    exchanges: int
    fresh: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"site{number}" for number in range(self.sites))

    @property
    def study(self) -> Study:
        made = study(sites=self.names, quorum=0)
        tensor = replace(made.adapter.tensors[0], shape=(self.size // 4, 1))
        return replace(made, adapter=replace(made.adapter, tensors=(tensor,)))

    def format(self) -> str:
        return f"{self.sites} {self.size} {self.exchanges} {int(self.fresh)}"

    @classmethod
    def parse(cls, text: str) -> Plan:
        sites, size, exchanges, fresh = map(int, text.split())
        return cls(sites, size, exchanges, bool(fresh))


def run_exchanges(cohort: Cohort, plan: Plan, took: Callable[[str, float], None]) -> None:
    """Do a round's two exchanges again and again: the vectors, then little; `took` gets kind and seconds."""
    study = plan.study
    cohort.present(wait_s=120.0, at_least=plan.sites)
    total = np.zeros(plan.size // 4, np.uint32)

    def accept(site: str, reply: Message) -> None:
        if len(reply.body) > plan.size:
            vector = np.frombuffer(reply.body, np.uint32, count=plan.size // 4, offset=len(reply.body) % 4)
            np.add(total, vector, out=total)

    for number in range(plan.exchanges):
        for kind, stage, size in (
            ("large", Stage.CONTRIBUTE, plan.size),
            ("small", Stage.UNMASK, SMALL_BYTES),
        ):
            vector = np.random.default_rng(number).bytes(size)
            started = time.monotonic()
            requests = {
                site: seal_request(
                    key_of("operator"), study=study.sha256, round=number, attempt=1, stage=stage,
                    sender=SERVER, recipient=site, nonce=f"{number:032x}", previous="0" * 64,
                    body=pack_body({}, site.encode(), vector),
                )
                for site in plan.names
            }  # fmt: skip
            outcome = cohort.exchange(requests, accept=accept, until_unix_s=time.time() + 900.0)
            assert not outcome.missing, outcome.missing
            took(kind, time.monotonic() - started)


@dataclass
class _Home:
    site: str


class EchoAgent:
    """The surface of a site's agent, without data, keys of its own, or work."""

    def __init__(self, plan: Plan, site: str) -> None:
        self.home = _Home(site)
        self._plan, self._study = plan, plan.study
        self._bytes = b"" if plan.fresh else np.random.default_rng(0).bytes(plan.size)

    def message_limit(self, start: bytes) -> int:
        return MAX_OVERHEAD_BYTES + read_header(start, max_body_bytes=1 << 40).body_bytes

    def handle(self, stage: Stage, data: Bytes | Envelope) -> Envelope:
        site = self.home.site
        asked = open_message(
            data, keys={SERVER: key_of("operator").public}, max_body_bytes=2 * self._plan.size + (1 << 20),
            expected=Expected(study=self._study.sha256, recipient=site, sender=SERVER, stage=stage),
        )  # fmt: skip
        size = self._plan.size if stage is Stage.CONTRIBUTE else SMALL_BYTES
        draw = np.random.default_rng([asked.header.round, int(site.removeprefix("site")), size])
        vector = draw.bytes(size) if self._plan.fresh or size == SMALL_BYTES else self._bytes
        return seal_reply(key_of(site), asked, nonce="1" * 32, body=pack_body({}, vector))


def serve_agents(plan: Plan, sockets: Path) -> list[AgentService]:
    """Serve every site's agent at `SOCKETS/SITE.sock` from this process."""
    return [
        start_service(
            cast(Any, EchoAgent(plan, site)), ProgressBoard(), sockets / f"{site}.sock", version="benchmark"
        )
        for site in plan.names
    ]


if __name__ == "__main__":
    services = serve_agents(Plan.parse(sys.argv[1]), Path(sys.argv[2]))
    while True:
        time.sleep(3600)
