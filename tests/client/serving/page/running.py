"""The page as it runs: real app, service and worker on loopback, over the shipped base."""

from __future__ import annotations

import asyncio
import functools
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.access import AccessLog
from client.serving.guard import Decision
from client.serving.picture import Picture
from common.model import tiny
from tests.client.serving.models import KEY, PLAN
from tests.simulator import study_text

REFUSED = Decision(
    True, "image-out-of-domain", "This is no chest.", "这不是胸片。", ood_score=2.5, ood_threshold=1.0
)


class DarkGuard:
    """Refuses pictures that are almost black."""

    def decide(
        self, picture: Picture, features: NDArray[np.float32], *, indication: str, question: str
    ) -> Decision:
        if picture.gray.mean() < 20:
            return REFUSED
        return Decision(False, "", "", "", ood_score=0.4, ood_threshold=1.0)


@functools.cache
def shipped_release() -> Path:
    """A signed release for the shipped base whose adapter changes nothing: the base's own words."""
    from common.config import parse_study_toml
    from common.model.loading import load_adapted
    from common.model.lora import adapter_tensors
    from common.model.manifest import hash_base
    from common.model.release import write_release

    base = tiny.tiny_base_directory()
    parsed = parse_study_toml(study_text(mode="consortium", seed=None))
    study = replace(
        parsed,
        base=replace(parsed.base, files=hash_base(base)),
        training=replace(parsed.training, max_new_tokens=96),
        adapter=replace(parsed.adapter, tensors=adapter_tensors(base, parsed.adapter)),
        cohort=replace(parsed.cohort, operator_key=KEY.public),
    )
    folder = Path(tempfile.mkdtemp(prefix="fedrad-test-release-"))
    vector = load_adapted(base, study.adapter).read_vector()
    write_release(folder, study, vector, KEY, round=19, release_epsilon=8.0, card="# A model\n")
    return folder


@dataclass(frozen=True)
class RunningPage:
    """Where it listens, its folders, its service's event loop, and where its PACS loop listens."""

    url: str
    folder: Path
    service: Any
    events: asyncio.AbstractEventLoop
    pacs_port: int = 0

    @property
    def log(self) -> AccessLog:
        return AccessLog(self.folder / "access")


@contextmanager
def running_page(
    folder: Path, *, data: Path | None = None, pacs: Path | None = None
) -> Iterator[RunningPage]:
    """Serve the page in a thread; `pacs` is a configuration of the PACS loop to run beside it."""
    started: list[RunningPage] = []
    failed: list[BaseException] = []
    ready, ending = threading.Event(), threading.Event()

    async def serve() -> None:
        import uvicorn

        from client.data.framing import site_framing
        from client.pacs.serve import start_pacs
        from client.serving.http import HttpSettings, create_app
        from client.serving.page import page_router
        from client.serving.service import Active, DraftingService, _processor
        from client.serving.source import ReleaseSource
        from client.serving.workers import WorkerEngine
        from client.serving.worklist import Worklist

        base = tiny.tiny_base_directory()
        engine = WorkerEngine(ReleaseSource(shipped_release(), base, version=3), PLAN)
        await engine.start()
        service = DraftingService(
            Active(engine, DarkGuard(), _processor(base)),
            access=AccessLog(folder / "access"),
            framing=site_framing(data),
        )
        settings = HttpSettings(tokens=None, open_to="dr.lin", per_minute=6000, burst=1000)
        app = create_app(
            service, settings=settings, routers=[page_router(service, folder=folder / "page", data=data)]
        )
        loop = start_pacs(service, pacs, worklist=Worklist(folder / "page" / "worklist")) if pacs else None
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
            task = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started and not task.done():
                await asyncio.sleep(0.01)
            dicom = loop.receiver.port if loop and loop.receiver else 0
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            started.append(RunningPage(url, folder, service, asyncio.get_running_loop(), dicom))
            ready.set()
            await asyncio.to_thread(ending.wait)
            server.should_exit = True
            server.force_exit = True
            await task
        if loop:
            await asyncio.to_thread(loop.stop)
        await service.close()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="page")
    thread.start()
    ready.wait(600)
    try:
        if failed:
            raise failed[0]
        yield started[0]
    finally:
        ending.set()
        thread.join(60)
    if failed:
        raise failed[0]


def until(condition: Any, *, within_s: float = 120.0) -> Any:
    """Wait until a condition that others make true gives something; returns it."""
    ends = time.monotonic() + within_s
    while not (got := condition()):
        assert time.monotonic() < ends, "expected the condition to come true"
        time.sleep(0.05)
    return got
