"""Answers equal plain `generate`, alone and in company; loops, cut ends and NaN are named."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from client.serving.decoding import BatchDecoder
from client.serving.engine import Ask, Finish, Options, Result, Token
from common.errors import PromptTooLong
from common.model import tiny
from tests.client.llava import LlavaSize, llava_with_lora
from tests.client.serving.models import VERSION, ask, decoder, picture, talkative_model

INDICATIONS = ("cough", "", "shortness of breath and fever", "chest pain", "follow up of a nodule")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return talkative_model()


def drain(engine: BatchDecoder) -> dict[int, Result]:
    results: dict[int, Result] = {}
    for _ in range(10_000):
        for number, event in engine.step():
            if isinstance(event, Result):
                results[number] = event
        if engine.idle:
            return results
    raise AssertionError("never idle")


def generated(model: Any, engine: BatchDecoder, question: Ask, many: int) -> list[int]:
    ids = torch.tensor([engine.prompt_ids(question)])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(question.pixels)[None],
            max_new_tokens=many,
            do_sample=False,
        )
    written = out[0, ids.shape[1] :].tolist()
    return written[:-1] if written[-1] == tiny.EOS else written


def test_greedy_answers_equal_plain_generate_token_for_token(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair)
    for seed, indication in enumerate(INDICATIONS):
        question = ask(seed, indication, stop_loops=False)
        engine.submit(0, question)
        got = drain(engine)[0]
        assert list(got.token_ids) == generated(pair[0], engine, question, 24)
        assert got.prompt_tokens == len(engine.prompt_ids(question))


def test_answers_equal_generate_with_grouped_heads_and_an_unmerged_adapter() -> None:
    torch.set_num_threads(1)
    model = llava_with_lora(LlavaSize(vocabulary=len(tiny.vocabulary()))).eval()
    words = tiny.tokenizer()
    model.get_base_model().config.image_token_id = tiny.IMAGE
    model.get_base_model().model.config.image_token_id = tiny.IMAGE
    engine = decoder(model, words)
    questions = [
        Ask(str(seed), picture(seed)[:, :28, :28].copy(), words_, Options(stop_loops=False))
        for seed, words_ in enumerate(INDICATIONS)
    ]
    for number, question in enumerate(questions):
        engine.submit(number, question)
    results = drain(engine)
    for number, question in enumerate(questions):
        assert list(results[number].token_ids) == generated(model, engine, question, 24)


def test_answers_do_not_depend_on_what_else_is_written(pair: tuple[Any, Any]) -> None:
    alone = decoder(*pair, max_batch=1)
    questions = [
        ask(seed, INDICATIONS[seed % 5], max_new_tokens=5 + 3 * seed, stop_loops=False) for seed in range(11)
    ]
    for number, question in enumerate(questions):
        alone.submit(number, question)
    expected = drain(alone)
    crowd = decoder(*pair, max_batch=4, prefix_bytes=0)
    results: dict[int, Result] = {}
    waiting = list(enumerate(questions))
    turn = 0
    while waiting or not crowd.idle:
        if waiting and turn % 3 == 0:  # join while others are running
            crowd.submit(*waiting.pop(0))
        for number, event in crowd.step():
            if isinstance(event, Result):
                results[number] = event
        assert crowd.running <= 4
        turn += 1
    assert results.keys() == expected.keys()
    for number, result in results.items():
        assert result.token_ids == expected[number].token_ids
        assert result.text == expected[number].text
        assert result.logprobs == pytest.approx(expected[number].logprobs, abs=1e-4)
    assert len({result.token_ids for result in results.values()}) > 5


def test_a_question_joins_a_running_batch_between_two_tokens(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair)
    engine.submit(0, ask(0, stop_loops=False))
    engine.step()
    engine.step()
    engine.submit(1, ask(1, stop_loops=False))
    numbers = [number for number, _ in engine.step()]
    assert sorted(set(numbers)) == [0, 1]


def test_a_second_question_about_a_picture_starts_behind_the_image(pair: tuple[Any, Any]) -> None:
    engine, fresh = decoder(*pair), decoder(*pair, prefix_bytes=0)
    for engine_, indication in ((engine, "cough"), (engine, "chest pain"), (fresh, "chest pain")):
        engine_.submit(0, ask(7, indication, stop_loops=False))
        result = drain(engine_)[0]
        if engine_ is engine:
            reused = result
    assert reused.cached_tokens >= tiny.IMAGE_TOKENS and result.cached_tokens == 0
    assert reused.token_ids == result.token_ids


def test_another_picture_never_uses_a_kept_prefix(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair)
    for seed in (1, 2):
        engine.submit(0, ask(seed, "cough", stop_loops=False))
        result = drain(engine)[0]
        assert result.cached_tokens == 0
        assert list(result.token_ids) == generated(pair[0], engine, ask(seed, "cough"), 24)


def test_a_resumed_answer_goes_on_where_it_stopped(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair)
    engine.submit(0, ask(3, "cough", stop_loops=False))
    whole = drain(engine)[0]
    half = whole.token_ids[:10]
    question = Ask(f"{3:064x}", picture(3), "cough", Options(stop_loops=False), written=half)
    engine.submit(1, question)
    tokens = []
    result = None
    while not engine.idle:
        for _, event in engine.step():
            if isinstance(event, Token):
                tokens.append(event.token_id)
            else:
                result = event
    assert result is not None and result.token_ids == whole.token_ids
    assert tuple(tokens) == whole.token_ids[10:]
    assert result.logprobs == pytest.approx(whole.logprobs, abs=1e-4)


def test_streamed_pieces_are_the_text(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair)
    engine.submit(0, ask(5, "cough", stop_loops=False))
    pieces, result = "", None
    while not engine.idle:
        for _, event in engine.step():
            if isinstance(event, Token):
                pieces += event.text
            else:
                result = event
    assert result is not None and result.finish is Finish.LENGTH
    assert result.cut and pieces.startswith(result.text)
    for sentence in result.sentences:
        assert result.text[sentence.start : sentence.end] == sentence.text
        assert 0 <= sentence.uncertainty <= 1 and sentence.first_token < sentence.end_token


def test_a_cancelled_answer_leaves_the_others_alone(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair, max_batch=3)
    for number in range(5):
        engine.submit(number, ask(number, stop_loops=False))
    for _ in range(5):
        engine.step()
    engine.cancel(0)
    engine.cancel(4)
    engine.cancel(99)
    results = drain(engine)
    assert sorted(results) == [1, 2, 3]
    for number, result in results.items():
        assert list(result.token_ids) == generated(pair[0], engine, ask(number), 24)


class Circle(torch.nn.Module):
    """A head that says the same three words for ever."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.turn, self.vocabulary = 0, vocabulary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.vocabulary)
        logits[..., 40 + self.turn % 3] = 9.0
        self.turn += 1
        return logits


def test_an_answer_that_runs_in_a_circle_is_stopped_and_cut() -> None:
    model, words = talkative_model()
    model.lm_head = Circle(len(tiny.vocabulary()))
    engine = decoder(model, words, default_tokens=60)
    engine.submit(0, ask(0))
    result = drain(engine)[0]
    assert result.finish is Finish.LOOP and result.cut
    assert len(result.token_ids) == 12 and len(result.text.split()) == 3


def test_no_repeat_ngram_forbids_every_repetition(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair, default_tokens=60)
    engine.submit(0, ask(2, no_repeat_ngram=2, stop_loops=False))
    ids = drain(engine)[0].token_ids
    pairs = list(pairwise(ids))
    assert len(pairs) == len(set(pairs))


def test_nan_ends_an_answer_by_name() -> None:
    model, words = talkative_model()
    model.lm_head.weight.data.fill_(float("nan"))
    engine = decoder(model, words)
    engine.submit(0, ask(0))
    result = drain(engine)[0]
    assert result.finish is Finish.NOT_FINITE and result.text == ""


def test_a_prompt_that_leaves_no_room_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(PromptTooLong, match="expected a prompt under 256 tokens"):
        decoder(*pair).submit(0, ask(0, "cough " * 300))


def test_every_result_names_the_model(pair: tuple[Any, Any]) -> None:
    engine = decoder(*pair)
    engine.submit(0, ask(0))
    assert drain(engine)[0].model is VERSION
