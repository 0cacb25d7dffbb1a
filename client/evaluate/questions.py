"""Answers to questions about an image: closed (yes or no) and open, by whole words.

LLaVA-Med's own script looks for "yes" and "no" anywhere in the answer, so "normal heart" counts as "no", and
its open recall counts a repeated word as often as it is said. Here words are whole, an answer that says both
or neither is wrong, and repeats count once. `substring_accuracy` keeps the original, under its own name, for
comparison with published figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.evaluate.scores import Tables
from common.errors import EvaluationRefused, ScoresInvalid

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a study's image and its true answer."""

    study: str
    question: str
    answer: str

    @property
    def closed(self) -> bool:
        """Whether the true answer is yes or no."""
        return yes_or_no(self.answer) is not None and len(_words(self.answer)) <= 3


def yes_or_no(text: str) -> bool | None:
    """Read an answer as yes (True) or no (False) by whole words; None when it says both or neither."""
    words = set(_words(text))
    said = {answer for answer, cues in ((True, {"yes"}), (False, {"no"})) if words & cues}
    return said.pop() if len(said) == 1 else None


def tabulate_answers(questions: Sequence[Question], answers: Sequence[str]) -> Tables:
    """Count answers: `vqa_closed`, `vqa_open_recall`, `vqa_open_f1` and the substring figure, [N, 2] each."""
    if len(questions) != len(answers) or not questions:
        raise ScoresInvalid(f"expected as many answers as questions, got {len(answers)}/{len(questions)}")
    rows: dict[str, list[tuple[float, float]]] = {
        "vqa_closed": [], "vqa_open_recall": [], "vqa_open_f1": [], "vqa_closed_llava_med_substring": []
    }  # fmt: skip
    for question, answer in zip(questions, answers, strict=True):
        said, truth = set(_words(answer)), set(_words(question.answer))
        common = len(said & truth)
        closed, opened = float(question.closed), float(not question.closed)
        right = question.closed and yes_or_no(answer) is yes_or_no(question.answer)
        rows["vqa_closed"].append((float(right), closed))
        rows["vqa_closed_llava_med_substring"].append((float(substring_accuracy(question, answer)), closed))
        rows["vqa_open_recall"].append((opened * common / max(1, len(truth)), opened))
        rows["vqa_open_f1"].append((opened * 2 * common / max(1, len(said) + len(truth)), opened))
    return {name: np.array(values) for name, values in rows.items()}


def substring_accuracy(question: Question, answer: str) -> bool:
    """Closed accuracy as LLaVA-Med's script has it: the letters of the true answer occur in the answer."""
    return question.closed and question.answer.strip().lower() in answer.lower()


def question_template(base: Path) -> str:
    """Read how a base wants to be asked (`fedrad.json`, key `question`); raises EvaluationRefused."""
    try:
        template = json.loads((base / "fedrad.json").read_text())["question"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationRefused(
            f"{base / 'fedrad.json'}: expected the key question: this base answers no questions"
        ) from error
    if not isinstance(template, str) or template.count("<image>") != 1 or "{question}" not in template:
        raise EvaluationRefused(f"{base / 'fedrad.json'}: question: expected one <image> and {{question}}")
    return template.replace("{question}", "{indication}")


def read_questions(path: Path) -> list[Question]:
    """Read questions, one JSON object per line: study, question, answer; raises EvaluationRefused."""
    questions: list[Question] = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            value = json.loads(line)
            if not isinstance(value, dict) or value.keys() != {"study", "question", "answer"}:
                raise EvaluationRefused(f"{path}:{number}: expected study, question and answer")
            questions.append(Question(**{name: str(text) for name, text in value.items()}))
    except (OSError, ValueError) as error:
        raise EvaluationRefused(f"{path}: expected JSON lines, got {type(error).__name__}") from error
    return questions


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
