"""How fast one user may ask: a token bucket, with the clock passed in."""

from __future__ import annotations

import math
from collections import OrderedDict

from common.errors import TooManyRequests

_MOST_USERS = 10_000


class RateLimit:
    """At most `per_minute` requests a minute on average and `burst` at once, for each user."""

    def __init__(self, *, per_minute: float, burst: int) -> None:
        self._rate_s, self._burst = per_minute / 60.0, float(burst)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, user: str, *, now_s: float) -> None:
        """Count one request; raises TooManyRequests with the seconds to wait in `retry_after_s`."""
        left, then_s = self._left.pop(user, (self._burst, now_s))
        left = min(self._burst, left + (now_s - then_s) * self._rate_s)
        allowed = left >= 1.0
        self._left[user] = (left - 1.0 if allowed else left, now_s)
        while len(self._left) > _MOST_USERS:
            self._left.popitem(last=False)
        if not allowed:
            wait_s = math.ceil((1.0 - left) / self._rate_s) if self._rate_s else 3600
            raise TooManyRequests(f"expected fewer requests from this user; ask again in {wait_s} s")
