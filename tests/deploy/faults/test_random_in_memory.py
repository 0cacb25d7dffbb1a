"""Random faults by the hundred between the messages of a study: both sides' state, without processes.

The server dies before a request leaves or after a site has served it; an agent dies before it serves or
after, its reply lost or on its way; with every death logs may have a torn last line. The real server loop and
agents over tests/simulator.py: what processes add (SuperLink, SuperNode, sockets) is in test_random.py.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from common.errors import RoundFailed
from common.ledger.audit import verify_bundle
from common.ledger.entries import RoundRecord, parse_entry
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of
from common.model.lora import vector_sha256
from common.protocol import Header
from server.bundles import export_run
from server.checkpoint import read_records
from tests.deploy.faults.test_torn import Killed, tear
from tests.simulator import SITES, Consortium, NodeDown, build

ROUNDS = 3
SETTINGS = {"mode": "consortium", "rounds": ROUNDS, "min_sites": 4, "max_attempts": 60, "spare_rounds": 40}
SMOKE = 12
CAMPAIGN = int(os.environ.get("FEDRAD_FAULTS", "300"))


class Chance:
    """Deals faults at random messages, until `left` is zero."""

    def __init__(self, world: Consortium, draw: random.Random, left: int) -> None:
        self.world, self.draw, self.left = world, draw, left
        self.dealt: Counter[str] = Counter()

    def _strikes(self, kind: str) -> bool:
        if self.left == 0 or self.draw.random() > 0.06:
            return False
        self.left -= 1
        self.dealt[kind] += 1
        return True

    def before(self, site: str, header: Header, request: bytes) -> bytes:
        if self._strikes("server before"):
            raise Killed
        if self._strikes("agent before"):
            raise NodeDown
        return request

    def after(self, site: str, header: Header, reply: bytes) -> bytes | None:
        if self._strikes("server after"):
            raise Killed
        if self._strikes("agent after"):
            self.world.crash(site)
        if self._strikes("reply lost"):
            return None
        return reply


def run_disturbed(directory: Path, draw: random.Random, left: int, *, adapter: str) -> Chance:
    """Run one study to its end through faults; check what must hold."""
    world = build(directory, **SETTINGS)  # type: ignore[arg-type]
    chance = Chance(world, draw, left)
    world.before, world.after = chance.before, chance.after
    while True:
        try:
            after = world.run()
            break
        except RoundFailed as error:  # too few sites ready: `fedrad-server up` tries that again
            assert "sites ready" in str(error)
        except Killed:
            for site in SITES:
                if draw.random() < 0.5:
                    world.crash(site)
            if draw.random() < 0.5:
                for site in SITES:
                    world.crash(site)
                tear(world.out)
    world.close()
    assert vector_sha256(after.adapter) == adapter
    verify_books(world)
    return chance


def verify_books(world: Consortium) -> None:
    """One record per round; every logged contribution charged, once; the audit finds nothing."""
    assert [signed.record.round for signed in read_records(world.server)] == list(range(ROUNDS))
    served: Counter[tuple[str, int, int]] = Counter()
    for line in (world.server / "ledger" / "entries.jsonl").read_bytes().splitlines():
        body = parse_entry(line).body
        if isinstance(body, RoundRecord):
            served.update((part.site, body.number, body.attempt) for part in body.participations)
    assert set(served.values()) == {1}
    for site in SITES:
        lines = (world.out / "sites" / site / "budget.jsonl").read_bytes().splitlines()
        entries = [json.loads(line.rpartition(b" ")[0])["entry"] for line in lines]
        charges = Counter((e["round"], e["attempt"]) for e in entries if e["kind"] == "charge")
        assert set(charges.values()) == {1}
        assert {(number, attempt) for who, number, attempt in served if who == site} <= set(charges)
    bundle = export_run(world.server, exported_s=int(world.clock()), software="fedrad 0.1.0")
    findings = verify_bundle(bundle, trusted=trust_of(world.study).log).findings
    assert [found for found in findings if found.status is Status.FAIL] == []


def campaign(directory: Path, *, seed: int, faults: int) -> Counter[str]:
    print(f"FEDRAD_FAULT_SEED={seed}", flush=True)
    quiet = build(directory / "quiet", **SETTINGS)  # type: ignore[arg-type]
    adapter = vector_sha256(quiet.run().adapter)
    quiet.close()
    draw, dealt, number = random.Random(seed), Counter[str](), 0
    while dealt.total() < faults:
        number += 1
        dealt += run_disturbed(directory / str(number), draw, faults - dealt.total(), adapter=adapter).dealt
    print(f"{number} studies, faults {dict(dealt)}", flush=True)
    return dealt


def test_a_dozen_random_faults_change_nothing(tmp_path: Path) -> None:
    assert campaign(tmp_path, seed=1, faults=SMOKE).total() == SMOKE


@pytest.mark.slow
def test_hundreds_of_random_faults_change_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("FEDRAD_FAULT_SEED", random.SystemRandom().randrange(1 << 32)))
    assert campaign(tmp_path, seed=seed, faults=CAMPAIGN).total() == CAMPAIGN
