"""Drafting over gRPC for tools on the same machine, on a Unix socket.

Guarantees: the socket lies in a directory of mode 0700 and is replaced only when nobody listens on it; who
may open it is this account on this machine, which is who the access log names. A refusal by name crosses as
a status with the error's name.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from client import drafting_pb2, drafting_pb2_grpc
from client.serving.engine import ModelVersion, Token
from client.serving.guard import Decision
from client.serving.http import options_of, status_of
from client.serving.picture import MAX_PICTURE_BYTES
from client.serving.service import Draft, DraftingService, DraftRequest
from common.errors import FedRadError, ServingRefused

_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}


async def start_grpc(service: DraftingService, path: Path, *, user: str) -> grpc.aio.Server:
    """Serve on a Unix socket; end with `await server.stop(grace)`. Raises ServingRefused."""

    class Servicer(drafting_pb2_grpc.DraftingServicer):
        async def About(self, request: Any, context: Any) -> Any:
            return drafting_pb2.AboutReply(
                model=_model(service.model),
                guarded=service.guarded,
                waiting=service.engine.waiting,
                running=service.engine.in_flight,
            )

        async def Draft(self, request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                picture = await service.read(request.image)
                asked = DraftRequest(
                    picture,
                    user,
                    request.indication,
                    request.question,
                    options_of(max_new_tokens=request.max_new_tokens),
                )
                async for event in service.draft(asked):
                    yield _event(event)
            except FedRadError as error:
                code = _CODES.get(status_of(error), grpc.StatusCode.FAILED_PRECONDITION)
                await context.abort(code, f"{error.code}: {error}")

    _claim(path)
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", MAX_PICTURE_BYTES + (1 << 20))],
        maximum_concurrent_rpcs=64,
    )
    drafting_pb2_grpc.add_DraftingServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    path.chmod(0o600)
    return server


def _event(event: Decision | Token | Draft) -> Any:
    if isinstance(event, Decision):
        return drafting_pb2.DraftEvent(decision=_decision(event))
    if isinstance(event, Token):
        return drafting_pb2.DraftEvent(token=drafting_pb2.Token(**asdict(event)))
    sentences = [
        drafting_pb2.Sentence(
            text=one.text,
            start=one.start,
            end=one.end,
            uncertainty=one.uncertainty,
            least_probability=one.least_probability,
        )
        for one in event.sentences
    ]
    return drafting_pb2.DraftEvent(
        draft=drafting_pb2.Draft(
            id=event.id,
            model=_model(event.model),
            decision=_decision(event.decision),
            text=event.text,
            sentences=sentences,
            finish=event.finish.value,
            cut=event.cut,
            seconds=event.seconds,
            picture_sha256=event.picture_sha256,
            access_record=event.access_record,
        )
    )


def _decision(decision: Decision) -> Any:
    return drafting_pb2.Decision(**asdict(decision))


def _model(model: ModelVersion) -> Any:
    value = asdict(model)
    del value["protected"]
    return drafting_pb2.Model(**value, label=model.label)


def _claim(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.parent.stat().st_mode & 0o077:
        raise ServingRefused(
            f"{path.parent}: expected a directory of mode 0700 for the socket, got a wider one"
        )
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise ServingRefused(f"{path}: expected a free socket, got another server listening on it")
