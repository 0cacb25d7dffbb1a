"""Scores: known values, the negation flip, intervals, refusals."""

import pytest

from common.errors import ScoresInvalid
from common.metrics import score_reports


def test_equal_reports_score_one() -> None:
    scores = score_reports(["Small left effusion."], ["small left  effusion."])
    assert (scores["finding_f1"], scores["rouge_l"], scores["exact_match"], scores["n"]) == (1.0, 1.0, 1.0, 1)


def test_micro_f1_counts_over_all_reports() -> None:
    said = ["Edema. Pneumothorax.", "Clear lungs."]
    truth = ["Edema.", "Right pleural effusion."]
    assert score_reports(said, truth, resamples=0)["finding_f1"] == pytest.approx(2 / 4)


def test_a_flipped_negation_keeps_rouge_high_and_costs_the_finding() -> None:
    truth = "Heart size is normal. There is no pleural effusion or pneumothorax. The lungs are clear."
    scores = score_reports([truth.replace("no pleural", "a pleural")], [truth], resamples=0)
    rouge = scores["rouge_l"]
    assert isinstance(rouge, float) and rouge > 0.9
    assert scores["finding_f1"] == 0.0


def test_all_normal_and_nothing_claimed_scores_zero_f1() -> None:
    assert score_reports(["Lungs are clear."], ["Clear lungs."], resamples=0)["finding_f1"] == 0.0


def test_interval_holds_the_score_and_repeats_with_its_seed() -> None:
    said = ["Edema."] * 30 + ["Clear lungs."] * 30
    truth = ["Edema."] * 50 + ["Clear lungs."] * 10
    first, again = (score_reports(said, truth, interval_seed=4, resamples=200) for _ in range(2))
    assert first == again
    interval = first["interval"]
    assert isinstance(interval, dict)
    for metric in ("finding_f1", "rouge_l", "exact_match"):
        low, high = interval[metric]
        value = first[metric]
        assert isinstance(value, float) and low < value < high


@pytest.mark.parametrize(("said", "truth"), [([], []), (["a"], ["a", "b"])])
def test_unpaired_reports_are_refused(said: list[str], truth: list[str]) -> None:
    with pytest.raises(ScoresInvalid, match="expected as many"):
        score_reports(said, truth)
