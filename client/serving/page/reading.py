"""What a reader does with a case: look, have it drafted, see why and what is similar, accept or reject.

Guarantees: one decision per case, on the access log first; a draft is stored with the pieces its tokens
wrote, so that any word leads back to image regions. Everything runs on the service's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.access import Action
from client.data.store import Pair, read_pairs
from client.serving.engine import Token
from client.serving.grounding import grid_side, picture_box
from client.serving.guard import Decision
from client.serving.picture import Picture, placed
from client.serving.retrieval import CaseIndex, PriorCase, build_index
from client.serving.service import Draft, DraftRequest, draft_value
from client.serving.worklist import (
    Case,
    Patient,
    Worklist,
    indication_of,
    patient_of,
    verify_sign_off,
    word_edits,
)
from common.canonical import canonical_json
from common.errors import CaseDamaged, CaseDecided, CaseUnknown, DatasetInvalid, GroundingUnavailable

if TYPE_CHECKING:
    from client.serving.service import DraftingService

MAX_SHOWN_SIDE = 2560
SITE = "site"  # a case of the site's own prepared data, whose picture is in stored form already


@dataclass(frozen=True, slots=True)
class Similar:
    """Prior cases, nearest first; before the index is `ready`, how many of how many cases it holds."""

    cases: tuple[PriorCase, ...]
    ready: bool
    indexed: int
    total: int


class ReadingRoom:
    """Worklist, service and case index behind the page."""

    def __init__(
        self,
        service: DraftingService,
        *,
        worklist: Worklist,
        data: Path | None,
        cache: Path,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.service, self.worklist = service, worklist
        self._data, self._cache, self._wall_s = data, cache, wall_s
        self._index: asyncio.Task[CaseIndex] | None = None
        self._indexed = (0, 0)
        self._indexed_base = ""
        self._deciding = asyncio.Lock()

    def overview(self) -> list[dict[str, Any]]:
        """Every case with its state, the latest first; a damaged one names its `problem` and little else."""
        rows = []
        for id in self.worklist.ids():
            try:
                rows.append(self._row(self.worklist.case(id)))
            except CaseUnknown:  # deleted a moment ago
                continue
            except CaseDamaged as error:
                empty = Case(id, "", "", "", self.worklist.changed_s(id), "", Patient())
                rows.append({**asdict(empty), "state": "damaged", "problem": str(error)})
        return sorted(rows, key=lambda row: (-row["received_s"], row["id"]))

    def case_value(self, id: str) -> dict[str, Any]:
        """One case with draft and decision; raises CaseUnknown or CaseDamaged."""
        row = self._row(self.worklist.case(id))
        return {**row, "draft": self.worklist.draft(id), "decision": self.worklist.decision(id)}

    async def add(
        self, data: bytes, *, indication: str, source: str = "upload", patient: Patient | None = None
    ) -> Case:
        """Take a picture into the worklist; a DICOM header says who it is. Raises ImageUnreadable."""
        picture = await self.service.read(data, stored=source == SITE)
        who, said = patient or Patient(), ""
        if picture.kind == "dicom":
            who, said = await asyncio.to_thread(_header, data)
        return self.worklist.add(
            data,
            kind=picture.kind,
            source=source,
            received_s=int(self._wall_s()),
            indication=indication or said,
            patient=who,
        )

    async def add_examples(self, count: int) -> list[Case]:
        """Take held-out studies of the site's prepared data into the worklist."""
        had = {case.picture_sha256 for case in self.worklist.cases()}
        added: list[Case] = []
        for pair in self._pairs():
            if len(added) == count:
                break
            if pair.split != "test" or self._data is None:
                continue
            data = (self._data / pair.images[0]).read_bytes()
            known = Patient(id=pair.study, view=pair.view)
            with suppress(CaseDamaged):  # the worklist says so
                case = await self.add(data, indication=pair.indication, source=SITE, patient=known)
                if case.picture_sha256 not in had:
                    added.append(case)
        return added

    async def pixels(self, id: str) -> NDArray[np.uint16]:
        """Decode a case for display, at full depth and at most MAX_SHOWN_SIDE pixels long."""
        case = self.worklist.case(id)
        return await asyncio.to_thread(_decode, self.worklist.picture_path(id), case.kind)

    async def write_draft(self, id: str, *, user: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Have a case drafted: `decision`, `token` … and `draft` events as they come."""
        case = self.worklist.case(id)
        if self.worklist.decision(id) is not None:
            raise CaseDecided("expected a case that is still open, got a decided one")
        pieces: list[str] = []
        request = DraftRequest(await self._picture(id), user=user, indication=case.indication)
        async for event in self.service.draft(request):
            if isinstance(event, Decision):
                yield "decision", asdict(event)
            elif isinstance(event, Token):
                pieces.append(event.text)
                yield "token", {"text": event.text, "logprob": event.logprob}
            else:
                value = await self.keep_draft(id, event, pieces)
                yield "draft", value

    async def keep_draft(self, id: str, draft: Draft, pieces: list[str]) -> dict[str, Any]:
        """Store a draft with a case and return it as the page shows it."""
        value = draft_value(draft) | {"pieces": pieces, "written_s": int(self._wall_s())}
        value.pop("token_ids")
        self.worklist.put_draft(id, value)
        return value

    async def grounding(self, id: str) -> tuple[NDArray[np.float32], int, tuple[float, float, float, float]]:
        """Return a case's attention [tokens, image tokens], the grid's side, and its place on what is shown.

        Raises GroundingUnavailable without a draft, DraftUnknown for one that is too old to look into.
        """
        draft = self.worklist.draft(id)
        if draft is None or not draft["text"]:
            raise GroundingUnavailable("expected a case with a draft, got one without")
        attention = self.worklist.attention(id)
        if attention is None:
            attention = await self.service.attention(draft["id"])
            self.worklist.put_attention(id, attention)
        side = grid_side(attention.shape[1])
        picture = await self._picture(id)
        height, width = picture.pixels.shape[:2]
        seen = picture_box(self.service.processor, width=width, height=height)
        return attention, side, placed(seen, picture.box)

    async def similar(self, id: str, *, count: int) -> Similar:
        """Return the nearest prior cases, or how far the index is."""
        index = await self._ready_index()
        if index is None:
            return Similar((), False, *self._indexed)
        features = await self.service.image_vector(await self._picture(id))
        draft = self.worklist.draft(id)
        found = index.nearest(
            features,
            draft=draft["text"] if draft else "",
            count=count,
            except_image=self.worklist.case(id).picture_sha256,
        )
        return Similar(found, True, *self._indexed)

    def prior_picture(self, number: int) -> Path:
        """Return the picture of a prior case by its number in the index; raises CaseUnknown."""
        done = self._index is not None and self._index.done() and not self._index.cancelled()
        index = self._index.result() if self._index is not None and done else None
        if index is None or not 0 <= number < len(index.pairs):
            raise CaseUnknown("expected the number of a prior case, got another")
        return index.directory / index.pairs[number].images[0]

    async def decide(
        self, id: str, *, accepted: bool, text: str, reason: str, seconds: float, user: str
    ) -> dict[str, Any]:
        """Take a reader's decision, on the access log first; raises CaseDecided, SignOffInvalid."""
        verify_sign_off(text=text, reason=reason, accepted=accepted)
        async with self._deciding:
            case = self.worklist.case(id)
            if self.worklist.decision(id) is not None:
                raise CaseDecided("expected a case that is still open, got a decided one")
            draft = self.worklist.draft(id)
            drafted = draft["text"] if draft else ""
            decision = {
                "draft": draft["id"] if draft else "",
                "model": draft["model"]["label"] if draft else "",
                "accepted": accepted,
                "text": text if accepted else "",
                "edited_words": word_edits(drafted, text) if accepted else 0,
                "drafted_words": len(drafted.split()),
                "reason": reason,
                "reading_s": round(seconds, 1),
            }
            payload = canonical_json(decision | {"picture": case.picture_sha256, "drafted": drafted})
            record = await self.service.record(
                user=user,
                action=Action.SIGN_OFF if accepted else Action.DISCARD,
                payload=payload if self.service.keeps_drafts else None,
            )
            stored = decision | {"user": user, "time_s": record.time_s, "record": record.id}
            self.worklist.decide(id, stored, accepted=accepted)
            return stored

    def _row(self, case: Case) -> dict[str, Any]:
        return {**asdict(case), "state": self.worklist.state(case.id).value}

    async def _picture(self, id: str) -> Picture:
        stored = self.worklist.case(id).source == SITE
        data = await asyncio.to_thread(self.worklist.picture_path(id).read_bytes)
        return await self.service.read(data, stored=stored)

    def _pairs(self) -> tuple[Pair, ...]:
        if self._data is None:
            return ()
        try:
            return read_pairs(self._data)
        except (DatasetInvalid, OSError):
            return ()

    async def _ready_index(self) -> CaseIndex | None:
        """Index at the first question, and again for another base; give the index once it is there."""
        model = self.service.model
        base = f"{model.base} {model.study}"  # the study pins the base's files
        if self._index is None or base != self._indexed_base:
            if self._index is not None:
                self._index.cancel()
            self._index, self._indexed_base = asyncio.create_task(self._build(base)), base
        done, _ = await asyncio.wait([self._index], timeout=0.05)
        if not done:
            return None
        failed, index = self._index.exception(), self._index
        if failed is not None:
            self._index = None  # the next question tries again
        return index.result()

    async def _build(self, base: str) -> CaseIndex:
        async def vector_of(data: bytes) -> NDArray[np.float32]:
            return await self.service.image_vector(await self.service.read(data, stored=True))

        def progress(_: str, done: int, total: int) -> None:
            self._indexed = (done, total)

        pairs = await asyncio.to_thread(self._pairs)
        return await build_index(
            self._data or self._cache,
            pairs,
            vector_of=vector_of,
            base=base,
            cache=self._cache,
            progress=progress,
        )


def _header(data: bytes) -> tuple[Patient, str]:
    from client.data.dicom import read_dicom

    dataset = read_dicom(data, pixels=False)
    return patient_of(dataset), indication_of(dataset)


def _decode(path: Path, kind: str) -> NDArray[np.uint16]:
    from client.data.dicom import decode_dicom, read_dicom
    from client.data.pixels import decode_raster, fit_within

    pixels = decode_dicom(read_dicom(path, pixels=True)) if kind == "dicom" else decode_raster(path)
    return fit_within(pixels, max_side=MAX_SHOWN_SIDE)
