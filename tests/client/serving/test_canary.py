"""The canary's verdict is a pure function of what was measured; its studies never change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.serving.canary import STUDIES, CanaryFigures, canary_faults, canary_pictures
from common.canonical import sha256_hex

GOOD = CanaryFigures(
    answers=STUDIES, loops=0, not_finite=0, empty=0, cut=1, distinct=8, median_s=1.0, median_tokens=30.0,
    mean_uncertainty=0.1,
)  # fmt: skip


def test_the_same_or_better_passes() -> None:
    assert canary_faults(GOOD, GOOD) == []
    assert canary_faults(GOOD, replace(GOOD, cut=0, median_s=0.5, distinct=7)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": 7}, "answered 7"),
        ({"not_finite": 1}, "not finite"),
        ({"empty": 1}, "empty"),
        ({"loops": 2}, "circle"),
        ({"cut": 4}, "cut"),
        ({"distinct": 1}, "same text"),
        ({"median_s": 4.0}, "took 4.00 s"),
    ],
)
def test_each_way_of_being_worse_is_named(change: dict[str, float], said: str) -> None:
    (fault,) = canary_faults(GOOD, replace(GOOD, **change))  # type: ignore[arg-type]
    assert said in fault


def test_the_canary_studies_are_fixed_and_differ() -> None:
    pictures = canary_pictures()
    assert len({picture.sha256 for picture in pictures}) == STUDIES
    assert [p.sha256 for p in canary_pictures()] == [p.sha256 for p in pictures]
    assert all(picture.sha256 == sha256_hex(picture.pixels.tobytes()) for picture in pictures)
