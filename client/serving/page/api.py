"""The page's API: JSON, raw pixels and one event stream; every route needs a user."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from client.serving.http import CurrentUser as User
from client.serving.http import LimitedUser
from client.serving.page.reading import ReadingRoom
from client.serving.worklist import MAX_REASON_CHARS, MAX_TEXT_CHARS
from common.errors import FedRadError

_PRIVATE = {"Cache-Control": "no-store"}


class DecisionBody(BaseModel):
    """What a reader decided; `seconds` is how long the case was open."""

    model_config = ConfigDict(extra="forbid")

    outcome: str = Field(pattern="^(accept|reject)$")
    text: str = Field(default="", max_length=MAX_TEXT_CHARS)
    reason: str = Field(default="", max_length=MAX_REASON_CHARS)
    seconds: float = Field(default=0, ge=0, le=1e7)


def api_router(room: ReadingRoom) -> APIRouter:
    """Build the routes over a reading room."""
    router = APIRouter(prefix="/page/api")

    @router.get("/about")
    def about(user: User) -> dict[str, Any]:
        model = room.service.model
        return {
            "user": user,
            "model": {**asdict(model), "label": model.label},
            "guarded": room.service.guarded,
        }

    @router.get("/cases")
    def cases(user: User, response: Response) -> dict[str, Any]:
        response.headers.update(_PRIVATE)
        return {"cases": room.overview()}

    @router.post("/cases", status_code=201)
    async def add(
        user: User, request: Request, indication: Annotated[str, Query(max_length=1000)] = ""
    ) -> dict[str, Any]:
        case = await room.add(await request.body(), indication=indication)
        return room.case_value(case.id)

    @router.post("/examples", status_code=201)
    async def examples(user: User, count: Annotated[int, Query(ge=1, le=50)] = 8) -> dict[str, Any]:
        return {"added": len(await room.add_examples(count))}

    @router.get("/cases/{id}")
    def case(user: User, id: str, response: Response) -> dict[str, Any]:
        response.headers.update(_PRIVATE)
        return room.case_value(id)

    @router.get("/cases/{id}/pixels")
    async def pixels(user: User, id: str) -> Response:
        values = await room.pixels(id)
        headers = {**_PRIVATE, "X-Rows": str(values.shape[0]), "X-Columns": str(values.shape[1])}
        content = values.astype("<u2").tobytes()
        return Response(content, headers=headers, media_type="application/octet-stream")

    @router.post("/cases/{id}/draft")
    async def draft(user: LimitedUser, id: str) -> StreamingResponse:
        events = room.write_draft(id, user=user)
        first = await anext(events)  # an error before the first event is an ordinary answer, not a stream
        headers = {**_PRIVATE, "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(first, events), headers=headers, media_type="text/event-stream")

    @router.get("/cases/{id}/grounding")
    async def grounding(user: User, id: str, response: Response) -> dict[str, Any]:
        response.headers.update(_PRIVATE)
        attention, side, box = await room.grounding(id)
        values = base64.b64encode(attention.astype("<f4").tobytes()).decode()
        return {"tokens": len(attention), "side": side, "box": box, "values": values}

    @router.get("/cases/{id}/similar")
    async def similar(
        user: User, id: str, response: Response, count: Annotated[int, Query(ge=1, le=20)] = 6
    ) -> dict[str, Any]:
        response.headers.update(_PRIVATE)
        found = await room.similar(id, count=count)
        return {
            "ready": found.ready,
            "indexed": found.indexed,
            "total": found.total,
            "cases": [
                {
                    "number": one.number,
                    "study": one.pair.study,
                    "view": one.pair.view,
                    "findings": one.pair.findings,
                    "impression": one.pair.impression,
                    "cosine": round(one.cosine, 4),
                    "shared": one.shared,
                }
                for one in found.cases
            ],
        }

    @router.get("/priors/{number}")
    def prior(user: User, number: int) -> FileResponse:
        return FileResponse(room.prior_picture(number), media_type="image/png", headers=_PRIVATE)

    @router.post("/cases/{id}/decision", status_code=201)
    async def decide(user: User, id: str, body: DecisionBody) -> dict[str, Any]:
        return await room.decide(
            id,
            accepted=body.outcome == "accept",
            text=body.text,
            reason=body.reason,
            seconds=body.seconds,
            user=user,
        )

    return router


async def _stream(
    first: tuple[str, dict[str, Any]], rest: AsyncIterator[tuple[str, dict[str, Any]]]
) -> AsyncIterator[bytes]:
    """Write server-sent events; an error on the way is the last event."""
    yield _event(*first)
    try:
        async for name, value in rest:
            yield _event(name, value)
    except FedRadError as error:
        yield _event("error", {"code": error.code, "message": str(error)})


def _event(name: str, value: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
