"""Which sites can be reached, and one signed exchange with them over Flower's Grid.

Guarantees: an answer counts only when the site's pinned key signed it for this very request; whatever a node
says of itself is a hint. A site that does not answer, fails or refuses is named with the reason, never
dropped in silence. It does not decide what an exchange means for the round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.canonical import sha256_hex
from common.config import Study
from common.errors import EnvelopeMalformed, FedRadError, RelayInvalid, SignatureInvalid, UnknownSender
from common.model.lora import vector_size
from common.protocol import SERVER, Expected, Kind, open_message, unpack_body
from common.protocol import Message as SignedMessage
from common.relay import RECORD, join_envelope, split_envelope

_FIRST_POLL_S = 0.002
_LAST_POLL_S = 0.25


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
    ) -> None:
        self._grid = grid
        self._study = study
        self._keys = {site.id: site.message_key for site in study.cohort.site}
        self._max_reply_bytes = 4 * vector_size(study.adapter.tensors) + (16 << 20)
        self._clock = clock
        self._sleep = sleep
        self._watch = watch
        self._nodes: dict[str, int] = {}
        self._impostors: set[tuple[str, int]] = set()
        self.traffic = Traffic()

    def present(self, *, wait_s: float, at_least: int) -> tuple[str, ...]:
        """Find which sites are connected, waiting up to `wait_s` for `at_least` of them."""
        until = self._clock() + wait_s
        while True:
            self._find_nodes()
            if len(self._nodes) >= at_least or self._clock() >= until:
                return tuple(sorted(self._nodes))
            self._sleep(_LAST_POLL_S)

    def exchange(self, requests: Mapping[str, bytes], *, accept: Accept, until_unix_s: float) -> Outcome:
        """Send each site its signed request and hand each verified reply to `accept`, one at a time.

        A FedRadError of `accept` makes that site a missing one. Replies are not kept.
        """
        missing = {site: "not connected" for site in requests if site not in self._nodes}
        stage_of = {site: _stage(data) for site, data in requests.items()}
        digests = {site: sha256_hex(data) for site, data in requests.items()}
        sent = self._push(
            {site: (stage_of[site], data) for site, data in requests.items() if site in self._nodes}
        )
        for site in sent.values():
            self.traffic.count(stage_of[site], "down", len(requests[site]))
        answered = []
        for message_id, reply in self._poll(sent, until_unix_s=until_unix_s):
            site = sent[message_id]
            try:
                data = _envelope(reply)
                self.traffic.count(stage_of[site], "up", len(data))
                accept(site, self._verify(site, digests[site], data))
                answered.append(site)
            except FedRadError as error:
                missing[site] = f"{error.code}: {error}"
                if isinstance(error, NodeFailed):
                    self._nodes.pop(site, None)
                elif isinstance(error, SignatureInvalid | EnvelopeMalformed | UnknownSender | RelayInvalid):
                    self._impostors.add((site, self._nodes.pop(site)))  # another node may be the real one
        for site in sent.values():
            if site not in answered and site not in missing:
                missing[site] = "no answer before the deadline"
        return Outcome(tuple(sorted(answered)), missing)

    def _verify(self, site: str, request_sha256: str, data: bytes) -> SignedMessage:
        message = open_message(
            data,
            keys=self._keys,
            expected=Expected(
                study=self._study.sha256, recipient=SERVER, sender=site, answers=request_sha256
            ),
            max_body_bytes=self._max_reply_bytes,
        )
        if message.header.kind is Kind.REFUSAL:
            meta, _ = unpack_body(message.body, fields={"error": str, "message": str})
            raise SiteRefused(f"{meta['error']}: {meta['message']}")
        return message

    def _find_nodes(self) -> None:
        alive = set(self._grid.get_node_ids())
        self._nodes = {site: node for site, node in self._nodes.items() if node in alive}
        unknown = sorted(alive - set(self._nodes.values()))
        if not unknown:
            return
        messages = [_message(node, "whoami", b"") for node in unknown]
        ids = dict(zip(self._grid.push_messages(messages), unknown, strict=True))
        replies = self._poll(ids, until_unix_s=self._clock() + 30.0)
        for message_id, reply in replies:
            site = _claimed_site(reply)
            if site in self._keys and (site, ids[message_id]) not in self._impostors:
                self._nodes.setdefault(site, ids[message_id])

    def _push(self, envelopes: Mapping[str, tuple[str, bytes]]) -> dict[str, str]:
        sites = sorted(envelopes)
        messages = [_message(self._nodes[site], *envelopes[site]) for site in sites]
        return dict(zip(self._grid.push_messages(messages), sites, strict=True)) if messages else {}

    def _poll(self, ids: Mapping[str, object], *, until_unix_s: float) -> Iterable[tuple[str, Message]]:
        waiting, pause = set(ids), _FIRST_POLL_S
        while waiting:
            arrived = list(self._grid.pull_messages(waiting))
            for reply in arrived:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply.metadata.reply_to_message_id, reply
            if not waiting or self._clock() >= until_unix_s:
                return
            pause = _FIRST_POLL_S if arrived else min(_LAST_POLL_S, 1.5 * pause)
            self._watch()
            self._sleep(pause)


class NodeFailed(FedRadError):
    """Flower reports that a node did not answer: its process or connection failed."""


class SiteRefused(FedRadError):
    """A site's agent refused a request and signed the reason."""


def _message(node: int, stage: str, envelope: bytes) -> Message:
    records = {name: ConfigRecord(record) for name, record in split_envelope(stage, envelope).items()}
    return Message(RecordDict(records), dst_node_id=node, message_type="query.relay")


def _claimed_site(reply: Message) -> str:
    """Return the site that a node says it is; empty where it says nothing that can be one."""
    record = reply.content.get(RECORD) if reply.has_content() else None
    site = record.get("site") if isinstance(record, ConfigRecord) else None
    return site if isinstance(site, str) else ""


def _envelope(reply: Message) -> bytes:
    if reply.has_error():
        reason = " ".join(str(reply.error.reason).split())[:300]
        raise NodeFailed(f"Flower error {reply.error.code}: {reason}")
    return join_envelope(reply.content)[1]  # type: ignore[arg-type]


def _stage(request: bytes) -> str:
    from common.protocol import read_header

    return read_header(request, max_body_bytes=1 << 62).stage.value
