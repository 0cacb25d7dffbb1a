"""The round loop over a consortium in memory: sums, dropouts, failed rounds, kills and restarts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.compatibility import Speaks
from common.errors import CheckpointInvalid, RoundFailed, RunDirectoryBusy
from common.model.lora import vector_sha256
from common.protocol import Header, Kind, Stage
from common.records import verify_chain
from server.checkpoint import StudyDirectory, read_records
from server.status import reason_name
from tests.simulator import SITES, Consortium, NodeDown, build, refusal_of, split_message

Make = Callable[..., Consortium]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Build consortia and end their agents after the test."""
    worlds: list[Consortium] = []

    def build_one(**settings: Any) -> Consortium:
        worlds.append(build(tmp_path / str(len(worlds)), **settings))
        return worlds[-1]

    yield build_one
    for world in worlds:
        world.close()


def log(world: Consortium, event: str) -> list[dict[str, Any]]:
    lines = (world.server / "log.jsonl").read_text().splitlines()
    return [value for value in map(json.loads, lines) if value["event"] == event]


def silence(world: Consortium, site: str, stage: Stage, *rounds: int) -> None:
    """Let the network lose the site's requests of a stage in some rounds."""

    def before(to: str, header: Header, request: bytes) -> bytes | None:
        lost = to == site and header.stage is stage and header.round in rounds
        return None if lost else request

    world.before = before


# --- an undisturbed study -----------------------------------------------------------------------------------


def test_masked_training_equals_unmasked_bit_for_bit(make: Make) -> None:
    masked = make(mode="consortium", rounds=2).run()
    clear = make(mode="consortium", rounds=2, masking=False).run()
    assert vector_sha256(masked.adapter) == vector_sha256(clear.adapter)


def test_records_form_one_signed_chain_from_the_manifest_to_the_last_adapter(make: Make) -> None:
    world = make(mode="consortium", rounds=3)
    state = world.run()
    records = read_records(world.server)
    verify_chain(
        records, study=world.study.sha256, after_round=-1, previous=world.study.sha256,
        operator_key=world.operator.public,
    )  # fmt: skip
    assert [s.record.round for s in records] == [0, 1, 2]
    assert records[0].record.adapter_in == world.study.adapter.initial_sha256
    assert records[-1].record.adapter_out == vector_sha256(state.adapter)
    assert all(s.record.contributors == tuple(sorted(SITES)) for s in records)


def test_a_masked_round_takes_two_exchanges_in_steady_state(make: Make) -> None:
    world = make(mode="consortium", rounds=3)
    world.run()
    for site in SITES:
        stages = Counter(stage for to, stage, _, _ in world.sent if to == site)
        assert stages == {
            Stage.HELLO: 1, Stage.KEYS: 1, Stage.SHARES: 1, Stage.CONTRIBUTE: 3, Stage.UNMASK: 3,
            Stage.WITNESS: 1,
        }  # fmt: skip


def test_a_plain_round_is_witnessed_before_the_sites_contribute(make: Make) -> None:
    world = make(mode="plain", rounds=3)
    world.run()
    stages = Counter(stage for _, stage, _, _ in world.sent)
    assert stages == {Stage.HELLO: 4, Stage.WITNESS: 16, Stage.CONTRIBUTE: 12}


def test_bytes_up_per_site_and_round_are_the_adapter_within_two_percent_and_headers(make: Make) -> None:
    world = make(mode="plain", rounds=2)
    world.run()
    traffic = json.loads((world.server / "traffic.json").read_text())
    size = traffic["adapter_bytes"]
    for direction in ("up", "down"):
        name = f"contribute-{direction}"
        each = traffic["bytes"][name] / traffic["messages"][name]
        assert size <= each <= 1.02 * size + 8192  # this adapter is tiny; headers and records are not


def test_mode_local_takes_several_noised_steps_and_moves_the_adapter(make: Make) -> None:
    world = make(mode="local", local_steps=3, rounds=2)
    state = world.run()
    assert vector_sha256(state.adapter) != world.study.adapter.initial_sha256
    assert np.isfinite(state.adapter).all()


def test_a_finished_study_run_again_changes_nothing(make: Make) -> None:
    world = make(mode="plain", rounds=2)
    first = world.run()
    second = world.run()
    assert vector_sha256(first.adapter) == vector_sha256(second.adapter)
    assert len(read_records(world.server)) == 2


@pytest.mark.parametrize("mode", ["plain", "consortium"])
def test_a_site_that_was_not_greeted_serves_a_resumed_attempt_to_the_studys_end(
    make: Make, mode: str
) -> None:
    world = make(mode=mode, rounds=1)

    def stop(site: str, header: Header, request: bytes) -> bytes:
        if header.stage is Stage.CONTRIBUTE and site == "gamma":
            raise KeyboardInterrupt
        return request

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run()
    lost: list[str] = []

    def lose(site: str, header: Header, request: bytes) -> bytes | None:
        if site == "beta" and header.stage is Stage.HELLO and not lost:
            lost.append(site)
            return None
        return request

    world.before = lose
    world.run()
    assert lost and "beta" in read_records(world.server)[0].record.contributors
    assert log(world, "finished")


def test_an_attempt_begun_before_there_was_a_grace_is_asked_as_it_was(make: Make) -> None:
    world = make(mode="consortium", rounds=1)
    seen: dict[str, list[bytes]] = {site: [] for site in SITES}

    def again(site: str, header: Header, request: bytes) -> bytes:
        if header.stage is Stage.CONTRIBUTE:
            seen[site].append(split_message(request)[2])
        return request

    def stop(site: str, header: Header, request: bytes) -> bytes:
        if again(site, header, request) and header.stage is Stage.CONTRIBUTE:
            raise KeyboardInterrupt
        return request

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run()
    path = world.server / "pending.json"
    before = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("grace_s", "versions")}
    path.write_text(json.dumps(before))
    world.before = again
    world.run()
    [signed] = read_records(world.server)
    assert signed.record.attempt == 1 and signed.record.contributors == tuple(sorted(SITES))
    deadline = b'"deadline_unix_s":%d' % before["deadline_unix_s"]
    assert deadline in seen["beta"][0] and deadline not in seen["alpha"][0]


# --- releases that differ -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "site", "version"),
    [((1, 2), (1, 1), 1), ((1, 1), (1, 2), 1), ((1, 2), (1, 2), 2), ((2, 3), (1, 2), 2)],
)
def test_neighbouring_releases_use_the_newest_version_that_both_speak(
    make: Make, server: tuple[int, int], site: tuple[int, int], version: int
) -> None:
    undisturbed = make(mode="consortium", rounds=2).run()
    world = make(mode="consortium", rounds=2)
    world.release = Speaks(*server, "0.2.0")
    world.releases = {name: Speaks(*server, "0.2.0") for name in SITES} | {"beta": Speaks(*site, "0.3.0")}
    used: set[tuple[str, bool, int]] = set()

    def note(of: str, header: Header, data: bytes) -> bytes:
        used.add((of, header.stage is Stage.HELLO, split_message(data)[0].version))
        return data

    world.before = world.after = note
    assert vector_sha256(world.run().adapter) == vector_sha256(undisturbed.adapter)
    assert {found for found in used if found[0] == "beta"} == {("beta", True, 1), ("beta", False, version)}
    assert {found for found in used if found[0] == "alpha"} == {
        ("alpha", True, 1),
        ("alpha", False, server[1]),
    }


@pytest.mark.parametrize(
    ("server", "site", "behind"), [((3, 4), (1, 1), "the site"), ((1, 1), (2, 3), "the server")]
)
def test_releases_too_far_apart_are_refused_and_told_whom_to_upgrade(
    make: Make, server: tuple[int, int], site: tuple[int, int], behind: str
) -> None:
    world = make(mode="consortium", rounds=1)
    world.release = Speaks(*server, "0.4.0")
    world.releases = {name: Speaks(*server, "0.4.0") for name in SITES} | {"beta": Speaks(*site, "0.1.0")}
    world.run()
    assert "beta" not in read_records(world.server)[0].record.contributors
    reason = log(world, "site-not-ready")[0]["reason"]
    assert (
        reason.startswith("SiteRefused: VersionsTooFarApart") and f"upgrade {behind} to a release" in reason
    )
    assert reason_name(reason) == "VersionsTooFarApart"


# --- sites that vanish --------------------------------------------------------------------------------------


def test_a_site_that_never_answers_is_named_and_the_round_goes_on(make: Make) -> None:
    world = make(mode="plain", rounds=2)
    world.wait_s = 60.0
    silence(world, "beta", Stage.CONTRIBUTE, 0)
    world.run()
    first, second = (signed.record for signed in read_records(world.server))
    assert first.contributors == ("alpha", "delta", "gamma")
    assert first.missing == {"beta": "no answer before the deadline"}
    assert log(world, "round")[0]["missing"] == first.missing
    assert second.contributors == tuple(sorted(SITES)) and second.missing == {}


def test_a_site_that_misses_a_masked_round_is_named_and_joins_the_next(make: Make) -> None:
    world = make(mode="consortium", rounds=3)
    world.wait_s = 60.0
    silence(world, "beta", Stage.CONTRIBUTE, 0)
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert ["beta" in record.contributors for record in records] == [False, True, True]
    assert records[0].missing == {"beta": "no answer before the deadline"}
    assert [record.attempt for record in records] == [1, 2, 1]  # keys for everyone, in exchanges of their own


def test_with_one_attempt_only_a_site_that_missed_a_round_waits_for_prepared_keys(make: Make) -> None:
    world = make(mode="consortium", rounds=3, max_attempts=1)
    silence(world, "beta", Stage.CONTRIBUTE, 0)
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert ["beta" in record.contributors for record in records] == [False, False, True]
    assert records[1].missing == {"beta": "no keys for this round"}


@pytest.mark.parametrize("mode", ["plain", "consortium"])
def test_the_slow_site_gets_the_grace_and_is_in_the_sum(make: Make, mode: str) -> None:
    undisturbed = make(mode=mode, rounds=2).run()
    world = make(mode=mode, rounds=2)
    world.wait_s, world.takes_s = 60.0, {("delta", "contribute"): 900.0}
    state = world.run()
    assert vector_sha256(state.adapter) == vector_sha256(undisturbed.adapter)
    for signed, line in zip(read_records(world.server), log(world, "round"), strict=True):
        assert signed.record.contributors == tuple(sorted(SITES)) and signed.record.attempt == 1
        assert list(line["late"]) == ["delta"] and 290 < line["late"]["delta"] < 420


def test_a_site_slower_than_the_grace_is_named_and_comes_back(make: Make) -> None:
    world = make(mode="plain", rounds=3, grace_s=100)
    world.wait_s, world.takes_s = 40.0, {("delta", "contribute"): 720.0}

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if header.round == 1 and of == "alpha":
            world.takes_s = {}
        return reply

    world.after = after
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert records[0].missing == {"delta": "no answer within the grace"}
    assert "delta" in records[-1].contributors


@pytest.mark.parametrize("stage", ["keys", "shares"])
def test_a_site_that_is_silent_before_the_contributions_costs_the_others_time_only(
    make: Make, stage: str
) -> None:
    world = make(mode="consortium", rounds=1)
    world.wait_s, world.takes_s = 60.0, {("delta", stage): 1e6}
    world.run()
    [signed] = read_records(world.server)
    assert signed.record.attempt == 1 and signed.record.contributors == ("alpha", "beta", "gamma")


def test_a_site_that_is_slow_to_get_ready_is_waited_for(make: Make) -> None:
    world = make(mode="consortium", rounds=1)
    world.wait_s, world.takes_s = 60.0, {("delta", "hello"): 900.0}
    world.run()
    [signed] = read_records(world.server)
    assert signed.record.contributors == tuple(sorted(SITES)) and signed.record.attempt == 1


def test_without_a_grace_the_deadline_ends_the_waiting(make: Make) -> None:
    world = make(mode="plain", rounds=1, grace_s=0)
    world.wait_s, world.takes_s = 40.0, {("delta", "contribute"): 700.0}
    world.run()
    assert read_records(world.server)[0].record.missing == {"delta": "no answer before the deadline"}


def test_with_one_attempt_only_a_site_that_dealt_and_is_not_ready_belongs_to_the_cohort(make: Make) -> None:
    world = make(mode="consortium", rounds=2, max_attempts=1)

    def stop(site: str, header: Header, request: bytes) -> bytes:
        if header.round == 1 and header.stage is Stage.CONTRIBUTE:
            raise KeyboardInterrupt
        return request

    world.before = stop
    with pytest.raises(KeyboardInterrupt):
        world.run()
    (world.server / "pending.json").unlink()  # killed just before the attempt was fixed
    silence(world, "beta", Stage.HELLO, 0)
    world.run()
    last = read_records(world.server)[-1].record
    assert last.cohort == tuple(sorted(SITES)) and last.attempt == 1
    assert last.missing["beta"] == "SiteRefused"  # its log was not where an unready site can be asked


def test_a_site_whose_answer_was_lost_is_asked_where_its_log_stands_and_the_round_is_served(
    make: Make,
) -> None:
    world = make(mode="consortium", rounds=1, min_sites=4)

    def after(site: str, header: Header, reply: bytes) -> bytes:
        if site == "beta" and header.stage is Stage.CONTRIBUTE and header.attempt == 1:
            raise NodeDown("killed after it had cosigned")
        return reply

    world.after = after
    world.run()
    [record] = [signed.record for signed in read_records(world.server)]
    assert "beta" in record.contributors and record.attempt == 2
    [failed] = log(world, "round-failed")
    assert list(failed["missing"]) == ["beta"], "sites that answered are not missing"


@pytest.mark.parametrize("restart", [False, True])
def test_a_site_that_has_dealt_for_a_round_and_goes_before_it_costs_the_others_nothing(
    make: Make, restart: bool
) -> None:
    world = make(mode="consortium", rounds=3)
    met: list[int] = []

    def after(site: str, header: Header, reply: bytes) -> bytes:
        if site == "beta" and header.stage is Stage.UNMASK and header.round == 0:
            world.away.add("beta")
        if site == "alpha" and header.stage is Stage.CONTRIBUTE and header.round == 1 and not met:
            met.append(header.round)
            if restart:
                raise KeyboardInterrupt
        return reply

    world.after = after
    if restart:
        with pytest.raises(KeyboardInterrupt):
            world.run()
        world.away.discard("beta")
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert met and [record.attempt for record in records][:2] == [1, 1]
    assert ("beta" in records[1].contributors) == restart
    assert restart or records[1].missing == {"beta": "not connected"}


def test_a_site_that_vanishes_after_its_upload_stays_in_the_sum(make: Make) -> None:
    world = make(mode="consortium", rounds=1)
    silence(world, "beta", Stage.UNMASK, 0)
    lost = world.run()
    undisturbed = make(mode="consortium", rounds=1).run()
    assert vector_sha256(lost.adapter) == vector_sha256(undisturbed.adapter)
    assert "beta" in read_records(world.server)[0].record.contributors


def test_a_dropout_gives_the_same_sum_masked_and_unmasked(make: Make) -> None:
    adapters = []
    for masking in (True, False):
        world = make(mode="consortium", rounds=1, masking=masking)
        silence(world, "gamma", Stage.CONTRIBUTE, 0)
        adapters.append(vector_sha256(world.run().adapter))
    assert adapters[0] == adapters[1]


def test_an_agent_that_dies_with_the_request_is_a_missing_site(make: Make) -> None:
    world = make(mode="plain", rounds=2)

    def before(to: str, header: Header, request: bytes) -> bytes:
        if to == "beta" and header.stage is Stage.CONTRIBUTE and header.round == 0:
            world.crash("beta")
            raise NodeDown("killed")
        return request

    world.before = before
    world.run()
    first, second = (signed.record for signed in read_records(world.server))
    assert "beta" not in first.contributors
    assert "beta" in second.contributors


def test_a_site_that_comes_after_the_start_is_greeted_and_contributes(make: Make) -> None:
    world = make(mode="consortium", rounds=4)
    world.away.add("beta")

    def after(site: str, header: Header, reply: bytes) -> bytes:
        if header.stage is Stage.UNMASK and header.round == 0:
            world.away.discard("beta")
        return reply

    world.after = after
    world.run()
    contributors = [record.record.contributors for record in read_records(world.server)]
    assert "beta" not in contributors[0]
    assert "beta" in contributors[-1]


@pytest.mark.parametrize("left", [True, False])
def test_nobody_waits_for_a_site_that_has_left_the_study_for_good(make: Make, left: bool) -> None:
    world = make(mode="consortium", rounds=1)
    world.away.add("beta")
    world.wait_s = 50.0
    world.expected = (lambda: ("alpha", "gamma", "delta")) if left else None
    start = world.clock()
    world.run()
    assert read_records(world.server)[0].record.contributors == ("alpha", "delta", "gamma")
    assert (world.clock() - start < 600) is left  # else the deadline is waited out


def test_a_site_away_for_a_round_joins_the_next(make: Make) -> None:
    world = make(mode="plain", rounds=3)

    def after(of: str, header: Header, reply: bytes) -> bytes | None:
        if of == "beta" and header.round == 0 and header.stage is Stage.CONTRIBUTE:
            world.away.add("beta")
            return None
        if header.round == 1 and header.stage is Stage.CONTRIBUTE:
            world.away.discard("beta")
        return reply

    world.after = after
    world.run()
    records = [signed.record for signed in read_records(world.server)]
    assert ["beta" in record.contributors for record in records] == [False, False, True]
    assert records[1].missing == {"beta": "not connected"}


def test_replies_altered_on_the_way_count_as_missing(make: Make) -> None:
    world = make(mode="plain", rounds=1)

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if of == "gamma" and header.stage is Stage.CONTRIBUTE:
            return reply[:-1] + bytes([reply[-1] ^ 1])
        return reply

    world.after = after
    world.run()
    record = read_records(world.server)[0].record
    assert record.contributors == ("alpha", "beta", "delta")
    assert record.missing == {"gamma": "BodyHashMismatch"}


def test_a_reply_replayed_from_an_earlier_round_counts_as_missing(make: Make) -> None:
    world = make(mode="plain", rounds=2)
    kept: dict[str, bytes] = {}

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if of == "gamma" and header.stage is Stage.CONTRIBUTE:
            return kept.setdefault(of, reply)
        return reply

    world.after = after
    world.run()
    assert read_records(world.server)[1].record.missing == {"gamma": "MessageReplayed"}


def test_a_masked_vector_altered_by_its_relay_is_not_in_the_sum(make: Make) -> None:
    world = make(mode="consortium", rounds=1)

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if of == "gamma" and header.stage is Stage.CONTRIBUTE:
            return reply[:-1] + bytes([reply[-1] ^ 1])
        return reply

    world.after = after
    altered = world.run()
    other = make(mode="consortium", rounds=1)
    silence(other, "gamma", Stage.CONTRIBUTE, 0)
    assert vector_sha256(altered.adapter) == vector_sha256(other.run().adapter)


def test_one_site_in_anothers_place_is_not_counted(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    kept: dict[str, bytes] = {}

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if header.stage is Stage.CONTRIBUTE:
            kept[of] = reply
            if of == "gamma":
                return kept["alpha"]
        return reply

    world.after = after
    world.run()
    assert read_records(world.server)[0].record.missing == {"gamma": "UnknownSender"}


# --- rounds that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "consortium"])
def test_a_round_below_its_floor_is_named_and_repeated(make: Make, mode: str) -> None:
    world = make(mode=mode, rounds=2)

    def before(to: str, header: Header, request: bytes) -> bytes | None:
        lost = to in ("beta", "gamma") and header.stage is Stage.CONTRIBUTE and header.round == 1
        return None if lost and header.attempt == 1 else request

    world.before = before
    world.run()
    (failed,) = log(world, "round-failed")
    assert (failed["round"], failed["attempt"], failed["floor"]) == (1, 1, 3)
    assert {"beta", "gamma"} <= set(failed["missing"])
    record = read_records(world.server)[1].record
    assert record.attempt == 2 and record.contributors == tuple(sorted(SITES))


def test_a_round_below_its_floor_ends_the_study_where_the_manifest_says_so(make: Make) -> None:
    world = make(mode="plain", rounds=2, on_failed_round="end")
    world.before = lambda to, header, request: (
        None if to in ("beta", "gamma") and header.stage is Stage.CONTRIBUTE else request
    )
    with pytest.raises(RoundFailed, match=r"beta.*gamma"):
        world.run()
    assert read_records(world.server) == []


def test_attempts_are_limited(make: Make) -> None:
    world = make(mode="plain", rounds=1, max_attempts=2)
    world.before = lambda to, header, request: (
        None if to in ("beta", "gamma") and header.stage is Stage.CONTRIBUTE else request
    )
    with pytest.raises(RoundFailed, match="max_attempts"):
        world.run()
    assert [failed["attempt"] for failed in log(world, "round-failed")] == [1, 2]


def test_too_few_sites_ready_ends_with_their_reasons(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    world.away |= {"beta", "gamma"}
    with pytest.raises(RoundFailed, match="min_sites"):
        world.run()


def test_a_refusing_site_is_logged_with_its_reason(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    (world.out / "sites" / "beta" / "studies" / world.study.sha256 / "approval.sig").unlink()
    world.run()
    event, *_ = log(world, "site-not-ready")  # said at the start, and when the round left it out
    assert event["site"] == "beta" and "StudyNotApproved" in event["reason"]


def test_a_spent_budget_ends_the_study_and_never_a_sites_promise(make: Make) -> None:
    world = make(mode="consortium", masking=False, rounds=1, spare_rounds=1, max_attempts=4)
    world.before = lambda to, header, request: (
        None if to in ("beta", "gamma") and header.stage is Stage.CONTRIBUTE else request
    )
    refused = []

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if header.kind is Kind.REQUEST and header.stage is Stage.CONTRIBUTE:
            refused.append(refusal_of(reply))
        return reply

    world.after = after
    with pytest.raises(RoundFailed):
        world.run()
    assert refused == ["", "", "", "", *["BudgetExceeded"] * 4]


# --- kills and restarts -------------------------------------------------------------------------------------


class Killed(BaseException):
    """The server process ends here."""


DURABLE = [
    "server.checkpoint.write_atomic",
    "server.checkpoint.append_durable",
    "server.checkpoint.sync_directory",
    "server.collect.write_atomic",
    "server.app.write_atomic",
]


def run_killed(world: Consortium, patch: pytest.MonkeyPatch, *, after_steps: int) -> bool:
    """Run the server and kill it right after its n-th durable step; returns whether it came that far."""
    done = 0

    def counting(real: Callable[..., None]) -> Callable[..., None]:
        def step(*args: Any, **kwargs: Any) -> None:
            nonlocal done
            real(*args, **kwargs)
            done += 1
            if done == after_steps:
                raise Killed

        return step

    with patch.context() as inner:
        for name in DURABLE:
            module, _, function = name.rpartition(".")
            inner.setattr(name, counting(getattr(__import__(module, fromlist=[function]), function)))
        try:
            world.run()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("mode", ["plain", "consortium"])
def test_a_server_killed_again_and_again_ends_with_the_same_adapter(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Each server process lives for a few durable steps only, a different number each time."""
    wanted = make(mode=mode, rounds=2).run()
    world = make(mode=mode, rounds=2)
    lives = 0
    while run_killed(world, monkeypatch, after_steps=7 + lives % 7):
        lives += 1
        assert lives < 40
    assert lives >= 2
    got = world.run()
    assert vector_sha256(got.adapter) == vector_sha256(wanted.adapter)
    assert [signed.record.attempt for signed in read_records(world.server)] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "consortium"])
def test_a_server_killed_after_any_durable_step_ends_with_the_same_adapter(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    wanted = make(mode=mode, rounds=2).run()
    step = 1
    while True:
        world = make(mode=mode, rounds=2)
        killed = run_killed(world, monkeypatch, after_steps=step)
        got = world.run()
        assert vector_sha256(got.adapter) == vector_sha256(wanted.adapter), f"killed after step {step}"
        assert [signed.record.attempt for signed in read_records(world.server)] == [1, 1]
        world.close()
        if not killed:
            break
        step += 1
    assert step > 12


def test_a_restart_asks_the_same_questions_byte_for_byte(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(mode="consortium", rounds=1)
    asked: list[dict[tuple[str, Stage], bytes]] = [{}, {}]

    def first(to: str, header: Header, request: bytes) -> bytes | None:
        asked[0][(to, header.stage)] = request
        if header.stage is Stage.CONTRIBUTE and to == "gamma":
            raise Killed
        return request

    def second(to: str, header: Header, request: bytes) -> bytes | None:
        asked[1][(to, header.stage)] = request
        return request

    world.before = first
    with pytest.raises(Killed):
        world.run()
    world.before = second
    world.run()
    for place, request in asked[0].items():
        if place[1] is not Stage.HELLO:
            assert asked[1].get(place, request) == request, place
    contributed = [place for place in asked[0] if place[1] is Stage.CONTRIBUTE]
    assert len(contributed) == 4 and all(place in asked[1] for place in contributed)


def test_budgets_are_charged_once_for_a_round_whatever_the_server_does(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(mode="consortium", rounds=2)
    for steps in (6, 8, 10):
        run_killed(world, monkeypatch, after_steps=steps)
    world.run()
    for site in SITES:
        budget = (world.out / "sites" / site / "budget.jsonl").read_text()
        assert budget.count('"kind":"charge"') == 2


def test_two_servers_on_one_study_are_refused(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    opened = StudyDirectory(world.server)
    with pytest.raises(RunDirectoryBusy):
        world.run()
    opened.close()
    world.run()


def test_an_altered_checkpoint_is_refused(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    world.run()
    path = world.server / "rounds" / "000000" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid):
        world.run()


def test_an_altered_first_adapter_is_refused(make: Make) -> None:
    world = make(mode="plain", rounds=1)
    path = world.server / "initial" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid):
        world.run()
