"""A study in, a draft out: the guard's decision first, then tokens, then the draft that names its model.

Everything that drafts goes through here: HTTP, gRPC, the page, the PACS loop. Guarantees: every draft names
model version, round and release ε; every draft and refusal is on the access log before its last event is
given; a switch to another release loses no draft that is being written. It writes nothing final.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.access import AccessLog, AccessRecord, Action
from client.data.framing import AS_IMPORTED, AS_STORED, Framing
from client.serving.canary import CanaryFigures, canary_faults, run_canary
from client.serving.engine import AS_TRAINED, Ask, Finish, ModelVersion, Options, Sentence, Token
from client.serving.guard import ALLOWED_UNGUARDED, Decision, Guard
from client.serving.guard_question import is_specific
from client.serving.metrics import ServingMetrics
from client.serving.picture import Picture, prepared, read_picture
from client.serving.source import ReleaseSource
from client.serving.workers import WorkerEngine
from common.canonical import canonical_json
from common.errors import CanaryFailed, DraftUnknown, EngineStopped, GroundingUnavailable

if TYPE_CHECKING:
    from common.model.images import ImageProcessor

_DRAIN_S = 600.0
_REMEMBERED_BYTES = 256 << 20


@dataclass(frozen=True)
class DraftRequest:
    """One study: its frontal image, why it was made (`indication`), or a free `question` about it."""

    picture: Picture
    user: str
    indication: str = ""
    question: str = ""
    options: Options = AS_TRAINED


@dataclass(frozen=True)
class Draft:
    """A finished draft or a refusal; times in seconds since the request was taken."""

    id: str
    picture_sha256: str
    model: ModelVersion
    decision: Decision
    text: str
    sentences: tuple[Sentence, ...]
    finish: Finish
    cut: bool
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    first_token_s: float | None
    seconds: float
    access_record: str


def draft_value(draft: Draft) -> dict[str, Any]:
    """Return a draft as plain values for JSON, with the model's label."""
    value = asdict(draft)
    value["model"]["label"] = draft.model.label
    value["logprobs"] = [one if one - one == 0 else None for one in draft.logprobs]
    return value


@dataclass(eq=False)
class Active:
    """What answers: an engine with the guard and image preparation of its base, and how many use it now."""

    engine: WorkerEngine
    guard: Guard | None
    processor: ImageProcessor
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold this release for a whole answer: it is not ended between two of an answer's questions."""
        self.users += 1
        self.unused.clear()
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self.unused.set()

    async def retire(self, *, drain_s: float) -> None:
        """End the engine once nobody uses it, or after `drain_s`."""
        if self.users:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.unused.wait(), drain_s)
        await self.engine.stop()


class DraftingService:
    """Drafts with one release at a time; all methods but `draft_blocking` belong to one event loop."""

    def __init__(
        self,
        active: Active,
        *,
        access: AccessLog,
        framing: Framing = AS_IMPORTED,
        metrics: ServingMetrics | None = None,
        keep_drafts: bool = True,
        remember: int = 256,
        clock_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._active, self._access, self._framing = active, access, framing
        self.metrics = metrics or ServingMetrics()
        self._keep_drafts, self._remember = keep_drafts, remember
        self._clock_s, self._wall_s = clock_s, wall_s
        self._log_lock, self._switch_lock = asyncio.Lock(), asyncio.Lock()
        self._remembered: OrderedDict[str, tuple[DraftRequest, Draft, Active]] = OrderedDict()
        self._remembered_bytes = 0
        self._leaving: dict[asyncio.Task[None], Active] = {}
        self._figures: CanaryFigures | None = None
        self._loop = asyncio.get_running_loop()
        self.switch_failure = ""

    @property
    def model(self) -> ModelVersion:
        """The version that answers now."""
        return self._active.engine.model

    @property
    def engine(self) -> WorkerEngine:
        return self._active.engine

    @property
    def processor(self) -> ImageProcessor:
        """How the base in use prepares pictures: where its patches lie on them."""
        return self._active.processor

    @property
    def keeps_drafts(self) -> bool:
        """Whether what was drafted and decided is kept on the access log, encrypted."""
        return self._keep_drafts

    @property
    def guarded(self) -> bool:
        return self._active.guard is not None

    @property
    def framing(self) -> Framing:
        """How this site's import stores images, and so how a model is asked about new ones."""
        return self._framing

    async def read(self, data: bytes, *, stored: bool = False) -> Picture:
        """Read an image as this site's import would have stored it, or one that is `stored` as it is.

        Raises ImageUnreadable.
        """
        return await asyncio.to_thread(read_picture, data, AS_STORED if stored else self._framing)

    async def draft(self, request: DraftRequest) -> AsyncIterator[Decision | Token | Draft]:
        """Give the decision, then tokens, then the draft; raises what the engine raises.

        A reader who leaves early cancels the answer; what was written until then is logged.
        """
        active = self._active
        with active.in_use():
            async with aclosing(self._draft_with(active, request)) as events:
                async for event in events:
                    yield event

    async def _draft_with(
        self, active: Active, request: DraftRequest
    ) -> AsyncGenerator[Decision | Token | Draft]:
        started, identifier = self._clock_s(), secrets.token_hex(16)
        pixels = await asyncio.to_thread(prepared, request.picture, active.processor)
        ask = Ask(request.picture.key, pixels, _asked(request), request.options)
        decision = await self._decide(active, request, ask)
        yield decision
        result, tokens, first_s = None, [], None
        model = active.engine.model
        try:
            if not decision.refused:
                async for event in active.engine.submit(ask):
                    if isinstance(event, Token):
                        first_s = self._clock_s() - started if first_s is None else first_s
                        tokens.append(event)
                        yield event
                    else:
                        result = event
        except BaseException as error:
            self.metrics.failed(type(error).__name__)
            if tokens:
                text = "".join(token.text for token in tokens)
                await self._log(request, {"draft": identifier, "left": True, "text": text}, model)
            raise
        draft = Draft(
            id=identifier,
            picture_sha256=request.picture.sha256,
            model=model,
            decision=decision,
            text=result.text if result else "",
            sentences=result.sentences if result else (),
            finish=result.finish if result else Finish.REFUSED,
            cut=result.cut if result else False,
            token_ids=result.token_ids if result else (),
            logprobs=result.logprobs if result else (),
            prompt_tokens=result.prompt_tokens if result else 0,
            first_token_s=first_s,
            seconds=self._clock_s() - started,
            access_record="",
        )
        record = await self._log(request, _logged(request, draft), model)
        draft = Draft(**{**_fields(draft), "access_record": record.id})
        self._keep(identifier, request, draft, active)
        self.metrics.finished(draft, cached_tokens=result.cached_tokens if result else 0)
        yield draft

    async def draft_whole(self, request: DraftRequest) -> Draft:
        """Write one draft and return it."""
        async for event in self.draft(request):
            if isinstance(event, Draft):
                return event
        raise EngineStopped("expected a draft, got the end of the answer")

    def draft_blocking(self, request: DraftRequest, *, timeout_s: float = 300.0) -> Draft:
        """Write one draft from another thread than the service's."""
        return asyncio.run_coroutine_threadsafe(self.draft_whole(request), self._loop).result(timeout_s)

    async def attention(self, draft_id: str) -> NDArray[np.float32]:
        """Return a remembered draft's attention to image tokens, [tokens, image tokens]."""
        request, draft = self.remembered(draft_id)
        active = self._remembered[draft_id][2]
        with active.in_use():
            pixels = await asyncio.to_thread(prepared, request.picture, active.processor)
            ask = Ask(request.picture.key, pixels, _asked(request), request.options)
            try:
                return await active.engine.attention(ask, draft.token_ids)
            except EngineStopped as error:
                if active is self._active:
                    raise
                raise GroundingUnavailable(
                    f"expected a draft of {self.model.label}, got one of {draft.model.label}; draft it again"
                ) from error

    async def image_vector(self, picture: Picture) -> NDArray[np.float32]:
        """Return a picture's features from the frozen tower, [N, D]."""
        active = self._active
        with active.in_use():
            pixels = await asyncio.to_thread(prepared, picture, active.processor)
            return await active.engine.image_vector(Ask(picture.key, pixels))

    def remembered(self, draft_id: str) -> tuple[DraftRequest, Draft]:
        """Return one of the latest drafts with what was asked; raises DraftUnknown."""
        found = self._remembered.get(draft_id)
        if found is None:
            raise DraftUnknown(f"expected one of the latest {self._remember} drafts, got another id")
        return found[0], found[1]

    async def record(self, *, user: str, action: Action, payload: bytes | None = None) -> AccessRecord:
        """Put something on the access log, durably."""
        return await self._write(user, action, payload, self.model)

    async def switch(
        self,
        source: ReleaseSource,
        *,
        user: str,
        commit: Callable[[], Awaitable[None]] | None = None,
        must_pass: bool = True,
    ) -> CanaryFigures:
        """Start another release of this base beside this one, compare both on the canary, and switch.

        The old release answers until the new one has passed, and finishes what it began. `commit` is awaited
        between the canary and the switch; with `must_pass` False (going back) faults are measured only.
        Raises CanaryFailed and what starting, `commit` or the access log raises; then the old release goes on
        (what a `commit` that returned has done is the caller's to take back).
        """
        async with self._switch_lock:
            old = self._active
            engine = old.engine.successor(source)
            await engine.start()
            try:
                if engine.model.base != old.engine.model.base:
                    raise CanaryFailed(
                        f"expected a release of base {old.engine.model.base}, got one of {engine.model.base}"
                    )
                if self._figures is None:
                    self._figures = await run_canary(old.engine, old.processor)
                processor = _processor(source.base)
                figures = await run_canary(engine, processor)
                faults = canary_faults(self._figures, figures)
                if faults and must_pass:
                    raise CanaryFailed(f"{engine.model.label}: {'; '.join(faults)}")
                if commit is not None:
                    await commit()
                await self._write(user, Action.SWITCH_MODEL, None, engine.model)
            except BaseException:
                await engine.stop()
                raise
            self._active = Active(engine, old.guard, processor)
            self._figures = figures
            leaving = asyncio.create_task(old.retire(drain_s=_DRAIN_S))
            self._leaving[leaving] = old
            leaving.add_done_callback(lambda task: self._leaving.pop(task, None))
            self.metrics.switched(engine.model)
            return figures

    async def close(self, *, drain_s: float = 5.0) -> None:
        """Finish what is being written, within `drain_s`, and end the engines."""
        leaving = dict(self._leaving)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.gather(*(one.retire(drain_s=drain_s) for one in (self._active, *leaving.values())))

    def _keep(self, identifier: str, request: DraftRequest, draft: Draft, active: Active) -> None:
        self._remembered[identifier] = (request, draft, active)
        self._remembered_bytes += request.picture.pixels.nbytes
        while len(self._remembered) > self._remember or (
            self._remembered_bytes > _REMEMBERED_BYTES and len(self._remembered) > 1
        ):
            _, (left, _, _) = self._remembered.popitem(last=False)
            self._remembered_bytes -= left.picture.pixels.nbytes

    async def _decide(self, active: Active, request: DraftRequest, ask: Ask) -> Decision:
        if active.guard is None:
            return ALLOWED_UNGUARDED
        features = await active.engine.image_vector(ask)
        return await asyncio.to_thread(
            active.guard.decide,
            request.picture,
            features,
            indication=request.indication,
            question=request.question,
        )

    async def _log(self, request: DraftRequest, value: dict[str, Any], model: ModelVersion) -> AccessRecord:
        payload = canonical_json(value) if self._keep_drafts else None
        return await self._write(request.user, Action.DRAFT, payload, model)

    async def _write(
        self, user: str, action: Action, payload: bytes | None, model: ModelVersion
    ) -> AccessRecord:
        async with self._log_lock:
            return await asyncio.to_thread(
                self._access.record,
                user=user,
                action=action,
                model_version=model.version,
                time_s=int(self._wall_s()),
                payload=payload,
            )


def _processor(base: Path) -> ImageProcessor:
    from common.model.images import read_processor

    return read_processor(base)


def _asked(request: DraftRequest) -> str:
    """What fills the prompt: the indication, and a question where it names something in the chest."""
    question = request.question if is_specific(request.question) else ""
    return " ".join(part for part in (request.indication, question) if part)


def _fields(draft: Draft) -> dict[str, Any]:
    return {name: getattr(draft, name) for name in Draft.__dataclass_fields__}


def _logged(request: DraftRequest, draft: Draft) -> dict[str, Any]:
    return {
        "draft": draft.id,
        "picture": draft.picture_sha256,
        "indication": request.indication,
        "question": request.question,
        "model": draft.model.label,
        "refused": draft.decision.code,
        "finish": draft.finish.value,
        "text": draft.text,
    }
