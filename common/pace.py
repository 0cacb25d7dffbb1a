"""How often somebody may ask: a token bucket, and one per asker.

Guarantees: at most `burst` at once and `per_minute` in the long run, for each asker apart; what is kept does
not grow with the number of askers. It does not know who asks: the caller names the asker, and must not
believe a name that the asker chose.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from common.errors import TooFrequent

MAX_ASKERS = 4096


class TokenBucket:
    """Allows `burst` events at once and `per_minute` in the long run."""

    def __init__(self, *, burst: int, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._per_s, self._clock = float(burst), per_minute / 60.0, clock
        self._tokens, self._at = float(burst), clock()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Take one token; raises TooFrequent where there is none."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
            self._at = now
            if self._tokens < 1.0:
                raise TooFrequent(f"expected at most {60 * self._per_s:g} a minute, got more")
            self._tokens -= 1.0


class Pace:
    """A bucket for each asker; the one that asked longest ago is forgotten beyond MAX_ASKERS."""

    def __init__(self, *, burst: int, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._per_minute, self._clock = burst, per_minute, clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, asker: str) -> None:
        """Take one token of this asker's; raises TooFrequent where there is none."""
        with self._lock:
            bucket = self._buckets.pop(asker, None) or TokenBucket(
                burst=self._burst, per_minute=self._per_minute, clock=self._clock
            )
            self._buckets[asker] = bucket
            if len(self._buckets) > MAX_ASKERS:
                self._buckets.popitem(last=False)
        bucket.take()
