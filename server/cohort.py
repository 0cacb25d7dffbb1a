"""Which sites can be reached, and one signed exchange with them over Flower's Grid.

Guarantees: an answer counts only when the site's pinned key signed it for this very request; whatever a node
says of itself is a hint. A site that does not answer, fails or refuses is named with the reason, never
dropped in silence. One reply at a time is taken into memory, and one that only trickles in keeps neither the
others nor the deadline waiting. A reply that Flower lost is asked for again: the agent answers with the same
bytes, of which only those parts travel again that the SuperLink does not hold. An agent that is gone though
it answered before (it is being started again, mostly) is asked again for a minute. Past the deadline, where a
grace is given, it waits for sites that are still at work: the node is connected and has answered nothing that
it was asked since. It does not decide what an exchange means for the round.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import DEFAULT_TTL, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.config import Study
from common.errors import EnvelopeMalformed, FedRadError, RelayInvalid, SignatureInvalid, UnknownSender
from common.model.lora import vector_size
from common.protocol import SERVER, SPOKEN, Envelope, Expected, Kind, open_message, read_header, unpack_body
from common.protocol import Message as SignedMessage
from common.relay import PART_BYTES, RECORD, body_parts, join_envelope, split_envelope
from server.pulls import PATIENCE_S, Pulls

_FIRST_POLL_S = 0.002
_LAST_POLL_S = 0.25
_POLL_S_PER_MESSAGE = 0.05
_AT_WORK_EVERY_S = 5.0
_ASKED_AGAIN = 2
_AWAY_PAUSES_S = (2.0, 4.0, 8.0, 16.0, 30.0)
_LOST = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
}


_OF_ANOTHER = SignatureInvalid | EnvelopeMalformed | UnknownSender | RelayInvalid


class Traffic:
    """Bytes of signed messages by stage and direction, over all sites."""

    def __init__(self) -> None:
        self.messages: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def count(self, stage: str, direction: str, size: int) -> None:
        name = f"{stage}-{direction}"
        self.messages[name] = self.messages.get(name, 0) + 1
        self.bytes[name] = self.bytes.get(name, 0) + size


@dataclass(frozen=True)
class Outcome:
    """What an exchange brought: the sites whose replies were accepted, and why each other one's was not."""

    answered: tuple[str, ...]
    missing: dict[str, str]


Accept = Callable[[str, SignedMessage], None]


class Cohort:
    """The study's sites behind a Grid."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        watch: Callable[[], None] = lambda: None,
        spoken: range = SPOKEN,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._grid = grid
        self._study = study
        self._keys = {site.id: site.message_key for site in study.cohort.site}
        self._max_reply_bytes = 4 * vector_size(study.adapter.tensors) + (16 << 20)
        self._clock = clock
        self._sleep = sleep
        self._watch = watch
        self._spoken = spoken
        self._pulls = Pulls(grid, patience_s=patience_s)
        self._nodes: dict[str, int] = {}
        self._impostors: set[tuple[str, int]] = set()
        self._lively: set[str] = set()
        self.traffic = Traffic()
        self._seconds: dict[str, float] = {}
        self._late: dict[str, float] = {}

    def present(self, *, wait_s: float, at_least: int) -> tuple[str, ...]:
        """Find which sites are connected, waiting up to `wait_s` for `at_least` of them."""
        until = self._clock() + wait_s
        while True:
            self._find_nodes()
            if len(self._nodes) >= at_least or self._clock() >= until:
                return tuple(sorted(self._nodes))
            self._sleep(_LAST_POLL_S)

    def exchange(
        self, requests: Mapping[str, Envelope], *, accept: Accept, until_unix_s: float, grace_s: float = 0.0
    ) -> Outcome:
        """Send each site its signed request and hand each verified reply to `accept`, one at a time.

        grace_s: how much longer than until `until_unix_s` to wait for sites that are still at work then.
        A FedRadError of `accept` makes that site a missing one. Replies are not kept.
        """
        started = self._clock()
        missing = {site: "not connected" for site in requests if site not in self._nodes}
        asked = _Asked(
            requests, until_unix_s, until_unix_s + grace_s, question_unix_s=(started + until_unix_s) / 2
        )
        self._ask(asked, [site for site in sorted(requests) if site in self._nodes])
        answered = []
        for site, reply in self._replies(asked):
            try:
                if reply.has_error() and (
                    self._put_off(asked, site, str(reply.error.reason))
                    or self._ask_again(asked, site, reply.error.code)
                ):
                    continue
                envelope = _envelope(reply)
                del reply
                self.traffic.count(self._stage(requests[site]), "up", len(envelope))
                accept(site, self._verify(site, requests[site].sha256, envelope))
                del envelope
                answered.append(site)
                self._lively.add(site)
                if (late_s := self._clock() - until_unix_s) > 0:
                    self._late[site] = max(late_s, self._late.get(site, 0.0))
            except FedRadError as error:
                missing[site] = f"{error.code}: {error}"
                if isinstance(error, NodeFailed | _OF_ANOTHER):
                    node = self._nodes.pop(site, None)
                    if node is not None and not isinstance(error, NodeFailed):
                        self._impostors.add((site, node))  # another node may be the real one
            asked.settle(site)
        missing.update(asked.given_up)
        for site in asked.unanswered:
            missing[site] = "no answer within the grace" if grace_s else "no answer before the deadline"
        stages = [self._stage(request) for request in requests.values()]
        if stages:
            stage = max(sorted(set(stages)), key=stages.count)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + self._clock() - started
        return Outcome(tuple(sorted(answered)), missing)

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds spent in exchanges since last asked, by the stage that most sites were asked."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def take_late(self) -> dict[str, float]:
        """Return the sites that answered within a grace since last asked, with seconds past the deadline."""
        late, self._late = self._late, {}
        return late

    def _verify(self, site: str, request_sha256: str, envelope: Envelope) -> SignedMessage:
        message = open_message(
            envelope,
            keys=self._keys,
            expected=Expected(
                study=self._study.sha256, recipient=SERVER, sender=site, answers=request_sha256
            ),
            max_body_bytes=self._max_reply_bytes,
            spoken=self._spoken,
        )
        if message.header.kind is Kind.REFUSAL:
            meta, _ = unpack_body(message.body, fields={"error": str, "message": str})
            raise SiteRefused(f"{meta['error']}: {meta['message']}")
        return message

    def _stage(self, request: Envelope) -> str:
        return read_header(request, max_body_bytes=1 << 62, spoken=self._spoken).stage.value

    def _find_nodes(self) -> None:
        alive = set(self._grid.get_node_ids())
        self._nodes = {site: node for site, node in self._nodes.items() if node in alive}
        unknown = sorted(alive - set(self._nodes.values()))
        if not unknown:
            return
        messages = [_message(node, _whoami()) for node in unknown]
        ids = dict(zip(self._grid.push_messages(messages), unknown, strict=True))
        for message_id, reply in self._arriving(lambda: ids, until_unix_s=self._clock() + 30.0):
            site, node = _claimed_site(reply), ids.pop(message_id)
            if site in self._keys and (site, node) not in self._impostors:
                self._nodes.setdefault(site, node)

    # --- asking, and asking again -------------------------------------------------------------------------

    def _ask(self, asked: _Asked, sites: list[str]) -> None:
        """Push the sites' requests."""
        messages = []
        parts: list[bytes] = []
        salt = secrets.token_hex(8)
        for site in sites:
            request = asked.requests[site]
            stage = self._stage(request)
            if len(request) > PART_BYTES:
                parts = body_parts(request.body, like=parts)
            records = split_envelope(stage, request, parts, salt=salt)
            lasts_s = asked.end_unix_s - self._clock() + 600.0
            messages.append(_message(self._nodes[site], records, ttl_s=max(DEFAULT_TTL, lasts_s)))
            self.traffic.count(stage, "down", len(request))
        ids = self._grid.push_messages(messages) if messages else []
        asked.waiting |= dict(zip(ids, sites, strict=True))

    def _ask_again(self, asked: _Asked, site: str, code: int | None = None) -> bool:
        """Push a request again whose reply was lost; false where nobody is there, or it was done enough."""
        if code is not None and code not in _LOST:
            return False
        if asked.again[site] >= _ASKED_AGAIN or self._clock() >= asked.end_unix_s:
            return False
        self._find_nodes()
        if site not in self._nodes:
            return False
        asked.again[site] += 1
        self._ask(asked, [site])
        return True

    def _put_off(self, asked: _Asked, site: str, reason: str) -> bool:
        """Ask again later where the relay met no agent; false where that lasts, or there never was one."""
        if "AgentUnavailable" not in reason or site not in self._lively:
            return False
        pauses = _AWAY_PAUSES_S[asked.put_off[site] :]
        if not pauses or self._clock() + pauses[0] >= asked.end_unix_s:
            self._lively.discard(site)
            return False
        asked.put_off[site] += 1
        asked.later[site] = self._clock() + pauses[0]
        return True

    def _ask_the_put_off(self, asked: _Asked) -> None:
        due = sorted(site for site, when in asked.later.items() if self._clock() >= when)
        if due:
            self._find_nodes()
        for site in due:
            if site in self._nodes:
                del asked.later[site]
                self._ask(asked, [site])

    def _replies(self, asked: _Asked) -> Iterator[tuple[str, Message]]:
        """Yield the sites' replies as they come."""
        while True:
            for message_id, reply in self._arriving(
                lambda: {**asked.waiting, **asked.questions},
                until_unix_s=asked.end_unix_s,
                after_each_look=lambda: self._look_after(asked),
            ):
                if message_id in asked.waiting:
                    yield asked.waiting.pop(message_id), reply
                elif message_id in asked.questions and not reply.has_error():
                    asked.heard.add(asked.questions[message_id])
                asked.questions.pop(message_id, None)
            if not asked.later or self._clock() >= asked.end_unix_s:
                return
            self._sleep(_LAST_POLL_S)
            self._ask_the_put_off(asked)
            self._give_up_the_idle(asked)

    def _look_after(self, asked: _Asked) -> None:
        """Question the nodes of late replies, and ask those again who answer that and nothing else.

        A SuperNode takes one message after another: once it has answered a question that came after the
        request, the reply to the request has been sent, or never will be.
        """
        self._ask_the_put_off(asked)
        for site in sorted(asked.lost & set(asked.waiting.values())):
            if not self._ask_again(asked, site):
                asked.idle.add(site)
        asked.lost, asked.heard = asked.heard, set()
        self._give_up_the_idle(asked)
        slow, late = self._pulls.slow, self._clock() >= asked.question_unix_s
        for message_id, site in sorted(asked.waiting.items()):
            due = (late or message_id in slow) and message_id not in asked.questioned
            if due and site in self._nodes:
                asked.questioned.add(message_id)
                [question] = self._grid.push_messages([_message(self._nodes[site], _whoami())])
                asked.questions[question] = site

    def _give_up_the_idle(self, asked: _Asked) -> None:
        """Past the deadline, wait no longer for sites that are gone or have nothing left to send."""
        now = self._clock()
        if not asked.until_unix_s <= now < asked.end_unix_s or now < asked.idle_unix_s:
            return
        asked.idle_unix_s = now + _AT_WORK_EVERY_S
        connected = set(self._grid.get_node_ids())
        for site in asked.unanswered:
            if site in asked.idle or self._nodes.get(site) not in connected:
                asked.settle(site)
                asked.given_up[site] = "no answer before the deadline"

    def _arriving(
        self,
        message_ids: Callable[[], Collection[str]],
        *,
        until_unix_s: float,
        after_each_look: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[str, Message]]:
        """Yield replies to the messages as they come, until none is waited for or the time is over."""
        pause = _FIRST_POLL_S
        while waiting := message_ids():
            arrived = False
            for found in self._pulls.arrived(tuple(waiting)):
                arrived = True
                yield found
            if not message_ids() or self._clock() >= until_unix_s:
                return
            after_each_look()
            longest = max(_LAST_POLL_S, _POLL_S_PER_MESSAGE * len(message_ids()))
            pause = _FIRST_POLL_S if arrived else min(longest, 1.5 * pause)
            self._watch()
            self._sleep(pause)


@dataclass
class _Asked:
    """An exchange under way: message ids to sites, and who was asked again.

    `questioned` holds requests whose node was asked for a sign of life, `heard` sites that gave one since the
    last look, `lost` those that gave one before it, `idle` those lost for good; `later` says when to ask a
    site whose agent was away. `until_unix_s` is the deadline and `end_unix_s` the grace's end; from
    `question_unix_s` on nodes are questioned, and `idle_unix_s` is when to look for idle ones next.
    """

    requests: Mapping[str, Envelope]
    until_unix_s: float
    end_unix_s: float
    question_unix_s: float
    idle_unix_s: float = 0.0
    waiting: dict[str, str] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    questioned: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    given_up: dict[str, str] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)
    put_off: Counter[str] = field(default_factory=Counter)
    later: dict[str, float] = field(default_factory=dict)

    @property
    def unanswered(self) -> list[str]:
        return sorted({*self.waiting.values(), *self.later})

    def settle(self, site: str) -> None:
        """Wait for this site no longer."""
        self.later.pop(site, None)
        for ids in (self.waiting, self.questions):
            for message_id in [name for name, whose in ids.items() if whose == site]:
                del ids[message_id]


class NodeFailed(FedRadError):
    """Flower reports that a node did not answer: its process or connection failed."""


class SiteRefused(FedRadError):
    """A site's agent refused a request and signed the reason."""


def _message(
    node: int, records: Mapping[str, dict[str, str | bytes]], *, ttl_s: float = DEFAULT_TTL
) -> Message:
    content = RecordDict({name: ConfigRecord(dict(record)) for name, record in records.items()})
    return Message(content, dst_node_id=node, message_type="query.relay", ttl=ttl_s)


def _whoami() -> dict[str, dict[str, str | bytes]]:
    """Make the question who a node is: each time another object, which nobody can name before."""
    return {RECORD: {"stage": "whoami", "envelope": b"", "salt": secrets.token_hex(8)}}


def _claimed_site(reply: Message) -> str:
    """Return the site that a node says it is; empty where it says nothing that can be one."""
    record = reply.content.get(RECORD) if reply.has_content() else None
    site = record.get("site") if isinstance(record, ConfigRecord) else None
    return site if isinstance(site, str) else ""


def _envelope(reply: Message) -> Envelope:
    if reply.has_error():
        reason = " ".join(str(reply.error.reason).split())[:300]
        raise NodeFailed(f"Flower error {reply.error.code}: {reason}")
    return join_envelope(reply.content)[1]  # type: ignore[arg-type]
