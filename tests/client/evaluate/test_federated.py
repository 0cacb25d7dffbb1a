"""Federated evaluation: bounded patients, noise from the plan, charged once, intervals that hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.budget import Budget, BudgetLimits
from client.evaluate.federated import (
    charge_evaluation,
    chosen_studies,
    evaluation_account,
    site_contribution,
)
from client.evaluate.scores import finding_counts, score, tabulate
from common.config import PrivacySection, Study
from common.errors import (
    BudgetExceeded,
    BudgetMismatch,
    RoundAlreadyServed,
    ScoresInvalid,
)
from common.evaluation_counts import (
    DIMENSION,
    Summary,
    evaluation_entry,
    evaluation_plan,
    patient_vector,
    summarise,
)
from common.ledger.entries import Entry, format_entry, parse_entry
from common.privacy.mechanism import PrivacyPlan, View, quantise, top_up
from common.privacy.sampling import Csprng
from tests.common.model.test_release import study

TEXTS = ["Edema.", "Left pleural effusion.", "Cardiomegaly. Edema.", "Clear lungs.", "Left base atelectasis."]
Site = dict[str, tuple[str, str]]  # study -> draft, reference; one study per patient


def made_study() -> Study:
    found = study()
    privacy: PrivacySection = replace(found.privacy, delta=1e-5)
    return replace(found, privacy=privacy, training=replace(found.training, patients=2000))


def plan(**changes: float) -> PrivacyPlan:
    made = evaluation_plan(made_study(), site_epsilon=2.0, release_epsilon=1.0, rounds=2)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def usual() -> PrivacyPlan:
    return plan()


def sites(patients: int, *, right: float, seed: int) -> list[Site]:
    """Four sites; a draft repeats its reference with probability `right`."""
    rng = np.random.default_rng(seed)
    made: list[Site] = [{} for _ in range(4)]
    for at in range(patients):
        reference = TEXTS[rng.integers(len(TEXTS))]
        draft = reference if rng.random() < right else TEXTS[rng.integers(len(TEXTS))]
        made[at % 4][f"s{at:05d}"] = (draft, reference)
    return made


def answer(site: Site, usual: PrivacyPlan, csprng: Csprng) -> NDArray[np.int32]:
    chosen = chosen_studies({f"p{study}": [study] for study in site}, usual, csprng)
    drafts, references = ({study: pair[side] for study, pair in site.items()} for side in (0, 1))
    return site_contribution(chosen, drafts, references, usual, csprng)


def evaluate(given: list[Site], usual: PrivacyPlan, *, seed: int) -> Summary:
    """Sites answer, the server adds and tops up: what agent and server do around the masks."""
    total = np.zeros(DIMENSION, np.int64)
    for number, site in enumerate(given):
        total += answer(site, usual, Csprng.for_test(1000 * seed + number))
    survivors = len(given)
    sigma = usual.server_topup_sigma_units(survivors)
    noised = top_up(total.astype(np.int32), usual, Csprng.for_test(77_000 + seed), survivors=survivors)
    return summarise(noised, usual, survivors=survivors, server_sigma_units=sigma, evaluations=1, seed=seed)


def exact(given: list[Site]) -> float:
    pairs = [pair for site in given for pair in site.values()]
    return float(score(tabulate([p[0] for p in pairs], [p[1] for p in pairs]))["finding_f1"])


def test_noised_figures_are_near_the_pooled_ones_and_say_how_near(usual: PrivacyPlan) -> None:
    given = sites(2000, right=0.8, seed=1)
    found = evaluate(given, usual, seed=1)
    truth = exact(given)
    assert found.finding_f1.low < truth < found.finding_f1.high
    assert abs(found.finding_f1.value - truth) < 0.05
    assert found.finding_f1.high - found.finding_f1.low < 0.15
    assert abs(found.patients - 2000) < 6 * found.noise
    assert {"Edema", "Cardiomegaly", "Pleural Effusion", "Atelectasis"} == set(found.findings)
    assert 0 < found.release_epsilon <= 1.0 and found.release_epsilon <= found.site_epsilon <= 2.0


@pytest.mark.slow
def test_intervals_hold_the_population_as_often_as_they_say(usual: PrivacyPlan) -> None:
    """Of 60 evaluations on fresh patients, at least nine in ten intervals hold the population's F1."""
    population = exact(sites(20_000, right=0.7, seed=999))
    held = 0
    for seed in range(60):
        found = evaluate(sites(400, right=0.7, seed=seed), usual, seed=seed).finding_f1
        held += found.low <= population <= found.high
    assert held >= 54


def test_a_patient_moves_the_sum_by_no_more_than_the_plan_says(usual: PrivacyPlan) -> None:
    everything = " ".join(f"{word}." for word in (
        "Widened mediastinum", "Cardiomegaly", "Opacity", "Nodule", "Edema", "Consolidation", "Pneumonia",
        "Atelectasis", "Pneumothorax", "Effusion", "Pleural thickening", "Fracture", "Pacemaker",
    ))  # fmt: skip
    for draft, reference in ((everything, everything), ("Clear lungs.", everything), ("Edema.", "Edema.")):
        vector = patient_vector([finding_counts(draft, reference)] * 3, clip_norm=usual.clip_norm)
        assert np.linalg.norm(vector) <= usual.clip_norm * (1 + 1e-12)
        others = 1000 * patient_vector([finding_counts("Edema.", "Edema.")], clip_norm=usual.clip_norm)
        moved = quantise(others + vector, usual) - quantise(others, usual).astype(np.int64)
        assert np.linalg.norm(moved) <= usual.sensitivity_units
    assert usual.site_limit_units > 100_000 * usual.units_per_clip  # a large site is never clamped


def test_a_patient_with_many_studies_counts_once(usual: PrivacyPlan) -> None:
    csprng = Csprng.for_test(3)
    chosen = chosen_studies({"p": [f"s{at}" for at in range(9)], "q": ["t"], "none": []}, usual, csprng)
    assert [len(studies) for studies in chosen.values()] == [usual.studies_per_patient, 1]
    one = finding_counts("Edema.", "Edema.")
    assert np.allclose(patient_vector([one] * 5, clip_norm=2.5), patient_vector([one], clip_norm=2.5))
    with pytest.raises(ScoresInvalid, match="values per study"):
        patient_vector([], clip_norm=2.5)


def test_an_answer_is_noise_and_counts_together(usual: PrivacyPlan) -> None:
    site = sites(200, right=0.8, seed=5)[0]
    answers = [answer(site, usual, Csprng.for_test(seed)) for seed in range(30)]
    spread = np.std([a.astype(np.float64) for a in answers], axis=0)
    assert 0.8 < spread.mean() / usual.site_share_sigma_units < 1.2
    assert np.array_equal(answers[0], answer(site, usual, Csprng.for_test(0)))
    nobody = site_contribution({}, {}, {}, usual, Csprng.for_test(1))  # a refusal would tell
    assert 0.5 < nobody.astype(np.float64).std() / usual.site_share_sigma_units < 1.6


def test_an_evaluation_is_charged_once_and_apart_from_training(usual: PrivacyPlan, tmp_path: Path) -> None:
    limits = BudgetLimits(epsilon=3.0, delta=1e-4)

    def charge(budget: Budget, *, number: int, request: str = "a" * 64, seed: bytes = b"s" * 32) -> bytes:
        return charge_evaluation(
            budget,
            "f" * 64,
            usual,
            number=number,
            attempt=0,
            request_sha256=request,
            data_sha256="d" * 64,
            seed=seed,
        ).seed

    with Budget.open(tmp_path / "budget.jsonl", limits) as budget:
        assert charge(budget, number=4) == b"s" * 32
        assert (
            charge(budget, number=4, seed=b"t" * 32) == b"s" * 32
        )  # repeated: the first seed, no new charge
        with pytest.raises(RoundAlreadyServed):
            charge(budget, number=4, request="b" * 64)
        assert budget.spent(evaluation_account("f" * 64)) < usual.epsilon(View.SITE)
        for number in range(5, 4 + usual.rounds + usual.spare_rounds):
            charge(budget, number=number)
        with pytest.raises(BudgetExceeded):
            charge(budget, number=20)
        with pytest.raises(BudgetMismatch):
            budget.commit(evaluation_account("f" * 64), replace(usual, rounds=3))
    with (
        Budget.open(tmp_path / "small.jsonl", BudgetLimits(epsilon=0.5, delta=1e-4)) as budget,
        pytest.raises(BudgetExceeded),
    ):
        charge(budget, number=1)


def test_the_ledgers_entry_holds_scores_intervals_and_no_count(usual: PrivacyPlan) -> None:
    found = evaluate(sites(400, right=0.9, seed=2), usual, seed=2)
    body = evaluation_entry(found, number=7, adapter="a" * 64)
    entry = Entry(1_700_000_000, "b" * 64, body)
    assert parse_entry(format_entry(entry)) == entry
    assert (body.site, body.subgroup, body.number) == ("all", "all", 7)
    assert body.studies in ("200-499", "100-199")
    assert {
        "finding_f1",
        "finding_f1.low",
        "finding_f1.high",
        "release_epsilon",
        "f1.edema",
    } <= body.metrics.keys()
    with pytest.raises(ScoresInvalid, match="expected 40 counts"):
        summarise(np.zeros(3, np.int64), usual, survivors=4, server_sigma_units=0.0, evaluations=1)


def test_few_patients_give_wide_intervals_and_no_single_finding(usual: PrivacyPlan) -> None:
    found = evaluate(sites(12, right=0.9, seed=3), usual, seed=3)
    assert found.findings == {}
    assert found.finding_f1.high - found.finding_f1.low > 0.3
