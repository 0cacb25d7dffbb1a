"""The worklist forgets: what a reader decided is deleted after the site's term, at start and every hour.

Guarantees: nothing undecided is deleted; the log says how many, never whose. The access log has a retention
of its own (`fedrad-site access shred`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from client.serving.worklist import Worklist

DAY_S = 86_400
_EVERY_S = 3600.0
_LOG = logging.getLogger("fedrad.serving")


async def keep_purging(
    worklist: Worklist,
    *,
    keep_s: int,
    wall_s: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Purge now and every hour until cancelled; whatever fails is tried again."""
    while True:
        try:
            gone = await asyncio.to_thread(worklist.purge, before_s=int(wall_s()) - keep_s)
            if gone:
                _LOG.info("worklist: %d decided cases older than %d days deleted", gone, keep_s // DAY_S)
        except Exception as error:  # forgetting must not end while the server runs
            _LOG.warning("worklist: old cases stay for now: %s", type(error).__name__)
        await sleep(_EVERY_S)
