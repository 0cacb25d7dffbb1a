"""An engine in a worker process that is watched over: started, restarted, and never trusted to stay.

When the process ends by itself, whatever it was writing goes on in the next one behind the tokens already
given: greedy answers continue as they would have. Questions that were in flight are then tried one at a time,
so that only a question during which the process ends again, alone, gets EngineWorkerDied; all others finish.
Guarantees: every question ends in a result or a named error; an answer goes to the question that was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.serving.engine import Ask, Finish, ModelVersion, Result, Sentence, Token
from client.serving.frames import format_frame, receive_frame
from client.serving.plan import EnginePlan
from client.serving.source import ReleaseSource, format_source
from client.serving.worker import format_ask
from common import errors
from common.errors import EngineBusy, EngineFailed, EngineStopped, EngineWorkerDied, FedRadError

Array = NDArray[np.float32]
_FAILED_STARTS = 3
_LATER_S = 30.0
_STREAM_LIMIT = 1 << 22


@dataclass(eq=False)
class _Job:
    """One question on its way; `deaths` counts the processes that ended while it was in flight."""

    number: int
    op: str
    ask: Ask
    tokens: tuple[int, ...] = ()
    deaths: int = 0
    written: list[int] = field(default_factory=list)
    events: asyncio.Queue[Token | Result | Array | FedRadError] = field(default_factory=asyncio.Queue)


class WorkerEngine:
    """One release in one worker process at a time; all methods belong to one event loop."""

    def __init__(
        self,
        source: ReleaseSource,
        plan: EnginePlan,
        *,
        threads: int = 1,
        max_waiting: int = 512,
        start_timeout_s: float = 900.0,
        stall_s: float = 300.0,
    ) -> None:
        self.source, self.plan = source, plan
        self._threads, self._max_waiting = threads, max_waiting
        self._start_timeout_s, self._stall_s = start_timeout_s, stall_s
        self._numbers = itertools.count(1)
        self._waiting: deque[_Job] = deque()
        self._flying: dict[int, _Job] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watch: asyncio.Task[None] | None = None
        self._model: ModelVersion | None = None
        self._stopping = False
        self._heard = 0.0
        self._idle = asyncio.Event()
        self.restarts = 0
        self.broken = ""

    def successor(self, source: ReleaseSource) -> WorkerEngine:
        """Make an engine for another release with this one's settings, not started."""
        return WorkerEngine(
            source,
            self.plan,
            threads=self._threads,
            max_waiting=self._max_waiting,
            start_timeout_s=self._start_timeout_s,
            stall_s=self._stall_s,
        )

    @property
    def model(self) -> ModelVersion:
        """The release that this engine runs; raises EngineStopped before it has started."""
        if self._model is None:
            raise EngineStopped("expected a started engine, got one without a model")
        return self._model

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while there is none."""
        return self._process.pid if self._process else None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    async def start(self) -> None:
        """Start the worker and load the release; raises what the worker refuses with, or EngineStopped."""
        reader = await self._spawn()
        self._watch = asyncio.create_task(self._supervise(reader))

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Wait up to `drain_s` for answers being written, then end the worker; what is left is named."""
        if drain_s and (self._flying or self._waiting):
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_s)
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._end_process()
        self._fail_all(EngineStopped("expected an engine that goes on, got one that was stopped"))

    async def submit(self, ask: Ask) -> AsyncIterator[Token | Result]:
        """Write one answer, see `Engine.submit`."""
        job = self._enqueue("submit", ask)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, FedRadError):
                    raise event
                if isinstance(event, Token):
                    yield event
                elif isinstance(event, Result):
                    yield event
                    return
        finally:
            self._forget(job)

    async def image_vector(self, ask: Ask) -> Array:
        """Return the picture's features [N, D]."""
        return await self._array(self._enqueue("vector", ask))

    async def attention(self, ask: Ask, token_ids: tuple[int, ...]) -> Array:
        """Return the attention of written tokens to image tokens."""
        return await self._array(self._enqueue("attention", ask, token_ids))

    async def _array(self, job: _Job) -> Array:
        try:
            event = await job.events.get()
            if isinstance(event, FedRadError):
                raise event
            if not isinstance(event, np.ndarray):
                raise EngineFailed("expected an array from the engine, got something else")
            return event
        finally:
            self._forget(job)

    def _enqueue(self, op: str, ask: Ask, tokens: tuple[int, ...] = ()) -> _Job:
        if self._stopping or self._model is None:
            raise EngineStopped("expected a running engine, got one that is stopped or stopping")
        if self.broken:
            raise EngineStopped(self.broken)
        if len(self._waiting) >= self._max_waiting:
            raise EngineBusy(f"expected at most {self._max_waiting} waiting questions, got one more")
        job = _Job(next(self._numbers), op, ask, tokens)
        job.written = list(ask.written)
        self._waiting.append(job)
        self._pump()
        return job

    def _forget(self, job: _Job) -> None:
        """Take a finished or abandoned job off; the worker is told where it still writes it."""
        if self._flying.pop(job.number, None) is not None and self._writer is not None:
            self._writer.write(format_frame({"op": "cancel", "id": job.number}))
        if job in self._waiting:
            self._waiting.remove(job)
        self._pump()

    def _pump(self) -> None:
        """Send what may run: suspects alone, all others up to the batch."""
        if self._writer is not None:
            suspect = next((job for job in self._waiting if job.deaths), None)
            if suspect is not None:
                if not self._flying:
                    self._send(suspect)
            elif not any(job.deaths for job in self._flying.values()):
                while self._waiting and len(self._flying) < self.plan.max_batch:
                    self._send(self._waiting[0])
        if not self._flying and not self._waiting:
            self._idle.set()

    def _send(self, job: _Job) -> None:
        if self._writer is None:
            return
        self._waiting.remove(job)
        if not self._flying:
            self._heard = asyncio.get_running_loop().time()
        self._flying[job.number] = job
        more = {"tokens": list(job.tokens)} if job.op == "attention" else {}
        ask = replace(job.ask, written=tuple(job.written))
        self._writer.write(format_ask(job.op, job.number, ask, **more))

    async def _spawn(self) -> asyncio.StreamReader:
        mine, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": "false"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "client.serving.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        reader, writer = await asyncio.open_connection(sock=mine, limit=_STREAM_LIMIT)
        try:
            writer.write(
                format_frame(
                    {
                        "op": "load",
                        "threads": self._threads,
                        "source": format_source(self.source),
                        "plan": {name: getattr(self.plan, name) for name in EnginePlan.__dataclass_fields__},
                    }
                )
            )
            first = await asyncio.wait_for(receive_frame(reader), self._start_timeout_s)
        except TimeoutError as error:
            writer.close()
            await self._end_process()
            raise EngineStopped(
                f"expected a loaded model within {self._start_timeout_s:.0f} s, got none"
            ) from error
        except BaseException:
            writer.close()
            await self._end_process()
            raise
        if first is None or first[0]["op"] != "ready":
            writer.close()
            await self._end_process()
            if first is None:
                raise EngineStopped("expected the engine's process to load the model, got its end")
            raise _named(first[0])
        self._model = ModelVersion(**first[0]["model"])
        self._writer = writer
        self._heard = asyncio.get_running_loop().time()
        self.broken = ""
        return reader

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Read until the worker ends, then start the next; for as long as this engine is wanted."""
        failed = 0
        current: asyncio.StreamReader | None = reader
        while True:
            if current is not None:
                self._pump()
                await self._read(current)
                await self._bury()
                self.restarts += 1
            try:
                current = await self._spawn()
                failed = 0
            except FedRadError as error:
                current, failed = None, failed + 1
                if failed >= _FAILED_STARTS:
                    self.broken = f"expected the engine to start again, got {error.code}"
                    self._fail_all(EngineStopped(self.broken))
                await asyncio.sleep(_LATER_S if failed >= _FAILED_STARTS else 0.2 * 4**failed)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        while True:
            receiving = asyncio.ensure_future(receive_frame(reader))
            try:
                while not receiving.done():
                    await asyncio.wait({receiving}, timeout=self._stall_s / 4)
                    silent = self._flying and loop.time() - self._heard > self._stall_s
                    if silent and not receiving.done() and self._process is not None:
                        self._process.kill()
                message = await receiving
            except FedRadError:
                message = None
            finally:
                receiving.cancel()
            if message is None:
                return
            self._heard = loop.time()
            self._deliver(*message)

    def _deliver(self, head: dict[str, Any], body: bytes) -> None:
        if head["op"] == "tokens":
            for number, text, token_id, logprob in head["items"]:
                job = self._flying.get(number)
                if job is not None:
                    job.written.append(token_id)
                    job.events.put_nowait(Token(text, token_id, logprob))
            return
        job = self._flying.pop(head["id"], None)
        if job is None:
            return
        if head["op"] == "result":
            job.events.put_nowait(_parse_result(head["result"], self.model))
        elif head["op"] == "array":
            job.events.put_nowait(np.frombuffer(body, np.float32).reshape(head["shape"]))
        else:
            job.events.put_nowait(_named(head))
        self._pump()

    async def _bury(self) -> None:
        """After a death: suspects wait for their turn alone, the one that was alone gets its error."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        await self._end_process()
        alone = len(self._flying) == 1
        flying = list(self._flying.values())
        self._flying.clear()
        for job in flying:
            job.deaths += 1
            if job.deaths > 1 and alone:
                job.events.put_nowait(
                    EngineWorkerDied("expected the engine to finish this answer, got its end, twice")
                )
        self._waiting.extendleft(reversed([job for job in flying if job.deaths == 1 or not alone]))

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, 5.0)
            except subprocess.TimeoutExpired:
                process.kill()
        await asyncio.to_thread(process.wait)

    def _fail_all(self, error: FedRadError) -> None:
        jobs = [*self._flying.values(), *self._waiting]
        self._flying.clear()
        self._waiting.clear()
        for job in jobs:
            job.events.put_nowait(error)
        self._idle.set()


def _parse_result(value: dict[str, Any], model: ModelVersion) -> Result:
    finite = [float("nan") if one is None else one for one in value["logprobs"]]
    return Result(
        **(
            value
            | {
                "sentences": tuple(Sentence(**one) for one in value["sentences"]),
                "token_ids": tuple(value["token_ids"]),
                "logprobs": tuple(finite),
                "finish": Finish(value["finish"]),
                "model": model,
            }
        )
    )


def _named(head: dict[str, Any]) -> FedRadError:
    kind = getattr(errors, str(head.get("code", "")), EngineFailed)
    known = isinstance(kind, type) and issubclass(kind, FedRadError)
    return (kind if known else EngineFailed)(str(head.get("message", "")))
