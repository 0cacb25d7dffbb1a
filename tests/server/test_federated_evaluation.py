"""The final adapter evaluated across sites: masked, noised, charged, logged; and every way it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.budget import BudgetLimits, read_summary
from client.evaluate.federated import evaluation_account
from common.config import parse_study_toml
from common.errors import ManifestInvalid
from common.evaluation_counts import DIMENSION, evaluation_plan_of
from common.ledger.audit import verify_bundle
from common.ledger.entries import Evaluation, parse_entry
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of
from common.model.lora import vector_sha256
from common.protocol import Header, Stage, seal
from server.bundles import export_run
from tests.simulator import SITES, Consortium, build, refusal_of, split_message, study_text

SECTION = "site_epsilon = 40\nrelease_epsilon = 30"
Make = Callable[..., Consortium]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Consortium] = []

    def one(**settings: Any) -> Consortium:
        settings = {"mode": "consortium", "rounds": 1, "evaluation": SECTION} | settings
        made.append(build(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield one
    for world in made:
        world.close()


def entries(world: Consortium) -> list[Any]:
    lines = (world.server / "ledger" / "entries.jsonl").read_bytes().splitlines()
    return [parse_entry(line).body for line in lines]


def events(world: Consortium, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (world.server / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def assert_audit_recomputes(world: Consortium) -> None:
    """The auditor finds nothing wrong in what really ran, and the evaluation's ε are what it says."""
    bundle = export_run(world.server, exported_s=int(world.clock()), software="fedrad 0.1.0")
    report = verify_bundle(bundle, trusted=trust_of(world.study).log)
    assert [finding for finding in report.findings if finding.status is Status.FAIL] == []
    (found,) = [finding for finding in report.findings if finding.control == "evaluation-epsilon"]
    assert found.status is Status.PASS, found.detail


def test_the_final_adapter_is_evaluated_once_and_stands_in_the_ledger(make: Make) -> None:
    world = make()
    state = world.run()
    (entry,) = [body for body in entries(world) if isinstance(body, Evaluation)]
    assert (entry.adapter, entry.number, entry.site) == (vector_sha256(state.adapter), 0, "all")
    plan = evaluation_plan_of(world.study)
    assert 0 < entry.metrics["release_epsilon"] <= 30 and 0 < entry.metrics["site_epsilon"] <= 40
    assert entry.metrics["finding_f1.low"] <= entry.metrics["finding_f1"] <= entry.metrics["finding_f1.high"]
    assert plan.dimension == DIMENSION
    world.run()
    assert sum(isinstance(body, Evaluation) for body in entries(world)) == 1
    assert_audit_recomputes(world)


def test_the_counts_that_leave_a_site_are_masked_and_forty(make: Make) -> None:
    world = make()
    sizes: dict[tuple[str, int], int] = {}

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if header.stage is Stage.CONTRIBUTE:
            sizes[of, header.round] = len(reply)
        return reply

    world.after = after
    world.run()
    assert all(sizes[site, 1] < 4 * DIMENSION + 4096 < sizes[site, 0] for site in SITES)


def test_the_sum_is_what_the_sites_count_but_for_noise(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patients are the last count: two per site are held out."""
    import server.evaluation

    world = make()
    seen: list[float] = []
    real = server.evaluation.summarise

    def spy(total: Any, plan: Any, **kwargs: Any) -> Any:
        summary = real(total, plan, **kwargs)
        seen.append(float(np.asarray(total)[-1] * plan.quantum))
        assert abs(seen[-1] - 8.0) < 8 * summary.noise
        return summary

    monkeypatch.setattr(server.evaluation, "summarise", spy)
    world.run()
    assert len(seen) == 1


def test_every_site_charges_the_evaluation_beside_training_and_gives_the_rest_back(make: Make) -> None:
    world = make()
    world.run()
    for site in SITES:
        home = world.agent(site).home
        limits = BudgetLimits(epsilon=home.epsilon, delta=home.delta)
        studies = {row.study: row for row in read_summary(home.budget_path, limits).studies}
        evaluation = studies[evaluation_account(world.study.sha256)]
        assert evaluation.charges == 1 and not evaluation.open
        assert 0 < evaluation.epsilon_spent <= 40 and studies[world.study.sha256].charges == 1


def test_a_site_that_vanishes_is_left_out_and_the_evaluation_stands(make: Make) -> None:
    world = make()
    world.before = lambda to, header, request: (
        None if to == "beta" and header.round == 1 and header.stage is Stage.CONTRIBUTE else request
    )
    world.run()
    (entry,) = [body for body in entries(world) if isinstance(body, Evaluation)]
    assert entry.sum is not None and sum(part.summed for part in entry.sum.participations) == len(SITES) - 1
    assert_audit_recomputes(world)


def test_an_evaluation_that_fails_is_named_and_the_study_ends_without_figures(make: Make) -> None:
    world = make(max_attempts=2)
    world.before = lambda to, header, request: (
        None
        if to in ("beta", "gamma") and header.round == 1 and header.stage is Stage.CONTRIBUTE
        else request
    )
    world.run()
    kinds = [type(body).__name__ for body in entries(world)]
    assert "Evaluation" not in kinds and kinds[-2:] == ["Incident", "StudyEnd"]
    assert [event["attempt"] for event in events(world, "evaluation-failed")] == [1, 2]


def test_a_failed_attempt_is_in_the_site_epsilon_that_the_ledger_states(make: Make) -> None:
    world = make(max_attempts=2)
    world.before = lambda to, header, request: (
        None
        if to in SITES[1:3] and header.round == 1 and header.stage is Stage.CONTRIBUTE and header.attempt == 1
        else request
    )
    world.run()
    (entry,) = [body for body in entries(world) if isinstance(body, Evaluation)]
    home = world.agent("alpha").home
    limits = BudgetLimits(epsilon=home.epsilon, delta=home.delta)
    rows = {row.study: row for row in read_summary(home.budget_path, limits).studies}
    spent = rows[evaluation_account(world.study.sha256)]
    assert spent.charges == 2
    assert entry.metrics["site_epsilon"] == pytest.approx(spent.epsilon_spent, abs=1e-5)
    assert entry.sum is not None and entry.sum.attempt == 2
    assert_audit_recomputes(world)


def test_counts_that_no_honest_site_has_are_an_incident_not_a_figure(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.evaluate.contribution as contribution

    world = make(max_attempts=1)
    real = contribution.evaluation_units
    monkeypatch.setattr(contribution, "evaluation_units", lambda *a, **k: real(*a, **k) + np.uint32(1 << 24))
    world.run()
    kinds = [type(body).__name__ for body in entries(world)]
    assert "Evaluation" not in kinds and "Incident" in kinds


def test_a_killed_server_takes_the_evaluation_up_and_sites_charge_once(make: Make) -> None:
    world = make()

    class Killed(BaseException):
        pass

    def before(to: str, header: Header, request: bytes) -> bytes:
        if header.round == 1 and header.stage is Stage.UNMASK:
            raise Killed
        return request

    world.before = before
    with pytest.raises(Killed):
        world.run()
    world.before = lambda to, header, request: request
    world.run()
    assert sum(isinstance(body, Evaluation) for body in entries(world)) == 1
    for site in SITES:
        assert world.agent(site).home.budget_path.read_text().count('"kind":"charge"') == 2


def test_a_study_without_the_section_refuses_an_evaluation(make: Make) -> None:
    world = make(evaluation="")
    kept: dict[str, bytes] = {}

    def before(to: str, header: Header, request: bytes) -> bytes:
        if to == "alpha" and header.stage is Stage.CONTRIBUTE:
            kept["request"] = request
        return request

    world.before = before
    world.run()
    header, _, body = split_message(kept["request"])
    forged = seal(world.operator, replace(header, round=1), body)
    assert refusal_of(world.agent("alpha").handle(Stage.CONTRIBUTE, forged)) == "RoundLimitReached"


@pytest.mark.parametrize("mode", ["plain", "local"])
def test_an_evaluation_without_masks_is_no_manifest(mode: str) -> None:
    with pytest.raises(ManifestInvalid, match="federated_evaluation"):
        parse_study_toml(study_text(mode=mode, evaluation=SECTION))
