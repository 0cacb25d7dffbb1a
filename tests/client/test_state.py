"""What a site has served: one request per place, the same answer to it, nothing lost in a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.state import Seen, SiteState
from common.errors import RoundAlreadyServed
from common.protocol import Envelope, Header, Kind, Stage

STUDY = "ab" * 32
REPLY = Envelope(b"FRM1" + bytes(4 + 64), b"reply")


def header(round: int = 3, attempt: int = 1, stage: Stage = Stage.CONTRIBUTE) -> Header:
    return Header(
        1, STUDY, round, attempt, stage, Kind.REQUEST, "server", "alpha", "12" * 16, "", STUDY, 0, "cd" * 32
    )


def names(directory: Path) -> list[str]:
    return sorted(p.name for part in ("begun", "spool") for p in (directory / part).iterdir())


@pytest.fixture
def state(tmp_path: Path) -> SiteState:
    return SiteState(tmp_path / "state", study=STUDY)


def again(tmp_path: Path) -> SiteState:
    return SiteState(tmp_path / "state", study=STUDY)


def test_a_new_site_has_seen_the_study_only(state: SiteState) -> None:
    assert state.seen() == Seen(-1, STUDY, "")


def test_history_survives_a_restart(state: SiteState, tmp_path: Path) -> None:
    state.see(Seen(4, "ef" * 32, "12" * 32))
    assert again(tmp_path).seen() == Seen(4, "ef" * 32, "12" * 32)


def test_a_request_begun_gets_its_first_seed_again_after_a_crash(state: SiteState, tmp_path: Path) -> None:
    assert state.begin(header(), "aa", b"1" * 32) == b"1" * 32
    assert again(tmp_path).begin(header(), "aa", b"2" * 32) == b"1" * 32
    assert again(tmp_path).spooled(header(), "aa") is None


def test_a_finished_request_gets_its_bytes_again(state: SiteState, tmp_path: Path) -> None:
    state.begin(header(), "aa", b"1" * 32)
    state.spool(header(), REPLY)
    assert again(tmp_path).spooled(header(), "aa") == REPLY


def test_another_request_for_the_same_place_is_refused(state: SiteState, tmp_path: Path) -> None:
    state.begin(header(), "aa", b"1" * 32)
    for attempt in (state, again(tmp_path)):
        with pytest.raises(RoundAlreadyServed):
            attempt.begin(header(), "bb", b"2" * 32)
        with pytest.raises(RoundAlreadyServed):
            attempt.spooled(header(), "bb")


@pytest.mark.parametrize("place", [{"round": 4}, {"attempt": 2}, {"stage": Stage.UNMASK}])
def test_other_places_are_free(state: SiteState, place: dict[str, Any]) -> None:
    state.begin(header(), "aa", b"1" * 32)
    assert state.begin(header(**place), "bb", b"2" * 32) == b"2" * 32


def test_the_last_attempt_is_known_after_a_restart(state: SiteState, tmp_path: Path) -> None:
    assert state.last_attempt(3) == 0
    for attempt in (1, 3, 12):
        state.begin(header(attempt=attempt), "aa", b"1" * 32)
    assert again(tmp_path).last_attempt(3) == 12
    assert again(tmp_path).last_attempt(4) == 0


def test_replies_far_behind_the_history_are_deleted_and_near_ones_kept(
    state: SiteState, tmp_path: Path
) -> None:
    for round in range(5):
        state.begin(header(round=round), "aa", b"1" * 32)
        state.spool(header(round=round), REPLY)
    state.see(Seen(4, "ef" * 32, "12" * 32))
    assert [name[:6] for name in names(tmp_path / "state")] == ["000003", "000003", "000004", "000004"]


def test_seeds_are_readable_by_their_owner_only(state: SiteState, tmp_path: Path) -> None:
    state.begin(header(), "aa", b"1" * 32)
    state.spool(header(), REPLY)
    state.see(Seen(0, "ef" * 32, "12" * 32))
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
