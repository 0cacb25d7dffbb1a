"""Attacks that an auditor must catch, each named; the attacker is the operator, who can re-sign the log."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from common.canonical import canonical_json, sha256_hex
from common.errors import FedRadError
from common.identity import Purpose
from common.ledger.audit import AuditReport, verify_bundle
from common.ledger.bundle import Bundle, make_bundle, pack, parse_bundle
from common.ledger.checkpoint import log_key
from common.ledger.entries import (
    OPERATOR,
    Acceptance,
    AdapterDecision,
    Approval,
    Decision,
    EndReason,
    Enrolment,
    Entry,
    KeyCompromise,
    KeyUse,
    Outcome,
    Revocation,
    RevocationReason,
    Rotation,
    RoundRecord,
    StudyEnd,
    format_entry,
    parse_entry,
)
from common.ledger.findings import Status, catalogue
from common.ledger.output_checks import ADAPTER_NAME, PROOF_NAME
from common.ledger.privacy_checks import release_history, site_history
from common.ledger.statements import commit, sign_entry
from common.records import RoundRecord as SiteRecord
from common.records import sign_record, signed_to_json
from tests.common.ledger.consortium import (
    ORIGIN,
    Ledger,
    adapter_file,
    adapter_name,
    aggregate_key,
    bundle_of,
    epsilons,
    finish,
    finished_bundle,
    key_of,
    open_study,
    release_files,
    retained,
    round_record,
    run_study,
    sign_participation,
    study,
)

ROUNDS = 3
SITES = ("amber", "birch", "cedar")


@pytest.fixture(scope="module")
def good() -> Bundle:
    return finished_bundle(ROUNDS)


def audit(bundle: Bundle) -> AuditReport:
    return verify_bundle(bundle, trusted=log_key(ORIGIN, bytes.fromhex(key_of(OPERATOR).public)))


def failed(bundle: Bundle) -> dict[str, str]:
    return {f.control: f.detail for f in audit(bundle).findings if f.status is Status.FAIL}


def members_of(bundle: Bundle) -> dict[str, bytes]:
    return {n: d for n, d in bundle.members.items() if n != "bundle.json"}


def unchecked(bundle: Bundle) -> set[str]:
    return {f.control for f in audit(bundle).findings if f.status is Status.NOT_CHECKABLE}


def rewritten(
    change: Callable[[int, Entry], Entry | None], *, cosigners: tuple[str, ...] = SITES, rounds: int = ROUNDS
) -> Bundle:
    """The finished study's log with entries changed or dropped, re-signed by the operator throughout."""
    source = Ledger(study(rounds=rounds))
    members = finish(source, rounds, run_study(source, rounds))
    ends = [note.text.split("\n")[1] for note in source.notes]
    ledger = Ledger(source.manifest)
    for index, leaf in enumerate(source.leaves):
        entry = change(index, parse_entry(leaf))
        if entry is not None:
            ledger.time_s = max(ledger.time_s, entry.time_s)
            ledger.add_leaf(format_entry(entry))
        if str(index + 1) in ends:
            ledger.checkpoint(cosigners)
    return bundle_of(ledger, members)


def changed_round(number: int, change: Callable[[RoundRecord], RoundRecord]) -> Callable[[int, Entry], Entry]:
    def apply(_: int, entry: Entry) -> Entry:
        if isinstance(entry.body, RoundRecord) and entry.body.number == number:
            return replace(entry, body=change(entry.body))
        return entry

    return apply


# --- nothing wrong ----------------------------------------------------------------------------------------


def test_an_honest_study_passes_every_control_it_gives_means_to_check(good: Bundle) -> None:
    assert audit(good).passed
    assert unchecked(good) == {"enrolment", "site-records", "aggregate"}
    assert {f.control for f in audit(good).findings} == {c["id"] for c in catalogue()["controls"]}


def test_without_a_log_key_from_elsewhere_the_anchor_is_not_checkable(good: Bundle) -> None:
    finding = next(f for f in verify_bundle(good).findings if f.control == "trust-anchor")
    assert finding.status is Status.NOT_CHECKABLE


def test_every_control_in_the_map_exists() -> None:
    known = {control["id"] for control in catalogue()["controls"]}
    for regime in catalogue()["regimes"]:
        for line in regime["lines"]:
            assert set(line["controls"]) <= known
            assert line["controls"] or line["outside"], line["ref"]


# --- the log ----------------------------------------------------------------------------------------------


def test_a_log_under_another_key_is_not_the_one_the_auditor_knows(good: Bundle) -> None:
    other = verify_bundle(good, trusted=log_key(ORIGIN, bytes.fromhex(key_of("mallory").public)))
    assert [f.control for f in other.findings if f.status is Status.FAIL] == ["trust-anchor"]


def test_a_checkpoint_of_a_fork_in_the_bundle_is_caught(good: Bundle) -> None:
    fork = rewritten(changed_round(1, lambda r: replace(r, state_out="ab" * 32)))
    member = "checkpoints/000000000006.note"
    mixed = make_bundle(
        log=good.log, exported_s=0, software="fedrad 0.1.0",
        members=members_of(good) | {member: fork.members[member]},
    )  # fmt: skip
    assert set(failed(mixed)) == {"log-history"}


def test_entries_cut_from_the_end_are_caught(good: Bundle) -> None:
    lines = good.members["entries.jsonl"].splitlines(keepends=True)
    cut = members_of(good) | {"entries.jsonl": b"".join(lines[:-1])}
    assert "log-history" in failed(make_bundle(log=good.log, exported_s=0, software="x", members=cut))


def test_entries_no_checkpoint_covers_are_caught(good: Bundle) -> None:
    names = [n for n in good.members if n not in ("bundle.json", "checkpoints/000000000009.note")]
    members = {n: good.members[n] for n in names}
    assert (
        "are in no checkpoint"
        in failed(make_bundle(log=good.log, exported_s=0, software="x", members=members))["log-history"]
    )


def test_dropped_round_is_caught_even_when_everybody_signs_the_shorter_log() -> None:
    def drop(_: int, entry: Entry) -> Entry | None:
        return None if isinstance(entry.body, RoundRecord) and entry.body.number == 1 else entry

    assert "dropped or repeated" in failed(rewritten(drop))["round-chain"]


def test_back_dated_entry_is_caught_by_order_and_by_the_witnesses() -> None:
    def earlier(index: int, entry: Entry) -> Entry:
        return replace(entry, time_s=entry.time_s - 3600) if index == 5 else entry

    detail = failed(rewritten(earlier))["entry-times"]
    assert "dated before the one ahead" in detail and "back-dated" in detail


def test_an_entry_dated_into_the_future_is_caught_by_the_witnesses() -> None:
    ledger = Ledger(study())
    open_study(ledger)
    values = epsilons(ledger.manifest, 1)
    entry = ledger.entry(round_record(ledger.manifest, 0, epsilon=values[0][0], release_epsilon=values[0][1]))
    ledger.add_leaf(format_entry(replace(entry, time_s=entry.time_s + 86400)))
    ledger.checkpoint()
    assert "dated after the witnesses saw it" in failed(bundle_of(ledger))["entry-times"]


@pytest.mark.parametrize("cosigners", [(), ("amber",)])
def test_quorum_below_threshold_is_caught(cosigners: tuple[str, ...]) -> None:
    assert (
        "no checkpoint over it has 2 witnesses"
        in failed(rewritten(lambda _, e: e, cosigners=cosigners))["witness-quorum"]
    )


def test_a_round_that_went_on_before_the_one_before_was_witnessed_is_caught() -> None:
    ledger = Ledger(study())
    open_study(ledger)
    for number, (site, release) in enumerate(epsilons(ledger.manifest, 3)):
        ledger.add(round_record(ledger.manifest, number, epsilon=site, release_epsilon=release))
        ledger.checkpoint(SITES if number != 1 else ("amber",))
    assert failed(bundle_of(ledger)) == {
        "witness-quorum": "entry 5: expected 2 witnesses before the next round"
    }


def test_a_forged_cosignature_line_is_caught(good: Bundle) -> None:
    member = "checkpoints/000000000009.note"
    other = good.members["checkpoints/000000000007.note"].decode().splitlines()[-1]
    text = good.members[member].decode().splitlines(keepends=True)
    text[-1] = other + "\n"
    members = members_of(good) | {member: "".join(text).encode()}
    assert (
        "cedar does not verify"
        in failed(make_bundle(log=good.log, exported_s=0, software="x", members=members))["witness-quorum"]
    )


# --- rounds and privacy -----------------------------------------------------------------------------------


def test_a_sites_epsilon_rewritten_by_the_operator_is_caught() -> None:
    def lower(record: RoundRecord) -> RoundRecord:
        parts = tuple(replace(p, epsilon=p.epsilon / 2) for p in record.participations)
        return replace(record, participations=parts)

    found = failed(rewritten(changed_round(ROUNDS - 1, lower)))
    assert "did not sign what is recorded" in found["contribution-signatures"]
    assert "its rounds cost" in found["site-epsilon"]


def test_a_site_that_states_too_little_is_caught_although_it_signed() -> None:
    manifest = study()

    def lower(record: RoundRecord) -> RoundRecord:
        parts = [replace(p, epsilon=0.01) if p.site == "birch" else p for p in record.participations]
        return replace(record, participations=tuple(sign_participation(manifest, record, p) for p in parts))

    found = failed(rewritten(changed_round(ROUNDS - 1, lower)))
    assert set(found) == {"site-epsilon"}
    assert "birch" in found["site-epsilon"] and "falls" in found["site-epsilon"]


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_rewritten_release_epsilon_is_caught(factor: float) -> None:
    change = changed_round(ROUNDS - 1, lambda r: replace(r, release_epsilon=r.release_epsilon * factor))
    assert "release-epsilon" in failed(rewritten(change))


def test_a_budget_that_was_exceeded_is_caught() -> None:
    found = failed(finished_bundle(2, site_epsilon=0.1, release_epsilon=0.05))
    assert "amber spent" in found["budgets"] and "the release spent" in found["budgets"]


@pytest.mark.parametrize(
    "field,value,control",
    [("clip_norm", 2.0, "mechanism"), ("sampling_rate", 0.5, "mechanism"), ("delta", 1e-3, "mechanism"),
     ("patients", 9, "mechanism"), ("server_sigma_units", 0.0, "mechanism"), ("code", "ee" * 32, "code"),
     ("lockfile", "ee" * 32, "code"), ("adapter_in", "ee" * 32, "round-chain"),
     ("adapter_out", "ee" * 32, "round-chain"),
     ("attempt", 9, "round-chain"), ("number", 7, "round-chain")],
)  # fmt: skip
def test_a_round_that_breaks_the_manifest_is_caught(field: str, value: Any, control: str) -> None:
    assert control in failed(rewritten(changed_round(1, lambda r: replace(r, **{field: value}))))


def test_a_site_with_less_noise_than_agreed_is_caught() -> None:
    manifest = study()

    def quiet(record: RoundRecord) -> RoundRecord:
        parts = [replace(p, sigma_units=1.0) if p.site == "cedar" else p for p in record.participations]
        return replace(record, participations=tuple(sign_participation(manifest, record, p) for p in parts))

    assert "cedar added noise of width 1" in failed(rewritten(changed_round(1, quiet)))["mechanism"]


def test_a_round_below_the_floor_is_caught() -> None:
    def fewer(record: RoundRecord) -> RoundRecord:
        parts = tuple(replace(p, summed=p.site == "amber") for p in record.participations)
        return replace(record, participations=parts)

    assert "released with 1 sites" in failed(rewritten(changed_round(1, fewer)))["round-chain"]


def test_a_replayed_contribution_is_caught() -> None:
    manifest = study()
    first = round_record(manifest, 0, epsilon=1, release_epsilon=1).participations[0]

    def replay(record: RoundRecord) -> RoundRecord:
        part = sign_participation(
            manifest, record, replace(record.participations[0], commitment=first.commitment)
        )
        return replace(record, participations=(part, *record.participations[1:]))

    assert "replayed" in failed(rewritten(changed_round(1, replay)))["contribution-signatures"]


def test_a_round_after_the_studys_end_is_caught() -> None:
    ledger = Ledger(study())
    values = run_study(ledger, 1)
    members = finish(ledger, 1, values)
    ledger.add(round_record(ledger.manifest, 1, epsilon=values[0][0], release_epsilon=values[0][1]))
    ledger.checkpoint()
    assert "after the study's end" in failed(bundle_of(ledger, members))["study-order"]


def test_failed_attempts_and_dropouts_are_charged_and_pass() -> None:
    ledger = Ledger(study())
    open_study(ledger)
    ledger.add(round_record(ledger.manifest, 0, epsilon=1.0, release_epsilon=0.0, outcome=Outcome.FAILED))
    from common.ledger.case import read_case
    from common.privacy.mechanism import View
    from common.privacy.study_plan import plan_of

    draft = round_record(ledger.manifest, 0, epsilon=9.0, release_epsilon=0.0, attempt=2, dropouts=("cedar",))
    ledger.add(draft)
    ledger.checkpoint()
    case = read_case(bundle_of(ledger)).studies[ledger.manifest.sha256]
    assert len(site_history(case, "amber")) == 2 and len(site_history(case, "cedar")) == 1
    assert len(release_history(case)) == 1
    exact = plan_of(ledger.manifest).epsilon(View.RELEASE, release_history(case))
    again = Ledger(ledger.manifest)
    open_study(again)
    again.add(round_record(again.manifest, 0, epsilon=1.0, release_epsilon=0.0, outcome=Outcome.FAILED))
    again.checkpoint()
    again.add(
        round_record(again.manifest, 0, epsilon=9.0, release_epsilon=exact, attempt=2, dropouts=("cedar",))
    )
    again.checkpoint()
    assert failed(bundle_of(again)) == {}
    assert "completeness" in unchecked(bundle_of(again))


def test_without_dp_accounting_epsilon_is_not_checkable_not_passed(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.ledger.privacy_checks.find_spec", lambda name: None)
    assert {"site-epsilon", "release-epsilon"} <= unchecked(good)
    assert audit(good).passed


def test_a_study_in_mode_plain_claims_nothing_and_its_release_is_marked() -> None:
    manifest = study(mode="plain", site_noise=0.0, release_noise=0.0, dropouts=0)
    ledger = Ledger(manifest)
    open_study(ledger)
    ledger.add(round_record(manifest, 0, epsilon=0.0, release_epsilon=0.0))
    members = finish(ledger, 1, [(0.0, 0.0)])
    bundle = bundle_of(ledger, members)
    assert failed(bundle) == {}
    assert {"mechanism", "site-epsilon", "release-epsilon", "budgets", "releases"} <= unchecked(bundle)


# --- keys and approvals -----------------------------------------------------------------------------------


def test_a_round_without_a_sites_approval_is_caught() -> None:
    def drop(_: int, entry: Entry) -> Entry | None:
        return None if isinstance(entry.body, Approval) and entry.body.site == "birch" else entry

    assert "birch took part without its approval" in failed(rewritten(drop))["approvals"]


def test_an_approval_of_another_manifest_is_caught() -> None:
    from common.config import format_study

    other = key_of("birch").sign(Purpose.APPROVAL, format_study(study(rounds=9))).hex()

    def swap(_: int, entry: Entry) -> Entry:
        if isinstance(entry.body, Approval) and entry.body.site == "birch":
            return replace(entry, body=replace(entry.body, signature=other))
        return entry

    assert "birch" in failed(rewritten(swap))["approvals"]


def test_taking_part_after_withdrawal_is_caught() -> None:
    ledger = Ledger(study())
    open_study(ledger)
    ledger.add(Approval(site="cedar", decision=Decision.WITHDRAW, policy="", signature=""), "cedar")
    values = epsilons(ledger.manifest, 1)
    ledger.add(round_record(ledger.manifest, 0, epsilon=values[0][0], release_epsilon=values[0][1]))
    ledger.checkpoint()
    assert set(failed(bundle_of(ledger))) == {"approvals"}


def with_key_entry(*bodies: Any, signers: tuple[str, ...]) -> Bundle:
    """One round, the key entries, one more round signed with the old keys."""
    ledger = Ledger(study())
    open_study(ledger)
    values = epsilons(ledger.manifest, 2)
    ledger.add(round_record(ledger.manifest, 0, epsilon=values[0][0], release_epsilon=values[0][1]))
    ledger.checkpoint()
    for body in bodies:
        ledger.add(body, *signers)
    ledger.add(round_record(ledger.manifest, 1, epsilon=values[1][0], release_epsilon=values[1][1]))
    ledger.checkpoint()
    return bundle_of(ledger)


def test_revoked_key_still_signing_is_caught() -> None:
    body = Revocation(
        holder="birch", use=KeyUse.MESSAGE, key=key_of("birch").public, reason=RevocationReason.LEFT
    )
    found = failed(with_key_entry(body, signers=(OPERATOR,)))
    assert (
        set(found) == {"contribution-signatures"}
        and "birch had no key that counted" in found["contribution-signatures"]
    )


def test_a_compromised_key_taints_what_it_signed_since_then_also_before_it_was_known() -> None:
    body = KeyCompromise(holder="birch", use=KeyUse.MESSAGE, key=key_of("birch").public, since_s=0)
    detail = failed(with_key_entry(body, signers=("birch",)))
    assert "round 0" in detail["contribution-signatures"] and "approvals" in detail


def test_a_revoked_witness_does_not_count_towards_the_quorum() -> None:
    bodies = [
        Revocation(
            holder=s, use=KeyUse.WITNESS, key=key_of(f"{s} witness").public, reason=RevocationReason.LEFT
        )
        for s in ("birch", "cedar")
    ]
    assert set(failed(with_key_entry(*bodies, signers=(OPERATOR,)))) == {"witness-quorum"}


def test_a_rotated_key_takes_over_and_the_old_one_stops_counting() -> None:
    new = key_of("birch, second")
    body = Rotation(holder="birch", use=KeyUse.MESSAGE, old=key_of("birch").public, new=new.public)
    assert "contribution-signatures" in failed(with_key_entry(body, signers=("birch",)))
    found = failed(with_key_entry(body, signers=(OPERATOR,)))
    assert "signature of birch" in found["entry-signatures"]


def test_an_entry_signed_with_a_key_nobody_enrolled_is_caught() -> None:
    ledger = Ledger(study())
    open_study(ledger)
    end = StudyEnd(reason=EndReason.STOPPED, number=0, adapter=adapter_name(0), release_epsilon=0.0)
    entry = ledger.entry(end)
    ledger.add_leaf(format_entry(sign_entry(entry, signer=OPERATOR, key=key_of("mallory"))))
    ledger.checkpoint()
    assert "a key that is not in the log" in failed(bundle_of(ledger))["entry-signatures"]


def test_an_entry_without_its_signature_is_caught() -> None:
    def unsigned(_: int, entry: Entry) -> Entry:
        return replace(entry, signatures=()) if isinstance(entry.body, StudyEnd) else entry

    assert "expected a signature of operator" in failed(rewritten(unsigned))["entry-signatures"]


@pytest.mark.parametrize("swap", [False, True])
def test_a_study_that_pins_another_key_than_enrolled_is_caught(swap: bool) -> None:
    ledger = Ledger(study())
    for site in SITES:
        key = key_of("mallory" if swap and site == "cedar" else site)
        body = Enrolment(
            site=site, message_key=key.public, witness_key=key_of(f"{site} witness").public,
            tls_fingerprint="", node_fingerprint="",
        )  # fmt: skip
        entry = sign_entry(Entry(ledger.time_s, "0" * 64, body), signer=OPERATOR, key=key_of(OPERATOR))
        ledger.add_leaf(format_entry(sign_entry(entry, signer=site, key=key)))
    open_study(ledger)
    bundle = bundle_of(ledger)
    assert set(failed(bundle)) == ({"enrolment"} if swap else set())
    assert ("enrolment" in unchecked(bundle)) is False


# --- releases ---------------------------------------------------------------------------------------------


def with_release(change: Callable[[dict[str, bytes]], None]) -> Bundle:
    ledger = Ledger(study())
    values = run_study(ledger, 2)
    members = finish(ledger, 2, values)
    change(members)
    return bundle_of(ledger, members)


def test_release_not_in_the_ledger_is_caught() -> None:
    def add(members: dict[str, bytes]) -> None:
        members |= {f"releases/2/{path}": data for path, data in release_files(1, study()).items()}

    assert set(failed(with_release(add))) == {"release-logged"}


def test_ledger_without_release_is_caught() -> None:
    assert set(failed(with_release(dict.clear))) == {"releases"}


def test_adapter_swapped_after_signing_is_caught() -> None:
    def swap(members: dict[str, bytes]) -> None:
        members[f"releases/1/{ADAPTER_NAME}"] = adapter_file(99)

    detail = failed(with_release(swap))["releases"]
    assert "is not the file that was signed" in detail and "holds another adapter" in detail


def test_extra_file_in_a_release_is_caught() -> None:
    def add(members: dict[str, bytes]) -> None:
        members["releases/1/loader.py"] = b"import os"

    assert "extra file loader.py" in failed(with_release(add))["releases"]


def test_a_changed_model_card_is_caught() -> None:
    def change(members: dict[str, bytes]) -> None:
        members["releases/1/model-card.md"] += b"No limits."

    assert "model-card.md is not the file that was signed" in failed(with_release(change))["releases"]


def test_a_release_with_a_proof_of_another_entry_or_without_one_is_caught() -> None:
    def drop(members: dict[str, bytes]) -> None:
        del members[f"releases/1/{PROOF_NAME}"]

    def swap(members: dict[str, bytes]) -> None:
        members[f"releases/1/{PROOF_NAME}"] = members[f"releases/1/{PROOF_NAME}"].replace(
            b"index 6", b"index 5"
        )

    assert "proof is missing" in failed(with_release(drop))["releases"]
    assert "offline proof" in failed(with_release(swap))["releases"]


def test_a_bundle_without_the_large_adapter_file_says_so() -> None:
    def drop(members: dict[str, bytes]) -> None:
        del members[f"releases/1/{ADAPTER_NAME}"]

    bundle = with_release(drop)
    assert failed(bundle) == {} and "releases" in unchecked(bundle)


def test_release_of_an_adapter_that_was_rolled_back_is_caught() -> None:
    ledger = Ledger(study())
    values = run_study(ledger, 2)
    decision = AdapterDecision(
        number=1, decision=Acceptance.ROLLBACK, adapter=adapter_name(1), rejected=adapter_name(2)
    )
    ledger.add(decision)
    members = finish(ledger, 2, values)
    found = failed(bundle_of(ledger, members))
    assert "rolled back" in found["releases"] and "did not make" in found["round-chain"]


# --- what sites and operator kept -------------------------------------------------------------------------


def kept(corrupt: str = "") -> Bundle:
    ledger = Ledger(study())
    values = run_study(ledger, 2)
    record = parse_entry(ledger.leaves[5]).body
    assert isinstance(record, RoundRecord)
    members = {f"retained/1-1/{s}.bin": retained(record, s)[1] for s in SITES}
    members |= {f"retained/1-1/{s}.key": retained(record, s)[0] for s in SITES}
    members["retained/1-1/aggregate.key"] = aggregate_key(record)
    if corrupt:
        members[corrupt] = bytes(len(members[corrupt]))
    return bundle_of(ledger, members | finish(ledger, 2, values))


def test_retained_contributions_open_their_commitments_and_add_up() -> None:
    bundle = kept()
    assert failed(bundle) == {} and "aggregate" not in unchecked(bundle)


@pytest.mark.parametrize("member", ["amber.bin", "amber.key", "aggregate.key"])
def test_a_retained_contribution_that_is_not_the_committed_one_is_caught(member: str) -> None:
    assert set(failed(kept(f"retained/1-1/{member}"))) == {"aggregate"}


def test_an_aggregate_that_the_contributions_do_not_add_up_to_is_caught() -> None:
    change = changed_round(1, lambda r: replace(r, aggregate=commit(aggregate_key(r), bytes(64))))
    bundle = rewritten(change)
    members = members_of(bundle)
    members |= {n: d for n, d in kept().members.items() if n.startswith("retained/")}
    assert (
        "do not add up"
        in failed(make_bundle(log=bundle.log, exported_s=0, software="x", members=members))["aggregate"]
    )


# --- single-field tampering -------------------------------------------------------------------------------


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from fields_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from fields_of(item, (*path, index))
    else:
        yield path, value


def tampered(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if not value:
        return "a"
    return value[:-1] + ("0" if value[-1] != "0" else "1")


def test_each_of_200_random_single_field_changes_is_caught(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dp-accounting, so that it is not the recomputed epsilon alone that catches them."""
    monkeypatch.setattr("common.ledger.privacy_checks.find_spec", lambda name: None)
    draw = random.Random(2026)
    lines = good.members["entries.jsonl"].splitlines()
    places = [(i, path) for i, line in enumerate(lines) for path, _ in fields_of(json.loads(line))]
    missed = []
    for index, path in draw.sample(places, 200):
        value = json.loads(lines[index])
        target = value
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = tampered(target[path[-1]])
        changed = [canonical_json(value) if i == index else line for i, line in enumerate(lines)]
        members = members_of(good)
        members["entries.jsonl"] = b"".join(line + b"\n" for line in changed)
        try:
            bundle = parse_bundle(
                pack(make_bundle(log=good.log, exported_s=0, software="x", members=members))
            )
            if not failed(bundle):
                missed.append((index, path))
        except FedRadError:
            pass
    assert missed == []


def test_the_sites_own_records_must_agree_with_the_ledger() -> None:
    """Records are what each site verified round by round; a ledger that says otherwise is caught."""
    ledger = Ledger(study())
    open_study(ledger)
    values = epsilons(ledger.manifest, 2)
    previous, lines = ledger.manifest.sha256, []
    for number, (site, release) in enumerate(values):
        entry = round_record(ledger.manifest, number, epsilon=site, release_epsilon=release)
        fields: dict[str, Any] = {
            name: getattr(ledger.manifest.privacy, name)
            for name in ("clip_norm", "site_noise", "release_noise")
        }
        record = site_record(ledger, entry, previous, fields, site, release)
        previous = record.sha256
        lines.append(canonical_json(signed_to_json(sign_record(key_of(OPERATOR), record))))
        ledger.add(replace(entry, record=record.sha256))
        ledger.checkpoint()
    members = {"records.jsonl": b"".join(line + b"\n" for line in lines)}
    assert failed(bundle_of(ledger, members)) == {}
    assert "site-records" not in unchecked(bundle_of(ledger, members))
    for bad in (lines[1:], lines[:1], [lines[0], lines[1].replace(b"amber", b"birch")]):
        assert set(failed(bundle_of(ledger, {"records.jsonl": b"\n".join(bad)}))) == {"site-records"}


def site_record(
    ledger: Ledger, entry: RoundRecord, previous: str, fields: dict[str, Any], site: float, release: float
) -> SiteRecord:
    known: dict[str, Any] = {
        "study": ledger.manifest.sha256, "round": entry.number, "attempt": entry.attempt,
        "previous": previous, "adapter_in": entry.adapter_in, "adapter_out": entry.adapter_out,
        "cohort": entry.cohort,
        "contributors": entry.cohort, "missing": {},
        "contributions": {s: sha256_hex(s.encode()) for s in entry.cohort}, "groups": ("projector",),
        "learning_rate": 0.001, "sampling_rate": entry.sampling_rate, "patients": entry.patients,
        "mode": "consortium", "site_epsilon": site, "release_epsilon": release, "time_unix_s": ledger.time_s,
        "site_share_sigma_units": entry.participations[0].sigma_units,
        "server_sigma_units": entry.server_sigma_units, "rolled_back_to": "",
        **fields,
    }  # fmt: skip
    names = SiteRecord.__dataclass_fields__
    return SiteRecord(**{name: known[name] for name in names})
