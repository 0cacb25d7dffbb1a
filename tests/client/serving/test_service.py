"""The service: refusals, what is logged, readers who leave, and a switch of releases under load."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from client.access import AccessLog, Action
from client.serving.engine import Finish, Token
from client.serving.guard import Decision
from client.serving.picture import read_picture
from client.serving.service import Active, Draft, DraftRequest
from common.errors import AccessLogInvalid, AdapterInvalid, CanaryFailed, DraftUnknown, GroundingUnavailable
from tests.client.serving.hosting import Hosted, hosted, png
from tests.client.serving.models import KEY, talkative_base, talkative_release, talkative_source


def request(seed: int, **more: Any) -> DraftRequest:
    return DraftRequest(read_picture(png(seed)), "alice", **more)


def logged(host: Hosted, record: str) -> dict[str, Any]:
    log = AccessLog(host.folder / "access")
    (found,) = [one for one in log.records() if one.id == record]
    value: dict[str, Any] = json.loads(log.read_payload(found))
    return value


async def events_of(host: Hosted, asked: DraftRequest) -> list[Any]:
    return [event async for event in host.service.draft(asked)]


def test_the_decision_comes_first_and_the_draft_last(host: Hosted) -> None:
    first, *tokens, draft = host.run(events_of(host, request(1, indication="Cough.")))
    assert isinstance(first, Decision) and not first.refused
    assert isinstance(draft, Draft) and all(isinstance(token, Token) for token in tokens)
    assert tuple(token.token_id for token in tokens) == draft.token_ids
    assert draft.picture_sha256 == read_picture(png(1)).sha256
    assert host.service.remembered(draft.id)[1] == draft
    payload = logged(host, draft.access_record)
    assert (payload["text"], payload["finish"]) == (draft.text, draft.finish.value)
    with pytest.raises(DraftUnknown):
        host.service.remembered("0" * 32)


def test_a_refusal_writes_no_token_and_is_logged(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    class WordsOnly:
        """The words' rules with the image let through."""

        def decide(self, picture: Any, features: Any, *, indication: str, question: str) -> Decision:
            from client.serving.guard_question import judge_question

            verdict = judge_question(question)
            code = "question-out-of-scope" if verdict.refused else ""
            return Decision(bool(code), code, verdict.reason, verdict.reason_zh, 0.5, 1.0)

    active = host.service._active
    monkeypatch.setattr(host.service, "_active", Active(active.engine, WordsOnly(), active.processor))
    first, draft = host.run(events_of(host, request(1, question="Write a poem.")))
    assert first.refused and draft.finish is Finish.REFUSED and draft.text == ""
    assert draft.model == host.service.model and draft.token_ids == ()
    assert logged(host, draft.access_record)["refused"] == "question-out-of-scope"
    assert host.run(events_of(host, request(1, question="Is the heart large?")))[-1].text


def test_a_reader_who_leaves_is_logged_with_what_was_written(host: Hosted) -> None:
    async def leave() -> int:
        stream: AsyncIterator[Any] = host.service.draft(request(2))
        async for event in stream:
            if isinstance(event, Token):
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return host.service.engine.in_flight

    before = len(list(AccessLog(host.folder / "access").records()))
    assert host.run(leave()) == 0
    records = list(AccessLog(host.folder / "access").records())
    assert len(records) == before + 1
    assert logged(host, records[-1].id)["left"] is True


def test_a_draft_can_be_had_from_another_thread(host: Hosted) -> None:
    draft = host.service.draft_blocking(request(3), timeout_s=300)
    assert draft.text and draft.model == host.service.model


@pytest.mark.slow
def test_a_switch_loses_no_draft_and_a_bad_release_is_not_taken(tmp_path: Path) -> None:
    with hosted(tmp_path) as host:
        before = host.service.model
        better = talkative_source(2)

        async def under_load() -> list[Draft]:
            drafts = [
                asyncio.create_task(host.service.draft_whole(request(i % 4, indication="Cough.")))
                for i in range(24)
            ]
            figures = await host.service.switch(better, user="alice")
            assert figures.answers == 8
            drafts += [asyncio.create_task(host.service.draft_whole(request(1, indication="Cough.")))]
            return list(await asyncio.gather(*drafts))

        *during, after = host.run(under_load(), 600)
        assert after.model.adapter_sha256 != before.adapter_sha256 == during[0].model.adapter_sha256
        assert host.service.model == after.model
        by_release: dict[tuple[str, str], set[str]] = {}
        for draft in [*during, after]:
            key = (draft.model.adapter_sha256, draft.picture_sha256)
            by_release.setdefault(key, set()).add(draft.text)
        assert all(len(texts) == 1 for texts in by_release.values())  # no answer mixes two releases
        actions = [record.action for record in AccessLog(tmp_path / "access").records()]
        assert Action.SWITCH_MODEL in actions

        for scale, refusal in ((float("nan"), AdapterInvalid), (1e30, CanaryFailed)):
            broken = talkative_release(3, scale=scale)
            source = type(better)(broken, talkative_base(), operator_key=KEY.public)
            with pytest.raises(refusal):
                host.run(host.service.switch(source, user="alice"), 600)
        assert host.service.model == after.model
        assert host.run(host.service.draft_whole(request(1, indication="Cough."))).text == after.text

        with pytest.raises(AccessLogInvalid):  # no record, no switch
            host.run(host.service.switch(talkative_source(1), user="not a user"), 600)
        assert host.service.model == after.model and not host.service._leaving

        back = talkative_source(1)
        host.run(host.service.switch(back, user="alice", must_pass=False), 600)
        assert host.service.model.adapter_sha256 == before.adapter_sha256


@pytest.mark.slow
def test_a_draft_between_guard_and_engine_outlives_a_switch(tmp_path: Path) -> None:
    class SlowGuard:
        """A guard that decides when it is told to: until then the engine has no question of this draft."""

        def __init__(self) -> None:
            self.asked, self.go = threading.Event(), threading.Event()

        def decide(self, picture: Any, features: Any, *, indication: str, question: str) -> Decision:
            self.asked.set()
            self.go.wait(300)
            return Decision(False, "", "", "", 0.5, 1.0)

    guard = SlowGuard()
    with hosted(tmp_path, guard=guard) as host:
        before = host.service.model
        drafting = asyncio.run_coroutine_threadsafe(host.service.draft_whole(request(1)), host.loop)
        assert guard.asked.wait(120)
        host.run(host.service.switch(talkative_source(2), user="alice"), 600)
        after = host.service.model
        guard.go.set()
        draft = drafting.result(300)
        assert draft.text and draft.model == before != after
        assert host.run(host.service.draft_whole(request(1))).model == after

        async def retired() -> None:
            await asyncio.gather(*host.service._leaving)

        host.run(retired())
        with pytest.raises(GroundingUnavailable, match="draft it again"):
            host.run(host.service.attention(draft.id))
