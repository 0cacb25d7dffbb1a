"""The HTTP face: health, metrics, reports, an OpenAI-compatible chat, and whoever mounts a router.

Guarantees: nothing with a patient's data answers without a user; a request for another host name or from
another origin's page is refused, so that no web site reaches a local server through a browser; bodies are
cut off at the limit while they arrive; an error is JSON with the error's name and never a patient's words.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.serving.engine import Options, Token
from client.serving.guard import Decision
from client.serving.limits import RateLimit
from client.serving.service import DraftingService, DraftRequest, draft_value
from client.serving.users import TokenFile, User
from common.errors import (
    BodyTooLarge,
    CanaryFailed,
    CaseDamaged,
    CaseDecided,
    CaseUnknown,
    DraftUnknown,
    EngineBusy,
    EngineFailed,
    EngineStopped,
    EngineWorkerDied,
    FedRadError,
    GroundingUnavailable,
    ImageUnreadable,
    NotAuthenticated,
    PromptTooLong,
    RequestRefused,
    SignOffInvalid,
    TooManyRequests,
)

Switch = Callable[[int, str, str], Awaitable[dict[str, Any]]]

_STATUS: tuple[tuple[type[FedRadError], int], ...] = (
    (NotAuthenticated, 401),
    (DraftUnknown, 404),
    (CaseUnknown, 404),
    (CaseDecided, 409),
    (GroundingUnavailable, 409),
    (CanaryFailed, 409),
    (BodyTooLarge, 413),
    (TooManyRequests, 429),
    (ImageUnreadable, 422),
    (SignOffInvalid, 422),
    (PromptTooLong, 422),
    (CaseDamaged, 500),
    (EngineFailed, 500),
    (EngineBusy, 503),
    (EngineStopped, 503),
    (EngineWorkerDied, 503),
)
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; "
        b"base-uri 'none'; form-action 'none'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class HttpSettings:
    """Who may ask and how much; `hosts` are the names this server answers to, without port.

    `tokens` None with `open_to` set lets everybody in as that user: for loopback, when told so.
    """

    tokens: TokenFile | None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    open_to: str = ""
    certificate_users: bool = False
    max_body_bytes: int = 48 << 20
    per_minute: float = 120.0
    burst: int = 30
    clock_s: Callable[[], float] = field(default=time.monotonic)


def current_user(request: Request) -> str:
    """Return the asking user's name; raises NotAuthenticated."""
    return authenticated(request).name


def authenticated(request: Request) -> User:
    """Return the asking user, from a bearer token or a client certificate; raises NotAuthenticated."""
    settings: HttpSettings = request.app.state.settings
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and settings.tokens is not None:
        return settings.tokens.user(token.strip())
    certified = request.scope.get("state", {}).get("certificate_user", "")
    if settings.certificate_users and certified:
        return User(f"cert:{certified}")
    if settings.open_to:
        return User(settings.open_to, admin=True)
    raise NotAuthenticated("expected a bearer token or a client certificate, got none")


CurrentUser = Annotated[str, Depends(current_user)]


def limited_user(request: Request) -> str:
    """Return the asking user and count the request against their limit; raises TooManyRequests."""
    user = current_user(request)
    request.app.state.limit.take(user, now_s=request.app.state.settings.clock_s())
    return user


LimitedUser = Annotated[str, Depends(limited_user)]


def create_app(
    service: DraftingService,
    *,
    settings: HttpSettings,
    routers: Sequence[APIRouter] = (),
    switch: Switch | None = None,
) -> FastAPI:
    """Make the app; `switch` (version, pin, user) changes the release where the site has a model store."""
    app = FastAPI(title="FedRad drafting", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.settings = service, settings
    app.state.limit = RateLimit(per_minute=settings.per_minute, burst=settings.burst)
    app.state.switch = switch
    app.add_middleware(_Gate, settings=settings, metrics=service.metrics)
    app.add_exception_handler(FedRadError, _named_error)
    app.include_router(_api)
    from client.serving.openai_api import router as openai_router

    app.include_router(openai_router)
    for router in routers:
        app.include_router(router)
    return app


def error_value(error: FedRadError) -> dict[str, Any]:
    """Return an error as OpenAI's clients and ours read it."""
    return {"error": {"code": error.code, "message": str(error), "type": "fedrad_error"}}


def status_of(error: FedRadError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 400)


async def _named_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, FedRadError):
        raise error
    status = status_of(error)
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        found = re.search(r"in (\d+) s", str(error))
        headers["retry-after"] = found.group(1) if found else "5"
    return JSONResponse(error_value(error), status, headers)


_api = APIRouter()


@_api.get("/health")
def health(request: Request) -> JSONResponse:
    """Say whether drafts can be written now, and by which release."""
    service: DraftingService = request.app.state.service
    engine = service.engine
    ready = not engine.broken
    value = {
        "status": "ok" if ready else "unavailable",
        "model": asdict(engine.model) | {"label": engine.model.label},
        "guarded": service.guarded,
        "waiting": engine.waiting,
        "running": engine.in_flight,
        "engine_restarts": engine.restarts,
        "held_back": service.switch_failure,
    }
    return JSONResponse(value, 200 if ready else 503)


@_api.get("/metrics")
def metrics(request: Request, user: CurrentUser) -> Response:
    """Answer Prometheus."""
    service: DraftingService = request.app.state.service
    engine = service.engine
    service.metrics.engine(waiting=engine.waiting, in_flight=engine.in_flight, restarts=engine.restarts)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@_api.post("/v1/report")
async def report(
    request: Request,
    user: LimitedUser,
    indication: str = "",
    question: str = "",
    stream: bool = False,
    max_new_tokens: int = 0,
    no_repeat_ngram: int = 0,
) -> Response:
    """Draft the findings of one image: the body, or the part `image` of a multipart form."""
    data, fields_ = await _image_of(request)
    indication = fields_.get("indication", indication)
    options = options_of(max_new_tokens=max_new_tokens, no_repeat_ngram=no_repeat_ngram)
    service: DraftingService = request.app.state.service
    picture = await service.read(data)
    asked = DraftRequest(picture, user, indication, fields_.get("question", question), options)
    if stream:
        return StreamingResponse(_events(service, asked), media_type="text/event-stream")
    return JSONResponse(draft_value(await service.draft_whole(asked)))


@_api.post("/v1/admin/use/{version}")
async def use_version(version: int, request: Request, pin: str = "") -> JSONResponse:
    """Switch to another release of the site's model store, after the canary; administrators only."""
    user = authenticated(request)
    if not user.admin:
        raise NotAuthenticated("expected an administrator's token, got another")
    if request.app.state.switch is None:
        raise RequestRefused("expected a site with a model store, got a release given by folder")
    return JSONResponse(await request.app.state.switch(version, pin, user.name))


def options_of(*, max_new_tokens: int, no_repeat_ngram: int = 0) -> Options:
    """Check decoding options; raises RequestRefused."""
    if not 0 <= max_new_tokens <= 2048 or not 0 <= no_repeat_ngram <= 64:
        raise RequestRefused("expected 0-2048 new tokens and an n-gram of 0-64, got more or less")
    return Options(max_new_tokens=max_new_tokens, no_repeat_ngram=no_repeat_ngram)


async def _events(service: DraftingService, asked: DraftRequest) -> AsyncIterator[str]:
    """Server-sent events `decision`, `token`, `draft`, or `error`."""
    try:
        async for event in service.draft(asked):
            if isinstance(event, Token):
                yield _event("token", asdict(event))
            elif isinstance(event, Decision):
                yield _event("decision", asdict(event))
            else:
                yield _event("draft", draft_value(event))
    except FedRadError as error:
        yield _event("error", error_value(error)["error"])


def _event(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _image_of(request: Request) -> tuple[bytes, dict[str, str]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "multipart/form-data":
        return await request.body(), {}
    async with request.form(max_files=1, max_fields=4, max_part_size=1 << 20) as form:
        upload = form.get("image")
        if upload is None or isinstance(upload, str):
            raise RequestRefused("expected the part `image`, got none")
        words = {
            name: value for name in ("indication", "question") if isinstance(value := form.get(name), str)
        }
        return await upload.read(), words


class _Gate:
    """Host, origin and body size before anything else; security headers on every answer."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, metrics: Any) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._settings.max_body_bytes:
                raise BodyTooLarge(f"expected a body of at most {self._settings.max_body_bytes} bytes")
            return message

        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                added = [pair for pair in _HEADERS if pair[0] not in present]
                message = {**message, "headers": [*message["headers"], *added]}
                route = scope.get("route")
                self._metrics.answered(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            self._verify(headers)
            await self._app(scope, counted, guarded)
        except FedRadError as error:
            if started:
                raise
            await JSONResponse(error_value(error), status_of(error))(scope, receive, guarded)

    def _verify(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if _name_of(host) not in self._settings.hosts:
            raise RequestRefused("expected a request for this server's own name, got another host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestRefused("expected a request from this server's own page, got another origin")
        try:
            declared = int(headers.get("content-length", "0"))
        except ValueError as error:
            raise RequestRefused("expected a content length, got something else") from error
        if declared > self._settings.max_body_bytes:
            raise BodyTooLarge(f"expected a body of at most {self._settings.max_body_bytes} bytes")


def _name_of(host: str) -> str:
    return re.sub(r":\d+$", "", host).lower()
