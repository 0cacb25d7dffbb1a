"""The radiologist's page: static files and a small API over the drafting service and the worklist.

    /page/                 the page: HTML, CSS and modules, no build step, nothing from elsewhere
    /page/api/…            cases, pixels, drafts as they are written, grounding, similar cases, decisions

Guarantees: files carry no patient data and need no user; every other route needs one; a decision is on the
access log before it is shown as taken. It diagnoses nothing and signs nothing: it shows drafts to a reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import APIRouter

    from client.serving.service import DraftingService

__all__ = ["page_router"]


def page_router(
    service: DraftingService, *, folder: Path, data: Path | None = None, worklist_folder: Path | None = None
) -> APIRouter:
    """Build the page's routes; `folder` keeps worklist and case index, `data` is the site's prepared data."""
    from fastapi import APIRouter

    from client.serving.page.api import api_router
    from client.serving.page.reading import ReadingRoom
    from client.serving.page.static_files import static_router
    from client.serving.worklist import Worklist

    room = ReadingRoom(
        service,
        worklist=Worklist(worklist_folder or folder / "worklist"),
        data=data,
        cache=folder / "cases",
    )
    router = APIRouter()
    router.include_router(api_router(room))
    router.include_router(static_router())
    return router
