"""A disk that is full at the one moment when a site's budget ledger grows: no harm once there is room."""

from __future__ import annotations

import json
import resource
from pathlib import Path

from common.model.lora import vector_sha256
from common.protocol import Header, Stage
from tests.simulator import build, refusal_of

SETTINGS = {"mode": "consortium", "masking": False, "rounds": 2, "min_sites": 4}


def test_a_charge_that_did_not_fit_is_made_when_there_is_room(tmp_path: Path) -> None:
    quiet = build(tmp_path / "quiet", **SETTINGS)  # type: ignore[arg-type]
    wanted = vector_sha256(quiet.run().adapter)
    quiet.close()
    world = build(tmp_path / "full", **SETTINGS)  # type: ignore[arg-type]
    ledger = world.out / "sites" / "beta" / "budget.jsonl"
    failed: list[int] = []

    def before(site: str, header: Header, request: bytes) -> bytes:
        if site == "beta" and header.stage is Stage.CONTRIBUTE and not failed:
            size = ledger.stat().st_size
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # 20 bytes of the line fit
            try:
                reply = world.agent("beta").handle(Stage.CONTRIBUTE, request)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert refusal_of(reply) == "BudgetCorrupt"
            failed.append(ledger.stat().st_size - size)
        return request

    world.before = before
    assert vector_sha256(world.run().adapter) == wanted
    world.close()
    assert failed == [20], "expected the ledger to be what did not fit"
    entries = [json.loads(line.rpartition(b" ")[0])["entry"] for line in ledger.read_bytes().splitlines()]
    assert [(e["round"], e["attempt"]) for e in entries if e["kind"] == "charge"] == [(0, 1), (1, 1)]
