"""The federated evaluation's ε, recomputed by the auditor: every figure that was bent is caught."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from common.canonical import canonical_json, parse_canonical
from common.config import FederatedEvaluationSection, Study
from common.errors import EntryInvalid
from common.evaluation_counts import evaluation_plan_of
from common.ledger.audit import verify_bundle
from common.ledger.checkpoint import log_key
from common.ledger.entries import (
    OPERATOR,
    Evaluation,
    EvaluationSum,
    Incident,
    Outcome,
    Participation,
    format_entry,
    parse_entry,
)
from common.ledger.findings import Finding, Status
from common.ledger.statements import make_round
from common.privacy.mechanism import ServedRound, View
from tests.common.ledger.consortium import (
    CODE,
    LOCKFILE,
    ORIGIN,
    Ledger,
    adapter_name,
    bundle_of,
    finish,
    key_of,
    run_study,
    sign_participation,
    study,
)

ROUNDS = 2
CAPS = FederatedEvaluationSection(site_epsilon=8.0, release_epsilon=4.0)
Change = Callable[[Evaluation], Evaluation]


@functools.cache
def manifest() -> Study:
    return replace(study(rounds=ROUNDS, spare_rounds=1), federated_evaluation=CAPS)


def statement(site: str, *, attempt: int = 1, adapter: str = "", **changes: Any) -> Participation:
    """What a site signs of the evaluation."""
    plan = evaluation_plan_of(manifest())
    record = make_round(
        manifest(), number=ROUNDS, attempt=attempt, outcome=Outcome.FAILED,
        adapter_in=adapter or adapter_name(ROUNDS), cohort=manifest().site_ids, code=CODE, lockfile=LOCKFILE,
    )  # fmt: skip
    draft = Participation(
        site=site, commitment=f"{sum(site.encode()):064x}", sigma_units=plan.site_share_sigma_units,
        epsilon=plan.epsilon(View.SITE, [ServedRound(None)]), summed=True, signature="0" * 128,
    )  # fmt: skip
    return sign_participation(manifest(), record, replace(draft, **changes))


def evaluation(*parts: Participation, attempt: int = 1, adapter: str = "") -> Evaluation:
    """The entry that an honest server makes of statements, all sites' by default."""
    plan = evaluation_plan_of(manifest())
    stated = parts or tuple(statement(site, attempt=attempt) for site in manifest().site_ids)
    summed = sum(part.summed for part in stated)
    width = plan.server_topup_sigma_units(summed)
    served = [ServedRound(summed, width)]
    noise = math.sqrt(summed * stated[0].sigma_units ** 2 + width**2) * plan.quantum
    metrics = {
        "site_epsilon": max(plan.epsilon(View.SITE, served), *(part.epsilon for part in stated)),
        "release_epsilon": plan.epsilon(View.RELEASE, served),
        "noise": noise,
        "finding_f1": 0.8,
    }
    return Evaluation(
        number=ROUNDS - 1, adapter=adapter or adapter_name(ROUNDS), site="all", subgroup="all",
        studies="100-199", metrics={name: round(value, 6) for name, value in metrics.items()},
        sum=EvaluationSum(attempt=attempt, participations=stated, server_sigma_units=width),
    )  # fmt: skip


def audited(*bodies: Evaluation | Incident, asked: Study | None = None) -> Finding:
    """Audit a whole study with these entries after its last round; everything else in it is right."""
    ledger = Ledger(asked or manifest())
    values = run_study(ledger, ROUNDS)
    for body in bodies:
        ledger.add(body)
        ledger.checkpoint()
    bundle = bundle_of(ledger, finish(ledger, ROUNDS, values))
    report = verify_bundle(bundle, trusted=log_key(ORIGIN, bytes.fromhex(key_of(OPERATOR).public)))
    (found,) = [finding for finding in report.findings if finding.control == "evaluation-epsilon"]
    others = [f for f in report.findings if f.status is Status.FAIL and f is not found]
    assert others == []
    return found


def bent(**metrics: float) -> Change:
    return lambda body: replace(body, metrics={**body.metrics, **metrics})


def in_sum(**changes: Any) -> Change:
    return lambda body: replace(body, sum=replace(body.sum, **changes))


def stated_otherwise(site: str = "birch", *, signed: bool = False, **changes: Any) -> Change:
    """Another statement of one site, as the operator changed it or as the site itself signed it."""

    def change(body: Evaluation) -> Evaluation:
        assert body.sum is not None
        parts = tuple(
            (statement(site, **changes) if signed else replace(part, **changes))
            if part.site == site
            else part
            for part in body.sum.participations
        )
        return replace(body, sum=replace(body.sum, participations=parts))

    return change


def test_an_honest_evaluation_passes_with_its_figures() -> None:
    found = audited(evaluation())
    assert found.status is Status.PASS and "of 8" in found.detail and "3 sites" in found.detail
    assert found.evidence and found.evidence[0].startswith("entry ")


def test_a_site_that_dropped_out_leaves_an_evaluation_that_passes() -> None:
    parts = [statement("amber"), statement("birch"), statement("cedar", summed=False)]
    assert audited(evaluation(*parts)).status is Status.PASS
    assert audited(evaluation(*parts[:2])).status is Status.PASS


def test_an_attempt_that_failed_before_is_in_what_sites_state() -> None:
    twice = evaluation_plan_of(manifest()).epsilon(View.SITE, [ServedRound(None)] * 2)
    parts = [statement(site, attempt=2, epsilon=twice) for site in manifest().site_ids]
    assert audited(evaluation(*parts, attempt=2)).status is Status.PASS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bent(release_epsilon=1.0), "release epsilon stated as 1.0000"),
        (bent(release_epsilon=3.999), "release epsilon stated as 3.9990"),
        (bent(release_epsilon=4.5), "the manifest allows 4"),
        (bent(release_epsilon=0.0), "states a release epsilon of 0.0000"),
        (bent(site_epsilon=2.0), "below"),
        (bent(site_epsilon=9.0), "the manifest allows 8"),
        (bent(noise=0.5), "noise stated as 0.5000"),
        (in_sum(server_sigma_units=0.0), "the server added width 0"),
        (in_sum(server_sigma_units=5000.0), "the server added width 5000"),
        (in_sum(attempt=2), "did not sign"),
        (in_sum(attempt=900), "of at most"),
        (stated_otherwise(sigma_units=900.0), "birch did not sign"),
        (stated_otherwise(epsilon=0.1), "birch did not sign"),
        (stated_otherwise(site="amber", summed=False), "the server added width"),
        (stated_otherwise(signed=True, sigma_units=100.0), "birch added noise of width 100"),
        (stated_otherwise(signed=True, epsilon=0.5), "birch stated epsilon 0.5000"),
        (stated_otherwise(signed=True, adapter=adapter_name(0)), "birch did not sign"),
    ],
)
def test_a_figure_that_was_bent_fails(change: Change, said: str) -> None:
    found = audited(change(evaluation()))
    assert found.status is Status.FAIL and said in found.detail, found.detail


@pytest.mark.parametrize("times", [100.0, 1.01, 1 + 1e-6])
def test_a_width_of_the_server_that_fits_its_own_figures_but_not_the_plan_fails(times: float) -> None:
    plan, honest = evaluation_plan_of(manifest()), evaluation()
    assert honest.sum is not None
    width = honest.sum.server_sigma_units * times
    shares = 3 * plan.site_share_sigma_units**2
    release = plan.epsilon(View.RELEASE, [ServedRound(3, width)])
    figures = bent(
        release_epsilon=round(release, 6), noise=round(math.sqrt(shares + width**2) * plan.quantum, 6)
    )
    found = audited(in_sum(server_sigma_units=width)(figures(honest)))
    assert found.status is Status.FAIL and "the server added width" in found.detail, found.detail


def test_sites_that_all_signed_wider_noise_than_the_plan_fail() -> None:
    wide = 2 * evaluation_plan_of(manifest()).site_share_sigma_units
    parts = [statement(site, sigma_units=wide) for site in manifest().site_ids]
    found = audited(evaluation(*parts))
    assert found.status is Status.FAIL and "amber added noise of width" in found.detail


def test_a_sum_of_too_few_or_of_strangers_fails() -> None:
    few = audited(evaluation()).status, audited(in_sum(participations=(statement("amber"),))(evaluation()))
    assert few[0] is Status.PASS and "a sum of 1 sites" in few[1].detail
    stranger = replace(statement("amber"), site="dogwood")
    parts = (*(statement(site) for site in manifest().site_ids[:2]), stranger)
    assert "dogwood is not of this study" in audited(in_sum(participations=parts)(evaluation())).detail


def test_another_adapter_than_the_last_fails() -> None:
    parts = [statement(site, adapter=adapter_name(1)) for site in manifest().site_ids]
    found = audited(evaluation(*parts, adapter=adapter_name(1)))
    assert found.status is Status.FAIL and "did not end with" in found.detail


def test_an_evaluation_that_nobody_asked_for_fails() -> None:
    twice = audited(evaluation(), evaluation())
    assert twice.status is Status.FAIL and "does not ask for" in twice.detail
    unasked = audited(replace(evaluation(), sum=None), asked=study(rounds=ROUNDS))
    assert unasked.status is Status.FAIL
    assert audited(asked=study(rounds=ROUNDS)).status is Status.PASS


def test_an_entry_without_what_the_sites_signed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.ledger.evaluation_checks.find_spec", lambda name: None)
    found = audited(replace(evaluation(), sum=None))
    assert found.status is Status.FAIL and "what the sites signed" in found.detail


def test_what_is_not_on_record_is_not_checkable_and_never_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert audited().status is Status.NOT_CHECKABLE
    failed = audited(Incident(code="evaluation-failed", site="", number=ROUNDS, detail=""))
    assert failed.status is Status.NOT_CHECKABLE and "failed" in failed.detail
    monkeypatch.setattr("common.ledger.evaluation_checks.find_spec", lambda name: None)
    without = audited(evaluation())
    assert without.status is Status.NOT_CHECKABLE and "dp-accounting" in without.detail
    assert audited(bent(release_epsilon=9.0)(evaluation())).status is Status.FAIL


def test_an_entry_with_its_sum_has_one_encoding_and_without_it_the_old_one() -> None:
    ledger = Ledger(manifest())
    entry = ledger.entry(evaluation())
    assert parse_entry(format_entry(entry)) == entry
    plain = replace(entry, body=replace(evaluation(), sum=None))
    assert b'"sum"' not in format_entry(plain) and parse_entry(format_entry(plain)) == plain
    value = parse_canonical(format_entry(entry), max_bytes=1 << 20)
    for wrong in (
        None,
        {},
        {**value["body"]["sum"], "more": 1},
        {**value["body"]["sum"], "participations": []},
    ):
        changed = {**value, "body": {**value["body"], "sum": wrong}}
        with pytest.raises(EntryInvalid):
            parse_entry(canonical_json(changed))
    with pytest.raises(EntryInvalid, match="over all"):
        format_entry(replace(entry, body=replace(evaluation(), site="amber")))
