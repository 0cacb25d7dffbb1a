"""An engine in a process of its own: the same answers, and what a killed process costs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from client.serving.engine import Result, Token
from client.serving.source import load_source
from client.serving.workers import WorkerEngine
from common.errors import BaseHashMismatch, EngineBusy, EngineStopped, EngineWorkerDied, PromptTooLong
from common.model import tiny
from tests.client.serving.models import PLAN, ask, decoder, talkative_source
from tests.client.serving.test_decoding import drain


def run(body: Callable[[WorkerEngine], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def whole() -> None:
        engine = WorkerEngine(talkative_source(), PLAN, **settings)
        await engine.start()
        try:
            await body(engine)
        finally:
            await engine.stop()

    asyncio.run(whole())


async def answered(engine: WorkerEngine, question: Any) -> tuple[list[Token], Result]:
    events = [event async for event in engine.submit(question)]
    result = events[-1]
    assert isinstance(result, Result)
    tokens = [event for event in events[:-1] if isinstance(event, Token)]
    assert len(tokens) == len(events) - 1
    return tokens, result


@pytest.fixture(scope="module")
def expected() -> dict[int, Result]:
    """The answers of the same release in this process, one at a time."""
    model, words, _ = load_source(talkative_source(), PLAN)
    engine = decoder(model, words, max_batch=1)
    for seed in range(12):
        engine.submit(seed, ask(seed))
    return drain(engine)


def test_answers_stream_and_equal_those_in_process(expected: dict[int, Result]) -> None:
    async def body(engine: WorkerEngine) -> None:
        answers = await asyncio.gather(*(answered(engine, ask(seed)) for seed in range(12)))
        for seed, (tokens, result) in enumerate(answers):
            assert result.token_ids == expected[seed].token_ids
            assert tuple(token.token_id for token in tokens) == result.token_ids
            assert result.text == expected[seed].text
            assert result.model == engine.model and result.model.release_epsilon == 7.5
        assert len({result.token_ids for _, result in answers}) > 6
        vector = await engine.image_vector(ask(1))
        assert vector.shape == (tiny.IMAGE_TOKENS, 128) and np.isfinite(vector).all()
        with pytest.raises(PromptTooLong):
            await answered(engine, ask(0, "cough " * 300))

    run(body)


@pytest.mark.slow
def test_a_killed_worker_costs_no_other_answer(expected: dict[int, Result]) -> None:
    async def body(engine: WorkerEngine) -> None:
        async def one(seed: int) -> tuple[list[Token], Result]:
            tokens: list[Token] = []
            async for event in engine.submit(ask(seed)):
                if isinstance(event, Result):
                    return tokens, event
                tokens.append(event)
                if seed == 3 and len(tokens) == 5 and engine.restarts == 0 and engine.pid:
                    os.kill(engine.pid, signal.SIGKILL)
            raise AssertionError("no result")

        for seed, (tokens, result) in enumerate(await asyncio.gather(*(one(seed) for seed in range(12)))):
            assert result.token_ids == expected[seed].token_ids
            assert tuple(token.token_id for token in tokens) == result.token_ids  # none twice, none lost
        assert engine.restarts == 1

    run(body)


@pytest.mark.slow
def test_a_question_that_kills_its_worker_twice_costs_only_itself(expected: dict[int, Result]) -> None:
    async def body(engine: WorkerEngine) -> None:
        async def one(seed: int) -> Result | EngineWorkerDied:
            long = (
                {"max_new_tokens": 180, "stop_loops": False} if seed == 2 else {}
            )  # not over before the kill
            try:
                async for event in engine.submit(ask(seed, **long)):
                    if isinstance(event, Result):
                        return event
                    if seed == 2 and engine.pid:
                        os.kill(engine.pid, signal.SIGKILL)
            except EngineWorkerDied as error:
                return error
            raise AssertionError("no result")

        answers = await asyncio.gather(*(one(seed) for seed in range(6)))
        for seed, answer in enumerate(answers):
            if seed == 2:
                assert isinstance(answer, EngineWorkerDied)
            else:
                assert isinstance(answer, Result) and answer.token_ids == expected[seed].token_ids
        assert engine.restarts == 2

    run(body)


@pytest.mark.slow
def test_a_reader_who_leaves_frees_the_engine(expected: dict[int, Result]) -> None:
    async def body(engine: WorkerEngine) -> None:
        stream = engine.submit(ask(0))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert engine.in_flight == 0 and engine.waiting == 0
        assert (await answered(engine, ask(1)))[1].token_ids == expected[1].token_ids

    run(body)


@pytest.mark.slow
def test_a_silent_worker_is_replaced(expected: dict[int, Result]) -> None:
    async def body(engine: WorkerEngine) -> None:
        assert engine.pid
        os.kill(engine.pid, signal.SIGSTOP)
        assert (await answered(engine, ask(1)))[1].token_ids == expected[1].token_ids
        assert engine.restarts == 1

    run(body, stall_s=2.0)


@pytest.mark.slow
def test_too_many_waiting_questions_are_refused() -> None:
    async def body(engine: WorkerEngine) -> None:
        waiting = [asyncio.create_task(answered(engine, ask(seed))) for seed in range(PLAN.max_batch + 2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="at most 2 waiting"):
            await answered(engine, ask(99))
        await asyncio.gather(*waiting)

    run(body, max_waiting=2)


@pytest.mark.slow
def test_a_stopped_engine_names_what_it_could_not_finish() -> None:
    async def whole() -> None:
        engine = WorkerEngine(talkative_source(), PLAN)
        with pytest.raises(EngineStopped):
            await answered(engine, ask(0))
        await engine.start()
        waiting = asyncio.create_task(answered(engine, ask(0)))
        await asyncio.sleep(0.01)
        await engine.stop()
        with pytest.raises(EngineStopped):
            await waiting
        with pytest.raises(EngineStopped):
            await answered(engine, ask(0))

    asyncio.run(whole())


def test_a_base_that_is_not_the_pinned_one_is_refused_by_name() -> None:
    async def whole() -> None:
        source = talkative_source()
        engine = WorkerEngine(type(source)(source.release, tiny.tiny_base_directory()), PLAN)
        with pytest.raises(BaseHashMismatch):
            await engine.start()
        assert engine.pid is None

    asyncio.run(whole())
