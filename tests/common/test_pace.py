"""How often an asker may ask, and that another's asking is not its own."""

from __future__ import annotations

import pytest

from common.errors import TooFrequent
from common.pace import MAX_ASKERS, Pace


def test_each_asker_has_its_own_rate() -> None:
    now = [0.0]
    pace = Pace(burst=2, per_minute=60, clock=lambda: now[0])
    for _ in range(2):
        pace.take("north")
    with pytest.raises(TooFrequent):
        pace.take("north")
    pace.take("south")
    now[0] = 1.0
    pace.take("north")
    with pytest.raises(TooFrequent):
        pace.take("north")


def test_what_is_kept_does_not_grow_with_the_askers() -> None:
    pace = Pace(burst=1, per_minute=1, clock=lambda: 0.0)
    for number in range(MAX_ASKERS + 50):
        pace.take(str(number))
    assert len(pace._buckets) == MAX_ASKERS
    with pytest.raises(TooFrequent):
        pace.take(str(MAX_ASKERS))
    pace.take("0")  # asked longest ago: forgotten
