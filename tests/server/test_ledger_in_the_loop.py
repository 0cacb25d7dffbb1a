"""A study's ledger as the server loop writes it and its sites witness it, up to the audit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.canonical import sha256_hex
from common.errors import RoundFailed
from common.ledger.audit import verify_bundle
from common.ledger.entries import AdapterDecision, Entry, Incident, RoundRecord
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of
from common.ledger.statements import commit, format_participation, parse_participation, sign_contribution
from common.model.lora import vector_sha256
from common.protocol import Header, Kind, Stage, pack_body, seal, unpack_body
from common.secagg.messages import format_shares, parse_shares
from server.bundles import export_run
from server.checkpoint import read_records
from tests.simulator import SITES, Consortium, build, split_message

Make = Callable[..., Consortium]
SOFTWARE = "fedrad 0.1.0"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Consortium] = []

    def one(**settings: Any) -> Consortium:
        made.append(build(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield one
    for world in made:
        world.close()


def audited(world: Consortium) -> dict[str, Status]:
    bundle = export_run(world.server, exported_s=int(world.clock()), software=SOFTWARE)
    report = verify_bundle(bundle, trusted=trust_of(world.study).log)
    failed = [finding for finding in report.findings if finding.status is Status.FAIL]
    assert failed == []
    return {finding.control: finding.status for finding in report.findings}


def entries(world: Consortium) -> list[Entry]:
    from common.ledger.entries import parse_entry

    lines = (world.server / "ledger" / "entries.jsonl").read_bytes().splitlines()
    return [parse_entry(line) for line in lines]


def events(world: Consortium, kind: str) -> list[dict[str, Any]]:
    lines = (world.server / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("mode", ["consortium", "local", "plain"])
def test_a_study_of_each_mode_passes_its_audit(make: Make, mode: str) -> None:
    world = make(mode=mode, rounds=2)
    world.run()
    found = audited(world)
    kinds = [entry.kind for entry in entries(world)]
    assert kinds == [
        *["enrolment"] * 4, "study", *["approval"] * 4, *["data"] * 4, "round", "round", "end",
    ]  # fmt: skip
    for control in ("log-history", "enrolment", "witness-quorum", "round-chain", "contribution-signatures",
                    "site-records", "completeness"):  # fmt: skip
        assert found[control] is Status.PASS
    if mode == "consortium":
        assert {
            found[c] for c in ("site-epsilon", "release-epsilon", "budgets", "mechanism", "aggregate")
        } == {Status.PASS}


def test_a_dropout_and_a_failed_attempt_stand_in_the_ledger_and_pass_the_audit(make: Make) -> None:
    world = make(mode="consortium", rounds=3)

    def before(to: str, header: Header, request: bytes) -> bytes | None:
        early = header.stage is Stage.CONTRIBUTE and header.attempt == 1
        lost = (to == "beta" and header.round == 0) or (to in ("beta", "gamma") and header.round == 2)
        return None if early and lost else request

    world.before = before
    world.run()
    audited(world)
    rounds = [entry.body for entry in entries(world) if isinstance(entry.body, RoundRecord)]
    assert [(r.number, r.attempt, r.outcome.value) for r in rounds] == [
        (0, 1, "released"), (1, 2, "released"), (2, 1, "failed"), (2, 2, "released"),
    ]  # fmt: skip
    assert rounds[0].dropouts == ("beta",)


def test_an_audit_catches_a_retained_contribution_that_was_exchanged(make: Make) -> None:
    world = make(mode="consortium", rounds=2)
    world.run()
    (path,) = (world.server / "retained").glob("1-1/beta.bin")
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    bundle = export_run(world.server, exported_s=int(world.clock()), software=SOFTWARE)
    report = verify_bundle(bundle, trusted=trust_of(world.study).log)
    assert [f.control for f in report.findings if f.status is Status.FAIL] == ["aggregate"]


def test_a_quorum_that_does_not_cosign_stops_the_round(make: Make) -> None:
    """Two of four sites send cosignatures that are none: nothing is unmasked, every attempt is named."""
    world = make(mode="consortium", rounds=1, max_attempts=2, spare_rounds=4)
    for site in ("alpha", "beta"):
        agent = world.agent(site)
        agent._witness_key = world.agent("gamma")._witness_key
    with pytest.raises(RoundFailed):
        world.run()
    assert read_records(world.server) == []


def test_the_operator_that_signs_another_log_is_refused_by_every_site(make: Make) -> None:
    """The ledger is put back to its state before a round and goes on otherwise: a fork."""
    world = make(mode="consortium", rounds=2)
    seen: list[bytes] = []
    ledger = world.server / "ledger"

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if header.stage is Stage.UNMASK and header.round == 0 and not seen:
            seen.append((ledger / "entries.jsonl").read_bytes())
        return reply

    world.after = after
    world.run()
    shutil.rmtree(ledger)
    world.clock.now += 5
    world.run()  # the end is logged anew in an empty log
    lines = [json.loads(line) for line in (world.server / "log.jsonl").read_text().splitlines()]
    refused = {e["site"]: e["reason"] for e in lines if e["event"] == "finish-not-acknowledged"}
    reasons = list(refused.values())
    assert sorted(refused) == sorted(SITES) and all("LogShrunk" in r or "LogForked" in r for r in reasons)


def test_a_site_whose_approval_is_none_is_not_ready_and_the_study_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.agent

    world = make(mode="plain", rounds=1)
    real = client.agent.read_approval
    monkeypatch.setattr(
        client.agent, "read_approval",
        lambda home, study: bytes(64) if home.site == "beta" else real(home, study),
    )  # fmt: skip
    world.run()
    assert read_records(world.server)[0].record.contributors == ("alpha", "delta", "gamma")
    lines = [json.loads(line) for line in (world.server / "log.jsonl").read_text().splitlines()]
    reasons = [e["reason"] for e in lines if e["event"] == "site-not-ready"]
    assert reasons and all(r.startswith("SignatureInvalid") for r in reasons)
    audited(world)


def test_a_site_that_states_keys_of_another_is_not_ready(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import client.agent

    world = make(mode="plain", rounds=1)
    real = client.agent.statements

    def swapped(home: Any, *args: Any, **kwargs: Any) -> Any:
        return real(world.agent("alpha").home if home.site == "beta" else home, *args, **kwargs)

    monkeypatch.setattr(client.agent, "statements", swapped)
    world.run()
    assert read_records(world.server)[0].record.contributors == ("alpha", "delta", "gamma")


# --- one site that misbehaves ends nothing ------------------------------------------------------------------


def altered(world: Consortium, site: str, stage: Stage, change: Callable[[bytes], bytes]) -> None:
    """Have a site sign another body than its agent made, for one stage."""

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if of != site or header.stage is not stage or header.kind is not Kind.REQUEST:
            return reply
        own, _, body = split_message(reply)
        changed = change(body)
        about = {"body_bytes": len(changed), "body_sha256": sha256_hex(changed)}
        return bytes(seal(world.agent(site)._key, replace(own, **about), changed))

    world.after = after


@pytest.mark.parametrize("lies_from", [0, 1])
def test_a_site_that_deals_other_shares_than_it_announced_is_left_out_from_then_on(
    make: Make, lies_from: int
) -> None:
    world = make(mode="consortium", rounds=3)

    def after(of: str, header: Header, reply: bytes) -> bytes:
        own, _, body = split_message(reply)
        if of != "delta" or header.stage not in (Stage.SHARES, Stage.UNMASK) or own.kind is Kind.REFUSAL:
            return reply
        parts = [
            bytes(part) for part in unpack_body(body, fields={}, parts=1 + (header.stage is Stage.UNMASK))[1]
        ]
        if not parts[-1] or header.round + (header.stage is Stage.UNMASK) < lies_from:
            return reply
        dealt = parse_shares(parts[-1])
        parts[-1] = format_shares(replace(dealt, seed_digests=dealt.key_digests))
        changed = pack_body({}, *parts)
        about = {"body_bytes": len(changed), "body_sha256": sha256_hex(changed)}
        return bytes(seal(world.agent("delta")._key, replace(own, **about), changed))

    world.after = after
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert ["delta" in record.contributors for record in records] == [
        number < lies_from for number in range(3)
    ]
    # the round after needs keys anew, too: the liar's came with the attempt that failed
    assert [record.attempt for record in records] == [
        1 + (number - lies_from in (0, 1)) for number in range(3)
    ]
    assert all(record.missing["delta"].startswith("ShareWrong") for record in records[lies_from:])
    assert [e.body.code for e in entries(world) if isinstance(e.body, Incident)] == ["wrong-share"]


def other_shares(body: bytes) -> bytes:
    """Deal other shares than were announced."""
    dealt = parse_shares(bytes(unpack_body(body, fields={}, parts=1)[1][0]))
    return pack_body({}, format_shares(replace(dealt, seed_digests=dealt.key_digests)))


def test_a_restarted_server_knows_the_culprits(make: Make) -> None:
    world = make(mode="consortium", rounds=2)

    altered(world, "delta", Stage.SHARES, other_shares)

    def stop(site: str, header: Header, request: bytes) -> bytes:
        if header.round == 0 and header.attempt == 2 and header.stage is Stage.CONTRIBUTE:
            raise KeyboardInterrupt
        return request

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run()
    (world.server / "pending.json").unlink()  # the next attempt is not fixed yet
    world.before = lambda site, header, request: request
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert all("delta" not in record.cohort for record in records)


def test_a_culprit_without_whom_there_are_too_few_stays_in(make: Make) -> None:
    world = make(mode="consortium", rounds=1, min_sites=4, max_attempts=2)

    altered(world, "delta", Stage.SHARES, other_shares)
    with pytest.raises(RoundFailed, match="at most 2 attempts"):
        world.run()
    assert [list(failed["missing"]) for failed in events(world, "round-failed")] == [["delta"], ["delta"]]


def test_a_site_that_has_seen_less_than_nothing_is_not_ready_and_the_study_goes_on(make: Make) -> None:
    world = make(mode="consortium", rounds=1)

    def change(body: bytes) -> bytes:
        fields = {"speaks": dict, "seen_round": int, "seen_record": str, "seen_size": int}
        meta, parts = unpack_body(body, fields=fields, parts=2)
        return pack_body({**meta, "seen_size": -5}, *parts)

    altered(world, "delta", Stage.HELLO, change)
    world.run()
    assert read_records(world.server)[0].record.contributors == ("alpha", "beta", "gamma")


def contribution_with(**parts: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    names = ("upload", "keys", "cosignature", "statement", "commitment_key", "vector")

    def change(body: bytes) -> bytes:
        meta, found = unpack_body(body, fields={"adapter_sha256": str, "form": str}, parts=6)
        new = [parts.get(name, bytes)(bytes(part)) for name, part in zip(names, found, strict=True)]
        return pack_body(meta, *new)

    return change


def test_a_masked_vector_of_another_length_is_its_sites_loss_alone(make: Make) -> None:
    world = make(mode="consortium", rounds=1)

    def shorter(body: bytes) -> bytes:
        meta, found = unpack_body(body, fields={"adapter_sha256": str, "form": str}, parts=6)
        vector = bytes(found[5])[:-4]
        stated = parse_participation(bytes(found[3]))
        again = sign_contribution(
            world.study, world.agent("alpha")._key, site="alpha", number=0, attempt=1,
            adapter_in=meta["adapter_sha256"], commitment=commit(bytes(found[4]), vector),
            sigma_units=stated.sigma_units, epsilon=stated.epsilon,
        )  # fmt: skip
        return pack_body(meta, *found[:3], format_participation(again), found[4], vector)

    altered(world, "alpha", Stage.CONTRIBUTE, shorter)
    world.run()
    record = read_records(world.server)[0].record
    assert record.contributors == ("beta", "delta", "gamma") and record.attempt == 1


@pytest.mark.parametrize("stated", [{"sigma_units": 7.0}, {"epsilon": 1e8}, {"epsilon": 0.0}])
def test_a_false_statement_is_its_sites_loss_and_the_audit_passes(
    make: Make, stated: dict[str, float]
) -> None:
    world = make(mode="consortium", rounds=1)

    def lying(body: bytes) -> bytes:
        meta, found = unpack_body(body, fields={"adapter_sha256": str, "form": str}, parts=6)
        true = parse_participation(bytes(found[3]))
        told = {"sigma_units": true.sigma_units, "epsilon": true.epsilon} | stated
        again = sign_contribution(
            world.study, world.agent("delta")._key, site="delta", number=0, attempt=1,
            adapter_in=meta["adapter_sha256"], commitment=true.commitment, **told,
        )  # fmt: skip
        return pack_body(meta, *found[:3], format_participation(again), *found[4:])

    altered(world, "delta", Stage.CONTRIBUTE, lying)
    world.run()
    record = read_records(world.server)[0].record
    assert record.contributors == ("alpha", "beta", "gamma")
    assert record.missing == {"delta": "EntryInvalid"}
    audited(world)


def test_bad_keys_for_the_next_round_cost_the_next_round_not_this_one(make: Make) -> None:
    world = make(mode="consortium", rounds=2)
    altered(world, "delta", Stage.CONTRIBUTE, contribution_with(keys=lambda keys: keys and keys[:-1]))
    world.run()
    record = read_records(world.server)[0].record
    assert "delta" in record.contributors and "delta" not in record.missing


def test_an_upgrade_between_rounds_is_announced_and_fails_no_audit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.app

    world = make(mode="plain", rounds=2)

    class Killed(BaseException):
        pass

    def before(to: str, header: Header, request: bytes) -> bytes:
        if header.round == 1:
            raise Killed
        return request

    world.before = before
    with pytest.raises(Killed):
        world.run()
    (world.server / "pending.json").unlink(missing_ok=True)
    world.before = lambda to, header, request: request
    monkeypatch.setattr(server.app, "code_sha256", lambda: "ab" * 32)
    world.run()
    assert audited(world)["code"] is Status.NOT_CHECKABLE
    codes = [entry.body.code for entry in entries(world) if isinstance(entry.body, Incident)]
    assert codes == ["software-changed"]


def test_a_kill_between_an_entry_and_its_checkpoint_loses_no_attempt(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.log import Log

    world = make(mode="consortium", rounds=2)
    real = Log.checkpoint

    class Killed(BaseException):
        pass

    def dying(book: Log) -> Any:
        kinds = [entry.kind for entry in book.entries()]
        if kinds and kinds[-1] == "round":
            raise Killed
        return real(book)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "checkpoint", dying)
        with pytest.raises(Killed):
            world.run()
    world.run()
    assert [signed.record.attempt for signed in read_records(world.server)] == [1, 1]
    audited(world)


# --- acceptance and rollback --------------------------------------------------------------------------------


PUBLIC = f'every_rounds = 1\nmax_increase = 0.1\npublic_sha256 = "{"ab" * 32}"'


def test_an_adapter_that_fails_on_the_public_set_is_rolled_back_and_the_study_goes_on(make: Make) -> None:
    world = make(mode="consortium", rounds=4, acceptance=PUBLIC)
    judged: list[str] = []

    def judge(vector: Any) -> float:
        judged.append(vector_sha256(vector))
        return {3: 9.0, 4: float("nan")}.get(len(judged), 2.0)

    world.judge = judge
    state = world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert [bool(r.rolled_back_to) for r in records] == [False, True, True, False]
    assert records[1].rolled_back_to == records[0].adapter_out == records[2].adapter_in
    assert records[2].rolled_back_to == records[0].adapter_out == records[3].adapter_in
    assert vector_sha256(state.adapter) == records[3].adapter_out
    audited(world)
    bodies = [entry.body for entry in entries(world)]
    decisions = [body.decision.value for body in bodies if isinstance(body, AdapterDecision)]
    assert decisions == ["accept", "rollback", "rollback", "accept"]
    assert [body.code for body in bodies if isinstance(body, Incident)] == ["adapter-rejected"] * 2


def test_a_rollback_survives_a_killed_server(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {1: 2.0, 2: 9.0}

    def world_with_judge() -> Consortium:
        world = make(mode="plain", rounds=3, acceptance=PUBLIC)
        calls: list[int] = []

        def judge(vector: Any) -> float:
            calls.append(1)
            return losses.get(len(calls), 2.0)

        world.judge = judge
        return world

    wanted = world_with_judge().run()
    world = world_with_judge()
    real = world.before

    class Killed(BaseException):
        pass

    def before(to: str, header: Header, request: bytes) -> bytes | None:
        if header.round == 1 and header.stage is Stage.CONTRIBUTE and world.before is before:
            world.before = real
            raise Killed
        return request

    world.before = before
    with pytest.raises(Killed):
        world.run()
    assert vector_sha256(world.run().adapter) == vector_sha256(wanted.adapter)


def test_a_site_beyond_its_clip_is_found_in_the_sum_and_stands_as_an_incident(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What secure aggregation hides in one site shows in the sum when it is large enough."""
    import numpy as np

    import client.agent

    world = make(mode="consortium", rounds=1, max_attempts=2, spare_rounds=4)
    real = client.agent.noised_sum

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        units = real(*args, **kwargs)
        return units + np.uint32(1 << 26)

    monkeypatch.setattr(client.agent, "noised_sum", poisoned)
    with pytest.raises(RoundFailed):
        world.run()
    bodies = [entry.body for entry in entries(world)]
    assert [body.code for body in bodies if isinstance(body, Incident)] == ["sum-out-of-range"] * 2
    assert not any(isinstance(b, RoundRecord) and b.outcome.value == "released" for b in bodies)


def test_the_sites_of_the_study_are_its_witnesses(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    world.run()
    newest = sorted((world.server / "ledger" / "checkpoints").glob("*.note"))[-1].read_text()
    assert all(f"— {site} " in newest for site in SITES)
