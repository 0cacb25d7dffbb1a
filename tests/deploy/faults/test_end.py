"""The end of a study while sites are away or their last replies get lost: witnessed all the same."""

from __future__ import annotations

import json
from pathlib import Path

from common.ledger.audit import verify_bundle
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of
from common.protocol import Header, Stage
from server.bundles import export_run
from tests.simulator import Consortium, build

SETTINGS = {"mode": "plain", "rounds": 1, "min_sites": 3}
LOST = ("beta", "gamma")


def verify_end(world: Consortium) -> None:
    events = [json.loads(line)["event"] for line in (world.server / "log.jsonl").read_text().splitlines()]
    assert events[-1] == "finished" and "end-not-witnessed" not in events
    bundle = export_run(world.server, exported_s=int(world.clock()), software="fedrad 0.1.0")
    findings = verify_bundle(bundle, trusted=trust_of(world.study).log).findings
    assert [found for found in findings if found.status is Status.FAIL] == []


def test_last_replies_that_are_lost_are_asked_for_again(tmp_path: Path) -> None:
    world = build(tmp_path, **SETTINGS)  # type: ignore[arg-type]
    lost = dict.fromkeys(LOST, 0)

    def after(site: str, header: Header, reply: bytes) -> bytes | None:
        if header.stage is Stage.WITNESS and header.round == 1 and site in lost and lost[site] < 2:
            lost[site] += 1
            return None
        return reply

    world.after = after
    world.run()
    world.close()
    assert set(lost.values()) == {2}
    verify_end(world)


def test_sites_that_are_away_at_the_end_are_waited_for(tmp_path: Path) -> None:
    world = build(tmp_path, **SETTINGS)  # type: ignore[arg-type]
    back_at = [float("inf")]

    class Away(set[str]):
        def __bool__(self) -> bool:
            return back_at[0] < float("inf")

        def __contains__(self, site: object) -> bool:
            return site in LOST and back_at[0] - 500.0 <= world.clock() < back_at[0]

    def after(site: str, header: Header, reply: bytes) -> bytes:
        if header.stage is Stage.CONTRIBUTE and site == "gamma":
            back_at[0] = world.clock() + 500.0
        return reply

    world.after, world.away = after, Away()
    world.run()
    world.close()
    assert back_at[0] < float("inf")
    verify_end(world)
