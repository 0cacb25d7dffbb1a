"""The server from outside: OpenAI's client, reports, streams, users, limits, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from client.access import AccessLog
from client.serving.engine import Result
from client.serving.picture import prepared, read_picture
from client.serving.source import load_source
from common.model.images import read_processor
from tests.client.serving.hosting import Hosted, png
from tests.client.serving.models import PLAN, decoder, talkative_base, talkative_source
from tests.client.serving.test_decoding import drain


@pytest.fixture(scope="module")
def expected() -> dict[int, Result]:
    """The same release's answers to the same files, in this process."""
    from client.serving.engine import Ask

    model, words, _ = load_source(talkative_source(), PLAN)
    engine = decoder(model, words)
    processor = read_processor(talkative_base())
    for seed in range(4):
        pixels = prepared(read_picture(png(seed)), processor)
        engine.submit(seed, Ask(str(seed), pixels, "Cough."))
    return drain(engine)


def chat(seed: int, words: str = "Describe the findings. Indication: Cough.") -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(png(seed)).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": words}, image]}]


def ask(host: Hosted, **body: Any) -> httpx.Response:
    return httpx.post(f"{host.url}/v1/chat/completions", headers=host.headers, json=body, timeout=300)


def test_openais_client_works_whole_and_streaming(host: Hosted, expected: dict[int, Result]) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{host.url}/v1", api_key=host.token, max_retries=0) as client:
        (listed,) = client.models.list().data
        assert listed.id == host.service.model.label
        whole = client.chat.completions.create(model="fedrad", messages=chat(1), logprobs=True)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == expected[1].text
        assert whole.usage is not None and whole.usage.completion_tokens == len(expected[1].token_ids)
        assert whole.model == host.service.model.label
        extra = whole.model_dump()["fedrad"]
        assert extra["model"]["round"] == 2 and extra["model"]["release_epsilon"] == 7.5
        pieces = []
        last: dict[str, Any] = {}
        for chunk in client.chat.completions.create(model="fedrad", messages=chat(2), stream=True):  # type: ignore[arg-type]
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
            last = chunk.model_dump()
        assert len(pieces) > 3 and "".join(pieces).startswith(expected[2].text)
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["fedrad"]["text"] == expected[2].text


def test_a_report_is_drafted_and_logged(host: Hosted, expected: dict[int, Result]) -> None:
    answer = httpx.post(
        f"{host.url}/v1/report?indication=Cough.", headers=host.headers, content=png(3), timeout=300
    )
    draft = answer.json()
    assert answer.status_code == 200 and draft["text"] == expected[3].text
    assert draft["model"]["label"] == host.service.model.label and draft["sentences"]
    form = httpx.post(
        f"{host.url}/v1/report",
        headers=host.headers,
        files={"image": ("x.png", png(3), "image/png")},
        data={"indication": "Cough."},
        timeout=300,
    )
    assert form.json()["text"] == expected[3].text and form.json()["id"] != draft["id"]
    records = {record.id: record for record in AccessLog(host.folder / "access").records()}
    record = records[draft["access_record"]]
    assert (record.user, record.model_version) == ("alice", 0)
    payload = json.loads(AccessLog(host.folder / "access").read_payload(record))
    assert payload["text"] == draft["text"] and payload["draft"] == draft["id"]


def test_a_report_streams_decision_tokens_and_draft(host: Hosted, expected: dict[int, Result]) -> None:
    events = []
    with httpx.stream(
        "POST",
        f"{host.url}/v1/report?indication=Cough.&stream=true",
        headers=host.headers,
        content=png(0),
        timeout=300,
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                events.append([line[7:], None])
            elif line.startswith("data: "):
                events[-1][1] = json.loads(line[6:])
    names = [name for name, _ in events]
    assert names[0] == "decision" and names[-1] == "draft" and set(names[1:-1]) == {"token"}
    assert events[-1][1]["text"] == expected[0].text
    assert host.run(_attention_shape(host, events[-1][1]["id"])) == (len(expected[0].token_ids), 16)


async def _attention_shape(host: Hosted, draft: str) -> tuple[int, ...]:
    return (await host.service.attention(draft)).shape


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"temperature": 0.7}, 400, "RequestRefused"),
        ({"n": 2}, 400, "RequestRefused"),
        ({"tools": []}, 400, "RequestRefused"),
        ({"messages": []}, 400, "RequestRefused"),
        ({"messages": [{"role": "user", "content": "Describe."}]}, 400, "RequestRefused"),
        ({"max_tokens": 1_000_000}, 400, "RequestRefused"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://example.org/x.png"}}]}]},
            400, "RequestRefused",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
            422, "ImageUnreadable",
        ),
        ({"messages": chat(0, "Indication: " + "cough " * 400)}, 422, "PromptTooLong"),
    ],
)  # fmt: skip
def test_a_chat_that_asks_for_something_else_is_refused(
    host: Hosted, change: dict[str, Any], status: int, code: str
) -> None:
    answer = ask(host, **({"model": "fedrad", "messages": chat(0)} | change))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "cough" not in answer.text


def test_nobody_without_a_valid_token_gets_in(host: Hosted) -> None:
    for headers in ({}, {"Authorization": "Bearer frt_wrong"}, {"Authorization": "Basic eDp5"}):
        for method, path in (("POST", "/v1/report"), ("GET", "/metrics"), ("GET", "/v1/models")):
            answer = httpx.request(method, host.url + path, headers=headers, content=b"")
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    token = host.tokens.create("bob")
    good = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{host.url}/v1/models", headers=good).status_code == 200
    assert httpx.post(f"{host.url}/v1/admin/use/1", headers=good).status_code == 401
    host.tokens.revoke("bob")
    assert httpx.get(f"{host.url}/v1/models", headers=good).status_code == 401
    assert token not in host.tokens.path.read_text()
    assert host.tokens.path.stat().st_mode & 0o077 == 0


def test_other_hosts_origins_and_large_bodies_are_refused(host: Hosted) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        answer = httpx.post(f"{host.url}/v1/report", headers=host.headers | headers, content=png(0))
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "RequestRefused"
    assert httpx.get(f"{host.url}/health", headers={"Origin": host.url}).status_code == 200

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield b"x" * 1000

    for content in (b"x" * 200_001, endless()):
        answer = httpx.post(f"{host.url}/v1/report", headers=host.headers, content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "BodyTooLarge"


def test_health_and_metrics_name_the_model(host: Hosted) -> None:
    health = httpx.get(f"{host.url}/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    assert health.json()["model"]["release_epsilon"] == 7.5 and not health.json()["guarded"]
    assert "default-src 'self'" in health.headers["content-security-policy"]
    text = httpx.get(f"{host.url}/metrics", headers=host.headers).text
    assert 'fedrad_http_requests_total{route="/health",status="200"}' in text
    assert "fedrad_tokens_total" in text and "alice" not in text
