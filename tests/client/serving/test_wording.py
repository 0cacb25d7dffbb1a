"""Loops, sentences and the doubt about each, on text alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.serving.wording import (
    StreamedText,
    banned_tokens,
    cut_at_sentence,
    loop_start,
    sentence_spans,
    sentences_of,
)


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([1, 2, 3, 4] + [7, 8, 9] * 4, 7),
        ([5] * 12, 1),
        ([5] * 11, None),
        ([1, 2, 3] * 3, None),
        ([1] + [2, 3, 4, 5] * 3, 5),
        ([9, 4, 5] + [2, 3, 4, 5] * 3, 5),  # it began before: 4, 5 are the end of a turn
        (list(range(30)), None),
        ([], None),
    ],
)
def test_a_loop_is_three_equal_turns_over_twelve_tokens(ids: list[int], start: int | None) -> None:
    assert loop_start(ids) == start


@given(st.lists(st.integers(0, 50), unique=True, max_size=60))
def test_an_answer_without_repetition_is_no_loop(ids: list[int]) -> None:
    assert loop_start(ids) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4))
def test_banned_tokens_are_those_that_would_repeat_an_ngram(ids: list[int], size: int) -> None:
    banned = banned_tokens(ids, size)
    seen = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
    for token in range(4):
        assert (token in banned) == (
            (tuple([*ids, token])[-size:] in seen) if len(ids) + 1 >= size else False
        )


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Heart normal. Lungs clear.", ["Heart normal.", "Lungs clear."]),
        ("A 1.2 cm nodule. No effusion", ["A 1.2 cm nodule.", "No effusion"]),
        ("Seen by dr. smith today. Fine.", ["Seen by dr. smith today.", "Fine."]),
        ("心影正常。肺野清晰。", ["心影正常。", "肺野清晰。"]),
        ("1. Clear lungs. 2. No fracture.", ["1. Clear lungs.", "2. No fracture."]),
        ("", []),
        ("  Clear!  ", ["Clear!"]),
    ],
)
def test_sentences_are_found(text: str, sentences: list[str]) -> None:
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences


@given(st.text(alphabet="ab .!?。\n1", max_size=60))
def test_sentences_cover_all_words_in_order(text: str) -> None:
    spans = sentence_spans(text)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Heart normal. Lungs cl", "Heart normal."),
        ("Heart normal. Lungs clear.", "Heart normal. Lungs clear."),
        ("Heart nor", "Heart nor"),
        ("A nodule of 1.", "A nodule of 1."),
        ("心影正常。肺野", "心影正常。"),
    ],
)
def test_a_broken_last_sentence_is_cut(text: str, kept: str) -> None:
    assert cut_at_sentence(text) == kept


def test_each_sentence_has_its_own_tokens_and_doubt() -> None:
    words = ["heart", " normal", ".", " lungs", " clear", "."]
    stream = StreamedText(lambda ids: "".join(words[i] for i in ids))
    pieces = [stream.add(i) for i in range(6)]
    assert "".join(pieces) == stream.text == "Heart normal. Lungs clear."
    first, second = sentences_of(
        stream.text, ends=stream.ends, logprobs=[0.0, 0.0, 0.0, math.log(0.5), math.log(0.5), math.log(0.5)]
    )
    assert (first.first_token, first.end_token, second.first_token, second.end_token) == (0, 3, 3, 6)
    assert first.uncertainty == 0.0 and second.uncertainty == pytest.approx(0.5)
    assert second.least_probability == pytest.approx(0.5)


def test_half_a_character_is_held_back() -> None:
    data = "肺清。".encode()
    stream = StreamedText(lambda ids: data[: len(ids)].decode(errors="replace"))
    pieces = [stream.add(0) for _ in data]
    assert "".join(pieces) == "肺清。" and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
