"""The PACS loop beside a drafting service: what `fedrad-site serve --pacs FILE` starts."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from client.pacs.config import read_pacs_config
from client.pacs.loop import PacsLoop, Written

if TYPE_CHECKING:
    from client.serving.service import DraftingService
    from client.serving.worklist import Worklist

DRAFT_TIMEOUT_S = 600.0


def start_pacs(service: DraftingService, config_path: Path, *, worklist: Worklist | None = None) -> PacsLoop:
    """Start the loop with a service of the running event loop; call it on that loop.

    Images and drafts also go to the page's `worklist` where one is given. Raises PacsConfigInvalid or
    ReceiverRefused. The caller calls `stop()`, not on the event loop's thread.
    """
    config = read_pacs_config(config_path)
    events = asyncio.get_running_loop()
    user = "pacs:" + (re.sub(r"[^A-Za-z0-9@._:-]", "_", config.listen.ae_title.strip()) or "FEDRAD")

    def drafter(data: bytes, indication: str) -> Written:
        writing = asyncio.run_coroutine_threadsafe(
            _write(service, worklist, data, indication, user=user), events
        )
        try:
            return writing.result(DRAFT_TIMEOUT_S)
        except TimeoutError:
            writing.cancel()
            raise

    loop = PacsLoop(config, drafter)
    loop.start()
    return loop


async def _write(
    service: DraftingService, worklist: Worklist | None, data: bytes, indication: str, *, user: str
) -> Written:
    """Draft an image and leave it on the worklist for a reader."""
    from client.serving.engine import Finish, Token
    from client.serving.page.reading import ReadingRoom
    from client.serving.service import Draft, DraftRequest
    from common.errors import CaseDecided, DraftUnknown

    picture = await service.read(data)
    pieces: list[str] = []
    draft: Draft | None = None
    async for event in service.draft(DraftRequest(picture, user=user, indication=indication)):
        if isinstance(event, Token):
            pieces.append(event.text)
        elif isinstance(event, Draft):
            draft = event
    if draft is None:
        raise DraftUnknown("expected a draft, got the end of the answer")
    if worklist is not None:
        room = ReadingRoom(service, worklist=worklist, data=None, cache=worklist.directory / "unused")
        case = await room.add(data, indication=indication, source="pacs")
        with contextlib.suppress(CaseDecided):  # a reader was faster; the decision stands
            await room.keep_draft(case.id, draft, pieces)
    refused = draft.decision.code if draft.decision.refused else ""
    if not refused and (draft.finish is Finish.NOT_FINITE or not draft.sentences):
        refused = f"no-text-{draft.finish.value}"
    return Written(draft.id, draft.model, tuple(one.text.strip() for one in draft.sentences), refused)
