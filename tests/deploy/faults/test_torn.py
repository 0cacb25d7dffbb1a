"""A kill in the middle of every stage that leaves a torn last line in every log, and half-written files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.ledger.audit import verify_bundle
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of
from common.model.lora import vector_sha256
from common.protocol import Header, Stage
from server.bundles import export_run
from server.checkpoint import read_records
from tests.simulator import SITES, build

MOMENTS = (
    (Stage.HELLO, 0),
    (Stage.KEYS, 0),
    (Stage.SHARES, 0),
    (Stage.CONTRIBUTE, 0),
    (Stage.UNMASK, 0),
    (Stage.CONTRIBUTE, 1),
    (Stage.UNMASK, 1),
    (Stage.WITNESS, 2),
)
SERVER_LOGS = ("records.jsonl", "log.jsonl", "ledger/entries.jsonl")
WRITTEN_WHOLE = {
    "server": ("pending.json", "masking.json", "statements.json", "total.u32", "traffic.json"),
    "site": ("budget.seeds",),
}


class Killed(BaseException):
    """The server process is gone in the middle of a stage."""


def tear(directory: Path) -> int:
    """Give every log of a consortium a torn last line, every other file a half-written successor."""
    server, homes = directory / "server", sorted((directory / "sites").iterdir())
    logs = [server / name for name in SERVER_LOGS] + [home / "budget.jsonl" for home in homes]
    torn = 0
    for path in logs:
        if path.is_file() and path.stat().st_size:
            last = path.read_bytes().splitlines(keepends=True)[-1]
            with path.open("ab") as handle:
                handle.write(last[: len(last) // 2])
            torn += 1
    states = [state for home in homes for state in (home / "state").glob("*")]
    whole = [server / name for name in WRITTEN_WHOLE["server"]]
    whole += [home / name for home in homes for name in WRITTEN_WHOLE["site"]]
    whole += [path for state in states for path in (state / "seen.json", state / "adapter.f32")]
    whole += [path for state in states for part in ("begun", "spool") for path in (state / part).glob("0*")]
    whole += [path for home in homes for path in (home / "witness").rglob("*") if path.is_file()]
    for path in whole:
        if path.is_file() and not path.name.startswith("."):
            path.with_name(f".{path.name}.99999.partial").write_bytes(path.read_bytes()[:-7])
    return torn


def test_a_torn_line_in_every_log_at_every_stage_changes_nothing(tmp_path: Path) -> None:
    undisturbed = build(tmp_path / "undisturbed", mode="consortium", rounds=2)
    wanted = vector_sha256(undisturbed.run().adapter)
    undisturbed.close()
    world = build(tmp_path / "disturbed", mode="consortium", rounds=2)
    left = list(MOMENTS)

    def before(site: str, header: Header, request: bytes) -> bytes:
        if left and site == SITES[1] and header.stage is left[0][0] and header.round == left[0][1]:
            raise Killed
        return request

    world.before = before
    torn = []
    while left:
        with pytest.raises(Killed):
            world.run()
        left.pop(0)
        for site in SITES:
            world.crash(site)
        torn.append(tear(world.out))
    assert torn[0] >= 2 and torn[-1] == len(SERVER_LOGS) + len(SITES)
    assert vector_sha256(world.run().adapter) == wanted
    world.close()
    assert [signed.record.round for signed in read_records(world.server)] == [0, 1]
    for line in (world.server / "log.jsonl").read_text().splitlines():
        json.loads(line)
    for site in SITES:
        text = (world.out / "sites" / site / "budget.jsonl").read_text()
        assert text.count('"kind":"charge"') == 2, "one charge per round"
    bundle = export_run(world.server, exported_s=int(world.clock()), software="fedrad 0.1.0")
    findings = verify_bundle(bundle, trusted=trust_of(world.study).log).findings
    assert [found for found in findings if found.status is Status.FAIL] == []
