"""Answers by whole words; groups of patients; retrieval."""

from pathlib import Path

import numpy as np
import pytest

from client.evaluate.questions import (
    Question,
    question_template,
    read_questions,
    substring_accuracy,
    tabulate_answers,
    yes_or_no,
)
from client.evaluate.retrieval import retrieval_scores
from client.evaluate.scores import score
from client.evaluate.subgroups import age_band, group_studies, read_groups
from common.errors import EvaluationRefused, ScoresInvalid


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No.", False),
        ("Yes, there is.", True),
        ("Normal heart size.", None),
        ("There is nothing abnormal.", None),
        ("yes and no", None),
        ("", None),
    ],
)
def test_yes_and_no_are_whole_words(text: str, said: bool | None) -> None:
    assert yes_or_no(text) is said


def test_closed_and_open_answers_are_scored_apart() -> None:
    questions = [
        Question("s1", "Is there an effusion?", "No"),
        Question("s2", "Is there an effusion?", "no"),
        Question("s3", "What is seen?", "left pleural effusion"),
    ]
    answers = ["Normal heart size.", "No, there is none.", "effusion effusion effusion"]
    values = {name: float(v) for name, v in score(tabulate_answers(questions, answers)).items()}
    assert values["vqa_closed"] == 0.5
    assert values["vqa_closed_llava_med_substring"] == 1.0  # "Normal" has the letters of "no"
    assert values["vqa_open_recall"] == pytest.approx(1 / 3)  # a repeat counts once
    assert values["vqa_open_f1"] == pytest.approx(2 / 4)
    assert substring_accuracy(questions[0], "Normal heart size.")
    with pytest.raises(ScoresInvalid):
        tabulate_answers(questions, answers[:1])


def test_questions_and_templates_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"study": "s", "question": "Is there?", "answer": "no"}\n')
    assert read_questions(path) == [Question("s", "Is there?", "no")]
    path.write_text('{"study": "s"}\n')
    with pytest.raises(EvaluationRefused, match=r"q\.jsonl:1"):
        read_questions(path)
    with pytest.raises(EvaluationRefused, match="answers no questions"):
        question_template(tmp_path)
    (tmp_path / "fedrad.json").write_text('{"question": "<image> {question} A:"}')
    assert question_template(tmp_path) == "<image> {indication} A:"
    (tmp_path / "fedrad.json").write_text('{"question": "{question}"}')
    with pytest.raises(EvaluationRefused, match="one <image>"):
        question_template(tmp_path)


def test_small_groups_are_hidden_and_cannot_be_subtracted() -> None:
    studies = [f"s{at}" for at in range(40)]
    patients = [f"p{at}" for at in range(40)]
    table = {
        patient: {
            "sex": "female" if at < 25 else "male" if at < 37 else "other",
            "age": "40-59",
            "scanner": "A",
        }
        for at, patient in enumerate(patients)
    }
    groups = {(g.kind, g.name): g for g in group_studies(studies, patients, ["PA"] * 40, table, least=10)}
    assert groups[("sex", "other")].suppressed  # three patients
    assert groups[("sex", "male")].suppressed  # else 40 - 25 - 12 tells
    assert not groups[("sex", "female")].suppressed and groups[("sex", "female")].patients == 25
    assert {kind for kind, _ in groups} == {"sex"}  # one view, one scanner, one age band: nothing to compare
    # Many studies of few patients are still few patients.
    again = group_studies(studies, ["p"] * 20 + patients[20:], ["PA"] * 20 + ["AP"] * 20, {}, least=10)
    assert all(group.suppressed for group in again)


@pytest.mark.parametrize(
    ("age", "band"),
    [("0", "0-17"), ("17", "0-17"), ("18", "18-39"), ("063Y", "60-79"), ("99", "80+"), ("", "unknown"),
     ("-3", "unknown"), ("6M", "unknown"), ("400", "unknown")],
)  # fmt: skip
def test_ages_fall_into_bands(age: str, band: str) -> None:
    assert age_band(age) == band


def test_group_tables_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("patient,sex,age,scanner\np1,F,44,GE\np2,x,,\n")
    assert read_groups(path) == {
        "p1": {"sex": "female", "age": "40-59", "scanner": "GE"},
        "p2": {"sex": "unknown", "age": "unknown", "scanner": "unknown"},
    }
    for text, message in (
        ("name,sex\na,F\n", "expected the columns"),
        ("patient,sex,income\np,F,1\n", "expected the columns"),
        ("patient,sex\np,F\np,M\n", "line 3"),
    ):
        path.write_text(text)
        with pytest.raises(EvaluationRefused, match=message):
            read_groups(path)


REPORTS = ["Edema.", "Left effusion.", "Clear lungs.", "Pneumothorax.", "No acute disease."]


def test_retrieval_ranks_both_ways() -> None:
    perfect = np.full((5, 5), -3.0) + 2 * np.eye(5)
    found = retrieval_scores(perfect, REPORTS)
    assert found["image_to_report_r@1"] == found["report_to_image_r@1"] == 1.0
    assert found["image_to_report_p@1"] == 1.0 and "image_to_report_r@5" not in found
    # Habit alone: one report is always the likeliest. What is likely anyway is taken off, nothing is left.
    habit = np.tile([-1.0, -2.0, -3.0, -4.0, -5.0], (5, 1))
    assert retrieval_scores(habit, REPORTS)["image_to_report_r@1"] == 0.2
    # Two reports that state the same findings answer for one another in P@k, not in R@k.
    swapped = perfect[:, [0, 1, 4, 3, 2]]
    found = retrieval_scores(swapped, REPORTS)
    assert found["image_to_report_r@1"] == 0.6 and found["image_to_report_p@1"] == 1.0
    with pytest.raises(ScoresInvalid, match="square"):
        retrieval_scores(perfect[:2], REPORTS)
