from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.compatibility import (
    Speaks,
    agree,
    format_speaks,
    parse_speaks,
    this_release,
)
from common.errors import EnvelopeMalformed, VersionsTooFarApart
from common.protocol import VERSION


def release(number: int) -> Speaks:
    """Release n speaks protocol n and the one before, as every release does."""
    return Speaks(max(1, number - 1), number, f"0.{number}.0")


spans = st.tuples(st.integers(1, 30), st.integers(0, 5)).map(lambda t: Speaks(t[0], t[0] + t[1], "0.1.0"))


def test_neighbouring_releases_work_together_whichever_side_is_ahead() -> None:
    assert agree(release(4), release(3)) == 3
    assert agree(release(3), release(4)) == 3
    assert agree(release(4), release(4)) == 4


def test_a_site_two_releases_behind_is_told_to_upgrade() -> None:
    with pytest.raises(VersionsTooFarApart, match="upgrade the site to a release that speaks version 4"):
        agree(release(5), release(3))


def test_a_server_two_releases_behind_is_told_to_upgrade() -> None:
    with pytest.raises(VersionsTooFarApart, match="upgrade the server to a release that speaks version 4"):
        agree(release(3), release(5))


@given(spans, spans)
def test_both_sides_come_to_the_same_version_or_the_same_refusal(a: Speaks, b: Speaks) -> None:
    def outcome(server: Speaks, site: Speaks) -> int | None:
        try:
            return agree(server, site)
        except VersionsTooFarApart:
            return None

    version = outcome(a, b)
    assert version == outcome(b, a)
    common = set(range(a.oldest, a.newest + 1)) & set(range(b.oldest, b.newest + 1))
    assert version == max(common, default=None)


def test_one_side_at_a_time_can_be_upgraded_from_release_to_release() -> None:
    """Server first, then the sites one by one: at each step every pair works."""
    for number in range(1, 6):
        for server, site in ((number, number), (number + 1, number), (number + 1, number + 1)):
            agree(release(server), release(site))


def test_this_release_speaks_its_own_version() -> None:
    assert agree(this_release("0.1.0"), this_release("0.1.0")) == VERSION


@given(spans)
def test_what_is_said_is_what_is_read(speaks: Speaks) -> None:
    assert parse_speaks(format_speaks(speaks)) == speaks


@pytest.mark.parametrize(
    "value",
    [
        None, {}, {"oldest": 2, "newest": 1, "software": "x"}, {"oldest": 0, "newest": 1, "software": "x"},
        {"oldest": True, "newest": 1, "software": "x"}, {"oldest": 1, "newest": 1, "software": "a b"},
        {"oldest": 1, "newest": 1, "software": ""}, {"oldest": 1, "newest": 1, "software": "x", "more": 1},
        {"oldest": 1, "newest": 1 << 30, "software": "x"},
    ],
)  # fmt: skip
def test_a_malformed_offer_is_refused(value: Any) -> None:
    with pytest.raises(EnvelopeMalformed):
        parse_speaks(value)
