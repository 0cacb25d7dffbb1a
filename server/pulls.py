"""Replies out of Flower's Grid, one at a time, although Flower waits for the parts of each.

Flower shows a reply as soon as its site has begun to send it, and then waits in `pull_messages`, for hours if
need be, until every part is there; asked for several at once it also keeps all of them in memory. So each
reply is pulled by itself, and one that is not there in time goes on in a thread of its own, few at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

PATIENCE_S = 20.0
MOST_SLOW = 4


class Pulls:
    """Pulls from one Grid; at most `MOST_SLOW` replies trickle in beside the one that is taken next."""

    def __init__(self, grid: Grid, *, patience_s: float) -> None:
        self._grid = grid
        self._patience_s = patience_s
        self._running: dict[str, _Pull] = {}

    @property
    def slow(self) -> set[str]:
        """The messages whose replies have begun to arrive but are not whole."""
        return set(self._running)

    def arrived(self, message_ids: Collection[str]) -> Iterator[tuple[str, Message]]:
        """Look once for the reply to each message and yield those that are there."""
        message_ids = set(message_ids)
        for message_id in sorted(message_ids):
            pull, patience_s = self._running.get(message_id), 0.0
            if pull is None:
                if len(self._running.keys() & message_ids) >= MOST_SLOW:
                    continue
                pull, patience_s = _Pull(self._grid, message_id), self._patience_s
                self._running[message_id] = pull
            if not pull.over.wait(patience_s):
                continue
            del self._running[message_id]
            if pull.failure is not None:
                raise pull.failure
            if pull.replies:
                yield message_id, pull.replies.pop()


class _Pull:
    """One call of `pull_messages` in a thread that dies with the process."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        self.over = threading.Event()
        self.replies: list[Message] = []
        self.failure: Exception | None = None
        threading.Thread(target=self._run, args=(grid, message_id), daemon=True).start()

    def _run(self, grid: Grid, message_id: str) -> None:
        try:
            self.replies.extend(grid.pull_messages([message_id]))
        except Exception as failure:  # raised again in the thread that waits
            self.failure = failure
        finally:
            self.over.set()
