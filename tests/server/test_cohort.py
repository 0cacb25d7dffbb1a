"""One signed exchange: who counts as a site, and why an answer does not count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from common.compatibility import running_release
from common.errors import AdapterInvalid
from common.protocol import Header, Stage
from common.protocol import Message as SignedMessage
from server.cohort import Cohort, Outcome
from server.round import hello_request
from tests.simulator import SITES, Consortium, NodeDown, SimulatedGrid, build, server_identity


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Consortium]:
    made = build(tmp_path, mode="plain")
    with server_identity():
        yield made
    made.close()


def cohort(world: Consortium, grid: SimulatedGrid | None = None) -> Cohort:
    return Cohort(
        grid or SimulatedGrid(world), world.study, clock=world.clock, sleep=lambda seconds: None,  # type: ignore[arg-type]
        patience_s=0.05,
    )  # fmt: skip


def greet(
    world: Consortium,
    among: Cohort,
    accept: Callable[[str, SignedMessage], None] = lambda site, reply: None,
    sites: Iterable[str] = SITES,
    *,
    grace_s: float = 0.0,
) -> Outcome:
    among.present(wait_s=0.0, at_least=1)
    requests = {
        site: hello_request(world.operator, world.study, site, train=True, release=running_release())
        for site in sites
    }
    return among.exchange(requests, accept=accept, until_unix_s=world.clock() + 600, grace_s=grace_s)


def test_all_answers_are_verified_and_handed_over_one_by_one(world: Consortium) -> None:
    got: dict[str, str] = {}
    among = cohort(world)
    outcome = greet(world, among, lambda site, reply: got.__setitem__(site, reply.header.sender))
    assert outcome == Outcome(tuple(sorted(SITES)), {})
    assert got == {site: site for site in SITES}
    assert among.traffic.messages == {"hello-down": 4, "hello-up": 4}


def test_a_site_that_is_not_connected_is_named(world: Consortium) -> None:
    world.away.add("beta")
    outcome = greet(world, cohort(world))
    assert outcome.missing == {"beta": "not connected"}


def test_waiting_ends_with_the_deadline_or_when_enough_are_there(world: Consortium) -> None:
    world.away |= {"beta", "gamma"}
    start = world.clock()
    assert cohort(world).present(wait_s=1000.0, at_least=4) == ("alpha", "delta")
    assert world.clock() >= start + 1000
    world.away.clear()
    waited = world.clock()
    assert len(cohort(world).present(wait_s=1000.0, at_least=4)) == 4
    assert world.clock() == waited


def test_an_answer_that_does_not_come_is_named(world: Consortium) -> None:
    world.before = lambda to, header, request: None if to == "beta" else request
    assert greet(world, cohort(world)).missing == {"beta": "no answer before the deadline"}


def test_a_site_whose_process_failed_is_named_and_looked_for_again(world: Consortium) -> None:
    def before(to: str, header: Header, request: bytes) -> bytes:
        if to == "beta":
            raise NodeDown("killed")
        return request

    world.before = before
    among = cohort(world)
    assert greet(world, among).missing["beta"].startswith("NodeFailed")
    world.before = lambda to, header, request: request
    assert greet(world, among).missing == {}


def test_a_signed_refusal_is_named_with_its_error(world: Consortium) -> None:
    def renamed(to: str, header: Header, request: bytes) -> bytes:
        if to == "beta":
            (world.out / "sites" / "beta" / "site.json").write_text("{}")
            world.agent("beta").home.bases.clear()
        return request

    world.agent("beta")
    world.before = renamed
    reason = greet(world, cohort(world)).missing["beta"]
    assert reason.startswith("SiteRefused: BaseInvalid")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda reply: reply[:-1] + b"\0", "BodyHashMismatch"),
        (lambda reply: reply[:50], "EnvelopeMalformed"),
        (lambda reply: b"", "EnvelopeMalformed"),
        (lambda reply: reply + bytes(64 << 20), "BodyTooLarge"),
    ],
)
def test_an_answer_altered_on_the_way_does_not_count(
    world: Consortium, change: Callable[[bytes], bytes], error: str
) -> None:
    world.after = lambda of, header, reply: change(reply) if of == "beta" else reply
    outcome = greet(world, cohort(world))
    assert outcome.missing["beta"].startswith(error) and len(outcome.answered) == 3


def test_the_answer_to_an_earlier_request_does_not_count(world: Consortium) -> None:
    kept: dict[str, bytes] = {}
    world.after = lambda of, header, reply: kept.setdefault(of, reply)
    among = cohort(world)
    assert greet(world, among).missing == {}
    outcome = greet(world, among)
    assert outcome.answered == ()
    assert all(reason.startswith("MessageReplayed") for reason in outcome.missing.values())


def test_what_accept_refuses_makes_a_missing_site(world: Consortium) -> None:
    def accept(site: str, reply: SignedMessage) -> None:
        if site == "beta":
            raise AdapterInvalid("wrong length")

    outcome = greet(world, cohort(world), accept)
    assert outcome.missing == {"beta": "AdapterInvalid: wrong length"}


class OddGrid(SimulatedGrid):
    """A transport on which one node answers with what Flower never promised to keep out."""

    def __init__(self, world: Consortium, stage: str, content: RecordDict | Error) -> None:
        super().__init__(world)
        self._odd = stage, content

    def _serve(self, message_id: str, message: Message) -> dict[str, Message]:
        record: Any = message.content["fedrad"]
        stage, content = self._odd
        if message.metadata.dst_node_id == 102 and record["stage"] == stage:
            return {message_id: Message(content, reply_to=message)}
        return super()._serve(message_id, message)


ODD = [
    RecordDict({}),
    RecordDict({"fedrad": ConfigRecord({})}),
    RecordDict({"fedrad": ConfigRecord({"site": 5, "envelope": "text"})}),
    RecordDict({"other": ConfigRecord({"site": "beta"})}),
]


@pytest.mark.parametrize("content", ODD)
def test_a_node_that_answers_nonsense_to_a_request_is_a_missing_site(
    world: Consortium, content: RecordDict
) -> None:
    outcome = greet(world, cohort(world, OddGrid(world, Stage.HELLO.value, content)))
    assert set(outcome.missing) == {"beta"} and len(outcome.answered) == 3


@pytest.mark.parametrize("content", ODD)
def test_a_node_that_does_not_say_who_it_is_is_no_site(world: Consortium, content: RecordDict) -> None:
    assert "beta" not in cohort(world, OddGrid(world, "whoami", content)).present(wait_s=0.0, at_least=4)


@pytest.mark.parametrize("claims", ["alpha", "mallory"])
def test_a_node_that_claims_anothers_name_does_not_take_its_place(world: Consortium, claims: str) -> None:
    content = RecordDict({"fedrad": ConfigRecord({"site": claims})})
    outcome = greet(world, cohort(world, OddGrid(world, "whoami", content)))
    assert "alpha" in outcome.answered and outcome.missing == {"beta": "not connected"}


# --- replies that Flower loses or delays --------------------------------------------------------------------


class LossyGrid(SimulatedGrid):
    """Flower after a cut upload: beta's first replies to a request are lost, with an error or in silence."""

    def __init__(self, world: Consortium, *, losses: int, code: int | None) -> None:
        super().__init__(world)
        self.losses, self.code = losses, code
        self.times = 0

    def _serve(self, message_id: str, message: Message) -> dict[str, Message]:
        record: Any = message.content["fedrad"]
        replies = super()._serve(message_id, message)
        if message.metadata.dst_node_id == 102 and record["stage"] != "whoami":
            self.times += 1
            if self.times <= self.losses:
                lost = Message(Error(self.code or 0, "lost"), reply_to=message)
                return {} if self.code is None else {message_id: lost}
        return replies

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [self._replies.pop(name) for name in sorted(message_ids) if name in self._replies]
        self._world.clock.now += 0 if ready else 50
        return ready


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_reply_that_flower_lost_is_asked_for_again(world: Consortium, code: int) -> None:
    grid = LossyGrid(world, losses=2, code=code)
    assert greet(world, cohort(world, grid)) == Outcome(tuple(sorted(SITES)), {})
    assert grid.times == 3


def test_a_reply_lost_three_times_makes_a_missing_site(world: Consortium) -> None:
    grid = LossyGrid(world, losses=9, code=3)
    assert greet(world, cohort(world, grid)).missing["beta"].startswith("NodeFailed: Flower error 3")
    assert grid.times == 3


def test_an_error_of_the_client_app_is_not_asked_away(world: Consortium) -> None:
    grid = LossyGrid(world, losses=9, code=2)
    assert set(greet(world, cohort(world, grid)).missing) == {"beta"}
    assert grid.times == 1


def test_a_node_that_lives_but_has_lost_its_reply_in_silence_is_asked_again(world: Consortium) -> None:
    grid = LossyGrid(world, losses=1, code=None)
    start = world.clock()
    assert greet(world, cohort(world, grid)) == Outcome(tuple(sorted(SITES)), {})
    assert grid.times == 2
    assert 300 <= world.clock() - start < 600  # half of the time, then one question


def test_no_object_is_pushed_that_a_site_could_have_named_before(world: Consortium) -> None:
    pushed: list[set[str]] = []

    class Noting(SimulatedGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            pushed.append({name for one in messages for name in get_all_nested_objects(one)})
            return super().push_messages(messages)

    for _ in range(2):
        greet(world, cohort(world, Noting(world)))
    assert len(pushed) == 4 and not set.union(*pushed[:2]) & set.union(*pushed[2:])


# --- a grace for slow sites ---------------------------------------------------------------------------------


def test_a_site_at_work_is_waited_for_past_the_deadline(world: Consortium) -> None:
    world.wait_s, world.takes_s = 20.0, {("beta", "hello"): 1000.0}
    among, start = cohort(world), world.clock()
    assert greet(world, among, grace_s=600) == Outcome(tuple(sorted(SITES)), {})
    assert 1000 <= world.clock() - start < 1100
    assert list(late := among.take_late()) == ["beta"] and 400 <= late["beta"] < 500
    assert among.take_late() == {}


def test_nobody_is_waited_for_after_the_grace(world: Consortium) -> None:
    world.wait_s, world.takes_s = 20.0, {("beta", "hello"): 5000.0}
    start = world.clock()
    assert greet(world, cohort(world), grace_s=600).missing == {"beta": "no answer within the grace"}
    assert 1200 <= world.clock() - start < 1300


def test_a_site_that_is_gone_at_the_deadline_gets_no_grace(world: Consortium) -> None:
    world.wait_s, world.takes_s = 20.0, {("beta", "hello"): 1000.0}

    def before(to: str, header: Header, request: bytes) -> bytes:
        world.away.add("beta")  # with the request
        return request

    world.before = before
    start = world.clock()
    assert greet(world, cohort(world), grace_s=6000).missing == {"beta": "no answer before the deadline"}
    assert world.clock() - start < 800


def test_a_site_that_goes_in_the_grace_is_given_up_then(world: Consortium) -> None:
    world.wait_s, world.takes_s = 20.0, {("beta", "hello"): 5000.0}
    start = world.clock()

    def watch() -> None:
        if world.clock() > start + 1500:
            world.away.add("beta")

    among = Cohort(
        SimulatedGrid(world), world.study, clock=world.clock, sleep=lambda seconds: None, watch=watch,  # type: ignore[arg-type]
        patience_s=0.05,
    )  # fmt: skip
    assert greet(world, among, grace_s=6000).missing == {"beta": "no answer before the deadline"}
    assert 1500 < world.clock() - start < 1700


def test_a_node_with_nothing_left_to_send_gets_no_grace(world: Consortium) -> None:
    grid = LossyGrid(world, losses=9, code=None)
    start = world.clock()
    outcome = greet(world, cohort(world, grid), grace_s=60_000)
    assert outcome.missing == {"beta": "no answer before the deadline"} and grid.times == 3
    assert world.clock() - start < 2000


class TricklingGrid(SimulatedGrid):
    """Flower while beta's reply has begun to arrive: it waits in the pull of it until `release`."""

    def __init__(self, world: Consortium) -> None:
        super().__init__(world)
        self.release = threading.Event()
        self.pulled: list[int] = []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = super().pull_messages(message_ids)
        self.pulled.append(len(ready))
        if any(
            reply.metadata.src_node_id == 102 and "envelope" in reply.content["fedrad"] for reply in ready
        ):
            self.release.wait(20)
        return ready


def test_a_reply_that_trickles_in_keeps_neither_the_others_nor_the_deadline_waiting(
    world: Consortium,
) -> None:
    grid = TricklingGrid(world)

    def sleep(seconds: float) -> None:
        world.clock.now += 50

    among = Cohort(grid, world.study, clock=world.clock, sleep=sleep, patience_s=0.05)  # type: ignore[arg-type]
    outcome = greet(world, among)
    grid.release.set()
    assert outcome.missing == {"beta": "no answer before the deadline"} and len(outcome.answered) == 3


def test_a_slow_reply_that_gets_through_in_time_counts(world: Consortium) -> None:
    grid = TricklingGrid(world)
    timer = threading.Timer(0.3, grid.release.set)
    timer.start()
    among = Cohort(
        grid, world.study, clock=world.clock, sleep=lambda seconds: time.sleep(0.05), patience_s=0.05  # type: ignore[arg-type]
    )  # fmt: skip
    world.clock.now = 0.0
    assert greet(world, among).missing == {}
    assert max(grid.pulled) == 1


def test_a_bad_answer_of_a_node_that_has_gone_meanwhile_is_a_missing_site(world: Consortium) -> None:
    among = cohort(world)
    world.after = lambda of, header, reply: reply[:50] if of == "beta" else reply
    outcome = greet(world, among, lambda site, reply: among._nodes.pop("beta", None))
    assert outcome.missing["beta"].startswith("EnvelopeMalformed") and len(outcome.answered) == 3
