"""A whole drafting server of a talkative release in this process: real engine worker, real sockets."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.access import AccessLog
from client.serving.guard import Guard
from client.serving.http import HttpSettings, create_app
from client.serving.launch import Launch, uvicorn_config
from client.serving.service import Active, DraftingService
from client.serving.source import ReleaseSource
from client.serving.users import TokenFile
from client.serving.workers import WorkerEngine
from common.model.images import read_processor
from tests.client.serving.models import PLAN, talkative_source


def png(seed: int, side: int = 64) -> bytes:
    """A picture of its own for every seed."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Hosted:
    """A running server: `run` executes a coroutine on its loop."""

    url: str
    token: str
    service: DraftingService
    tokens: TokenFile
    folder: Path
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 120.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@contextmanager
def hosted(
    folder: Path,
    *,
    source: ReleaseSource | None = None,
    guard: Guard | None = None,
    launch: Callable[[Launch], Launch] = lambda one: one,
    routers: Callable[[DraftingService], list[Any]] = lambda service: [],
    **settings: Any,
) -> Iterator[Hosted]:
    """Serve on a free loopback port, on a thread of its own."""
    import uvicorn

    found: list[Hosted | BaseException] = []
    ready, stop = threading.Event(), threading.Event()
    chosen = source or talkative_source()

    async def whole() -> None:
        engine = WorkerEngine(chosen, PLAN)
        await engine.start()
        active = Active(engine, guard, read_processor(chosen.base))
        service = DraftingService(active, access=AccessLog(folder / "access"))
        tokens = TokenFile(folder / "tokens.json")
        token = tokens.create("alice")
        wanted: dict[str, Any] = {"per_minute": 1e9, "burst": 1_000_000} | settings
        app = create_app(service, settings=HttpSettings(tokens, **wanted), routers=routers(service))
        told = launch(Launch(folder=folder, source=chosen, port=0))
        server = uvicorn.Server(uvicorn_config(app, told))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        scheme = "https" if told.tls else "http"
        found.append(
            Hosted(f"{scheme}://127.0.0.1:{port}", token, service, tokens, folder, asyncio.get_running_loop())
        )
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        server.should_exit = True
        await running
        await service.close()

    def body() -> None:
        try:
            asyncio.run(whole())
        except BaseException as error:
            found.append(error)
            ready.set()

    thread = threading.Thread(target=body)
    thread.start()
    try:
        ready.wait(600)
        first = found[0]
        if isinstance(first, BaseException):
            raise first
        yield first
    finally:
        stop.set()
        thread.join(60)


def wide(launch: Launch, **changes: Any) -> Launch:
    return replace(launch, **changes)
