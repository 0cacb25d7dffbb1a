"""The worklist forgets: what a reader decided is deleted after the site's term, at start and every hour.

Guarantees: nothing undecided is deleted, and no case of which a file cannot be read; the log says how many,
never whose. The access log has a retention of its own (`fedrad-site access shred`).
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
            days = keep_s // DAY_S
            if gone.decided:
                _LOG.info("worklist: %d decided cases older than %d days deleted", gone.decided, days)
            if gone.unfinished:
                _LOG.info(
                    "worklist: %d pictures that a crash left over %d days ago deleted", gone.unfinished, days
                )
            if gone.damaged:
                _LOG.warning("worklist: %d cases are damaged and are not forgotten", gone.damaged)
        except Exception as error:  # forgetting must not end while the server runs
            _LOG.warning("worklist: old cases stay for now: %s", type(error).__name__)
        await sleep(_EVERY_S)
