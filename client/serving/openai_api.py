"""OpenAI's chat completions over drafts: one image as a data: URL, words around it, streaming or whole.

What differs from OpenAI: decoding is greedy (`temperature` 0 or absent), the last user message counts, URLs
other than `data:` are refused (this server fetches nothing), a refusal of the guard is `message.refusal`, and
every answer carries `fedrad` with the decision, the model's version, round and release ε, and the sentences
with their doubt. Words such as `Indication: cough` or a question go into the base's own prompt.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from client.data.framing import Framing
from client.serving.engine import Finish, Token
from client.serving.guard import Decision
from client.serving.http import LimitedUser, error_value, options_of
from client.serving.picture import MAX_PICTURE_BYTES, read_picture
from client.serving.service import Draft, DraftingService, DraftRequest, draft_value
from common.errors import FedRadError, RequestRefused

router = APIRouter()

_DATA_URL = re.compile(r"data:(?:image/(?:png|jpeg)|application/dicom);base64,(.*)", re.DOTALL)
_INDICATION = re.compile(
    r"(?:indication|clinical history|reason for exam)\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL
)
_INDICATION_ZH = re.compile(r"(?:适应证|适应症|检查原因|临床病史)\s*[:：]\s*(.*)", re.DOTALL)
_FINISH = {Finish.LENGTH: "length", Finish.LOOP: "length"}
_KNOWN = {
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "n", "user", "seed", "logprobs", "top_logprobs", "store", "metadata",
}  # fmt: skip


@router.get("/v1/models")
def models(request: Request, user: LimitedUser) -> JSONResponse:
    """Name the one model that answers."""
    service: DraftingService = request.app.state.service
    entry = {"id": service.model.label, "object": "model", "created": 0, "owned_by": "fedrad"}
    return JSONResponse({"object": "list", "data": [entry]})


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, user: LimitedUser) -> Response:
    """Draft the findings of the image in the last user message."""
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise RequestRefused("expected a JSON body, got something else") from error
    service: DraftingService = request.app.state.service
    asked, wanted = await asyncio.to_thread(parse_chat, body, user, service.framing)
    if body.get("stream"):
        return StreamingResponse(_chunks(service, asked, wanted), media_type="text/event-stream")
    draft = await service.draft_whole(asked)
    message: dict[str, Any] = {"role": "assistant", "content": draft.text, "refusal": None}
    if draft.decision.refused:
        message |= {"content": None, "refusal": draft.decision.reason}
    choice = {"index": 0, "message": message, "finish_reason": _finish(draft)}
    if wanted["logprobs"]:
        choice["logprobs"] = {"content": _logprobs(draft)}
    value = _head(draft.id, draft.model.label, "chat.completion") | {
        "choices": [choice],
        "usage": _usage(draft),
        "fedrad": _extra(draft),
    }
    return JSONResponse(value)


def parse_chat(body: Any, user: str, framing: Framing) -> tuple[DraftRequest, dict[str, bool]]:
    """Turn a chat request into a draft request; raises RequestRefused or ImageUnreadable."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise RequestRefused("expected an object with messages, got something else")
    unknown = sorted(str(name)[:40] for name in body if name not in _KNOWN)
    if unknown:
        raise RequestRefused(f"expected known parameters, got {unknown[0]!r}")
    if body.get("temperature") not in (None, 0, 0.0) or body.get("n") not in (None, 1):
        raise RequestRefused("expected temperature 0 and n 1: drafts are greedy, got others")
    asked = [one for one in body["messages"] if isinstance(one, dict) and one.get("role") == "user"]
    if not asked:
        raise RequestRefused("expected a user message, got none")
    images, words = _parts(asked[-1].get("content"))
    if len(images) != 1:
        raise RequestRefused(f"expected one image in the last user message, got {len(images)}")
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise RequestRefused("expected max_tokens as a whole number")
    indication, question = split_words(words)
    request = DraftRequest(
        read_picture(images[0], framing), user, indication, question, options_of(max_new_tokens=limit)
    )
    stream = body.get("stream_options") or {}
    wanted = {
        "logprobs": bool(body.get("logprobs")),
        "usage": isinstance(stream, dict) and bool(stream.get("include_usage")),
    }
    return request, wanted


def split_words(words: str) -> tuple[str, str]:
    """Split a message into indication and question: what stands behind `Indication:` is the former."""
    for pattern in (_INDICATION, _INDICATION_ZH):
        found = pattern.search(words)
        if found:
            return found.group(1).strip(), words[: found.start()].strip()
    return "", words.strip()


def _parts(content: Any) -> tuple[list[bytes], str]:
    if isinstance(content, str):
        return [], content
    if not isinstance(content, list):
        raise RequestRefused("expected a message's content as text or parts, got something else")
    images, words = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(_decoded(part["image_url"].get("url")))
        else:
            raise RequestRefused("expected parts of type text or image_url, got another")
    return images, "\n".join(words)


def _decoded(url: Any) -> bytes:
    found = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise RequestRefused("expected the image as a data: URL (PNG, JPEG or DICOM), got another address")
    if len(found.group(1)) > MAX_PICTURE_BYTES * 4 // 3:
        raise RequestRefused("expected a smaller image")
    try:
        return base64.b64decode(found.group(1), validate=True)
    except binascii.Error as error:
        raise RequestRefused("expected base64 in the data: URL, got something else") from error


async def _chunks(
    service: DraftingService, asked: DraftRequest, wanted: dict[str, bool]
) -> AsyncIterator[str]:
    """Server-sent chunks as OpenAI's clients read them; the last one with a choice carries `fedrad`."""
    head = _head("pending", service.model.label, "chat.completion.chunk")
    try:
        yield _chunk(head, {"role": "assistant", "content": ""})
        async for event in service.draft(asked):
            if isinstance(event, Token):
                if event.text:
                    yield _chunk(head, {"content": event.text})
            elif isinstance(event, Decision):
                if event.refused:
                    yield _chunk(head, {"refusal": event.reason})
            else:
                head = head | {"model": event.model.label}
                yield _chunk(head, {}, finish=_finish(event), fedrad=_extra(event))
                if wanted["usage"]:
                    yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(event)})}\n\n"
    except FedRadError as error:
        yield f"data: {json.dumps(error_value(error))}\n\n"
    yield "data: [DONE]\n\n"


def _chunk(head: dict[str, Any], delta: dict[str, Any], *, finish: str | None = None, **more: Any) -> str:
    value = head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _head(identifier: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{identifier}", "object": kind, "created": int(time.time()), "model": model}


def _finish(draft: Draft) -> str:
    return _FINISH.get(draft.finish, "stop")


def _usage(draft: Draft) -> dict[str, int]:
    return {
        "prompt_tokens": draft.prompt_tokens,
        "completion_tokens": len(draft.token_ids),
        "total_tokens": draft.prompt_tokens + len(draft.token_ids),
    }


def _logprobs(draft: Draft) -> list[dict[str, Any]]:
    return [
        {
            "token": str(token),
            "logprob": value if value - value == 0 else None,
            "bytes": None,
            "top_logprobs": [],
        }
        for token, value in zip(draft.token_ids, draft.logprobs, strict=False)
    ]


def _extra(draft: Draft) -> dict[str, Any]:
    value = draft_value(draft)
    kept = (
        "id", "picture_sha256", "model", "decision", "sentences", "finish", "cut", "text", "seconds",
        "first_token_s", "access_record",
    )  # fmt: skip
    return {name: value[name] for name in kept}
