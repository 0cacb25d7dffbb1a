from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from common.canonical import canonical_json
from common.errors import CheckpointInvalid, SignatureInvalid
from common.privacy.mechanism import ServedRound, View
from common.privacy.study_plan import plan_of
from server.status import MAX_CURVE_POINTS, find_studies, is_held, read_view, reason_name
from tests.server.study_folder import eventful, log, serve_round, write_folder


def test_a_study_that_nobody_ran_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    view = read_view(tmp_path)
    assert (view.state, view.rounds_done, view.release_epsilon) == ("not started", 0, 0.0)
    assert view.missing_now == {}


def test_the_view_names_who_is_missing_why_and_what_to_do(tmp_path: Path) -> None:
    eventful(tmp_path)
    view = read_view(tmp_path)
    assert view.missing_now == {"east": "BudgetExceeded"}
    east, west = view.sites[1], view.sites[3]
    assert "only the site" in east.advice
    assert (west.serves, west.absences, west.rounds_served) == (True, {"not-connected": 2}, 7)
    assert [(one.round, one.attempt, one.missing) for one in view.failed] == [
        (6, 1, {"north": "no-answer", "south": "NodeFailed"})
    ]


def test_a_site_without_keys_is_told_with_the_reason_it_went_away_for(tmp_path: Path) -> None:
    study = write_folder(tmp_path)
    serve_round(tmp_path, study, 0, missing={"east": "NodeFailed: Flower error 2: StudyNotApproved: none"})
    serve_round(tmp_path, study, 1, missing={"east": "no keys for this round: it joins the next"})
    assert read_view(tmp_path).missing_now == {"east": "StudyNotApproved"}


def test_a_late_site_serves_and_one_too_slow_for_the_grace_is_missing(tmp_path: Path) -> None:
    study = write_folder(tmp_path)
    serve_round(tmp_path, study, 0, late={"west": 12.0})
    serve_round(tmp_path, study, 1, missing={"east": "no answer within the grace"}, late={"south": 95.5})
    view = read_view(tmp_path)
    assert {site.site: site.late_s for site in view.sites} == {
        "north": 0.0, "east": 0.0, "south": 95.5, "west": 0.0,
    }  # fmt: skip
    assert view.missing_now == {"east": "too-slow"} and "grace_s" in view.sites[1].advice
    assert view.grace_s == 600.0


def test_before_the_first_round_the_sites_that_were_not_ready_are_missing(tmp_path: Path) -> None:
    write_folder(tmp_path)
    log(tmp_path, "site-not-ready", site="south", reason="SiteRefused: DataInsufficient: no data")
    assert read_view(tmp_path).missing_now == {"south": "DataInsufficient"}


def test_release_epsilon_is_that_of_the_plan_over_the_records(tmp_path: Path) -> None:
    study = eventful(tmp_path)
    view = read_view(tmp_path)
    served = [ServedRound(len(one.contributors), 4e5) for one in view.rounds]
    assert view.release_epsilon == plan_of(study).epsilon(View.RELEASE, served)
    assert 0 < view.release_epsilon < study.privacy.release_epsilon
    assert [point.epsilon for point in view.curve] == sorted(point.epsilon for point in view.curve)


def test_the_curve_has_few_points_however_many_rounds_there_are(tmp_path: Path) -> None:
    study = write_folder(tmp_path, rounds=60)
    for round in range(60):
        serve_round(tmp_path, study, round)
    view = read_view(tmp_path)
    assert len(view.curve) <= MAX_CURVE_POINTS + 1
    assert view.curve[-1].rounds == 60


def test_a_failed_attempt_counts_in_the_bound_of_a_site_that_was_there(tmp_path: Path) -> None:
    eventful(tmp_path)
    epsilon = {site.site: site.epsilon for site in read_view(tmp_path).sites}
    assert epsilon["north"] > epsilon["west"] > 0  # ten attempts against eight


def test_what_a_site_signed_in_the_ledger_goes_before_the_bound(tmp_path: Path) -> None:
    study = eventful(tmp_path)
    part = {"site": "north", "epsilon": 1.25}
    body = {"outcome": "released", "number": 8, "release_epsilon": 2.5, "participations": [part]}
    entry = {"kind": "round", "study": study.sha256, "body": body}
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "entries.jsonl").write_bytes(canonical_json(entry) + b"\n")
    view = read_view(tmp_path)
    north, south = view.sites[0], view.sites[2]
    assert (north.epsilon, north.epsilon_signed, south.epsilon_signed) == (1.25, True, False)
    assert view.release_epsilon == 2.5


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("not connected", "not-connected"),
        ("SiteRefused: BudgetExceeded: Erika Mustermann", "BudgetExceeded"),
        ("NodeFailed: Flower error 2: gone", "NodeFailed"),
        ("SiteRefused: Erika Mustermann", "SiteRefused"),
        ("Erika: Mustermann", "other"),
        ("ErikaMustermann: x", "other"),
        ("", "other"),
    ],
)
def test_a_reason_is_one_of_our_words_and_never_a_sites_text(text: str, name: str) -> None:
    assert reason_name(text) == name


def test_every_reason_with_advice_is_one_that_can_occur() -> None:
    from common import errors
    from server import status

    ours = {*status._PLAIN_REASONS.values(), "NodeFailed"}
    assert all(name in ours or hasattr(errors, name) for name in status._ADVICE)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    eventful(tmp_path)
    before = read_view(tmp_path)
    for name in ("log.jsonl", "records.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"event": "rou')
    assert read_view(tmp_path) == before


def test_reading_changes_nothing(tmp_path: Path) -> None:
    eventful(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read_view(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_held_lock_is_seen_without_being_taken(tmp_path: Path) -> None:
    eventful(tmp_path)
    assert read_view(tmp_path).state == "stopped"
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert is_held(tmp_path / "lock") is True
        assert read_view(tmp_path).state == "running"
    assert is_held(tmp_path / "lock") is False


def test_where_the_system_tells_no_locks_the_state_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert is_held(tmp_path / "lock", locks=tmp_path / "none") is None


def test_a_finished_study_is_finished(tmp_path: Path) -> None:
    eventful(tmp_path)
    log(tmp_path, "finished", rounds=14, adapter="0" * 64)
    assert read_view(tmp_path).state == "finished"


def test_plain_studies_claim_no_epsilon(tmp_path: Path) -> None:
    study = write_folder(tmp_path, mode="plain")
    serve_round(tmp_path, study, 0)
    view = read_view(tmp_path)
    assert (view.release_epsilon, view.delta, view.curve) == (None, None, ())
    assert all(site.epsilon is None for site in view.sites)


def test_studies_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / "studies" / name, id=name)
    assert [path.name for path in find_studies(tmp_path)] == ["one", "two"]
    assert find_studies(tmp_path / "studies" / "one") == [tmp_path / "studies" / "one"]
    with pytest.raises(CheckpointInvalid):
        find_studies(tmp_path / "studies" / "one" / "keys")


def test_a_manifest_that_the_operator_did_not_sign_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    value = json.loads((tmp_path / "study.json").read_bytes())
    value["study"]["purpose"] = "something else"
    (tmp_path / "study.json").write_bytes(canonical_json(value))
    with pytest.raises(SignatureInvalid):
        read_view(tmp_path)
