"""Scores from summed counts: known values, controls, groups of studies, intervals and the paired test."""

import numpy as np
import pytest

from client.evaluate.controls import flip_negations, negation_control, verdicts
from client.evaluate.intervals import bootstrap, compare, patient_sums
from client.evaluate.scores import METRICS, per_finding, score, tabulate
from common.errors import ScoresInvalid
from common.evaluation_counts import FINDINGS
from common.labeller import Status, label_report
from common.metrics import score_reports
from common.model import phantom_reports, phantoms
from tests.common.labeller_scores import REPORTS

TRUTHS = [
    "The heart is mildly enlarged. No effusion.",
    "The lungs are clear without focal opacity or effusion.",
    "There is a small left pleural effusion. No pneumothorax.",
]
DRAFTS = ["No effusion. The heart is mildly enlarged.", "Clear lungs without focal opacity.", "No effusion."]


def test_scores_agree_with_the_projects_other_count() -> None:
    values, other = score(tabulate(DRAFTS, TRUTHS)), score_reports(DRAFTS, TRUTHS, resamples=0)
    for name in ("finding_f1", "rouge_l", "exact_match"):
        assert values[name] == pytest.approx(other[name])


def test_bleu_is_sacrebleus() -> None:
    """The value is sacrebleu's on these words (tokenize none, smoothing none)."""
    assert float(score(tabulate(DRAFTS[:2], TRUTHS[:2]))["bleu_4"]) == pytest.approx(0.4562178306)
    assert score(tabulate(["a b"], ["c d"]))["bleu_4"] == 0.0


def test_findings_are_counted_apart_and_macro_takes_those_that_occur() -> None:
    tables = tabulate(["Edema. Pneumothorax.", "Edema."], ["Edema.", "Right pleural effusion. Edema."])
    found = per_finding(tables["finding_f1"])
    assert found["Edema"] == {"cases": 2, "right": 2, "wrong": 0, "missed": 0, "f1": 1.0}
    assert found["Pneumothorax"]["wrong"] == found["Pleural Effusion"]["missed"] == 1
    assert float(score(tables)["finding_f1_macro"]) == pytest.approx((1 + 0) / 2)
    assert float(score(tables)["finding_f1"]) == pytest.approx(4 / 6)
    assert set(found) == set(FINDINGS)


def test_statements_count_what_is_denied() -> None:
    tables = tabulate(["No effusion. Edema."], ["No effusion. No edema."])
    assert tables["statement_f1"].tolist() == [[1, 1, 1]]


def test_weights_count_studies_as_often_as_they_say() -> None:
    tables = tabulate(DRAFTS, TRUTHS)
    twice = tabulate([*DRAFTS, DRAFTS[1]], [*TRUTHS, TRUTHS[1]])
    weighted = score(tables, np.array([1.0, 2.0, 1.0]))
    assert {name: float(v) for name, v in weighted.items()} == pytest.approx(
        {name: float(v) for name, v in score(twice).items()}
    )


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ScoresInvalid, match="as many drafts"):
        tabulate(["a"], ["a", "b"])
    with pytest.raises(ScoresInvalid, match="as many drafts"):
        tabulate([], [])


def _phantom_texts(count: int) -> list[str]:
    rng = np.random.default_rng(2)
    prevalence = dict.fromkeys(phantoms.LABELS, 0.3)
    style = phantom_reports.Style()
    return [
        phantom_reports.write_report(phantoms.draw_findings(rng, prevalence), style, rng).findings
        for _ in range(count)
    ]


def test_a_flipped_negation_lowers_every_recommended_score_and_hardly_the_others() -> None:
    control = negation_control(_phantom_texts(300))
    for name, metric in METRICS.items():
        if metric.recommended:
            assert control[name]["same"] == 1.0 and control[name]["flipped"] < 0.2, name
    assert control["rouge_l"]["flipped"] > 0.8 and control["bleu_4"]["flipped"] > 0.5
    assert not METRICS["rouge_l"].recommended and not METRICS["bleu_4"].recommended
    noticed = verdicts(control, dict.fromkeys(METRICS, 0.5), dict.fromkeys(METRICS, 0.5))
    assert noticed["statement_f1"] == {"notices_negation": True, "notices_images": False}
    assert not noticed["rouge_l"]["notices_negation"]


@pytest.mark.realdata
@pytest.mark.skipif(not REPORTS.is_dir(), reason="needs ../shared/data/iu-xray")
def test_flipped_negations_of_real_reports_lower_every_recommended_score() -> None:
    import csv

    reports = []
    for table in sorted(REPORTS.glob("*/reports.csv")):
        with table.open() as handle:
            reports += [f"{row['findings']} {row['impression']}".strip() for row in csv.DictReader(handle)]
    control = negation_control(reports[::4])
    assert all(control[name]["flipped"] < 0.25 for name, metric in METRICS.items() if metric.recommended)
    assert control["rouge_l"]["flipped"] > 0.85


@pytest.mark.parametrize(
    "report",
    ["No pleural effusion.", "There is a pneumothorax.", "The heart is not enlarged.",
     "Left base atelectasis.", "Negative for pneumonia.", "The heart is enlarged."],
)  # fmt: skip
def test_a_flip_turns_the_statement_and_a_second_flip_turns_it_back(report: str) -> None:
    (before,) = set(label_report(report).items()) - {("No Finding", Status.POSITIVE)}
    for expected in (before[1] is Status.NEGATIVE, before[1] is not Status.NEGATIVE):
        report = flip_negations(report)
        after = label_report(report)[before[0]]
        assert (after is not Status.NEGATIVE) is expected, report


def test_intervals_hold_the_score_and_keep_patients_together() -> None:
    truths, drafts = ["Edema."] * 60, ["Edema."] * 30 + ["Clear lungs."] * 30
    alone = patient_sums(tabulate(drafts, truths), [f"p{at}" for at in range(60)])
    # The same studies, ten to a patient: fewer independent draws, a wider interval.
    together = patient_sums(tabulate(drafts, truths), [f"p{at // 10}" for at in range(60)])
    narrow, wide = (bootstrap(table, resamples=400, seed=1)["finding_f1"] for table in (alone, together))
    assert narrow[0] < 2 / 3 < narrow[1]
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
    assert bootstrap(alone, resamples=100, seed=3) == bootstrap(alone, resamples=100, seed=3)


def test_paired_test_finds_a_difference_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(4)
    truths = ["Edema."] * 80
    patients = [f"p{at}" for at in range(80)]

    def drafts(right: float) -> list[str]:
        return ["Edema." if rng.random() < right else "Clear lungs." for _ in truths]

    good, bad, like_bad = (patient_sums(tabulate(drafts(p), truths), patients) for p in (0.9, 0.5, 0.5))
    found = compare(good, bad, resamples=500, seed=0)["finding_f1"]
    assert found["p"] < 0.01 and found["low"] < found["difference"] < found["high"] and found["low"] > 0
    assert compare(bad, like_bad, resamples=500, seed=0)["finding_f1"]["p"] > 0.05
    same = compare(bad, bad, resamples=200, seed=0)["finding_f1"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)
    with pytest.raises(ScoresInvalid, match="same patients"):
        compare(good, patient_sums(tabulate(["a"], ["a"]), ["p"]), resamples=100, seed=0)


def test_p_values_of_equal_releases_are_uniform() -> None:
    """Under no difference the test is wrong as often as it says: 5 % at 0.05."""
    rng = np.random.default_rng(9)
    low = 0
    for trial in range(200):
        one, other = ({"m": np.stack([rng.random(30), np.ones(30)], 1)} for _ in range(2))
        low += compare(one, other, resamples=199, seed=trial)["m"]["p"] <= 0.05
    assert 2 <= low <= 20
