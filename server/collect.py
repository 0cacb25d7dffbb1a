"""Collecting one attempt's contributions: directly, or by secure aggregation.

Direct: one exchange. Masked: two in steady state, because keys and shares of the next round ride on this
round's replies; the long form (keys, then shares, as exchanges of their own) is for first rounds, new
attempts and sites that join. Guarantees: whatever was sent to sites is durable before, so a restarted server
sends the same again; at most one masked vector is in memory besides the sum.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.canonical import sha256_hex
from common.config import Mode, Study
from common.deflate import deflate
from common.errors import FedRadError
from common.files import write_atomic
from common.identity import SigningKey
from common.ledger.entries import Participation
from common.ledger.statements import commit, format_participation, parse_participation
from common.model.lora import vector_sha256, vector_size
from common.protocol import OLDEST, Envelope, Message, Stage, pack_body, unpack_body
from common.records import SignedRecord
from common.secagg.messages import (
    KeySet,
    format_key_set,
    format_opening,
    format_survivor_set,
    parse_keys,
    parse_reveal,
    parse_shares,
    parse_upload,
)
from common.secagg.study_terms import round_terms
from server.aggregation import Collected, Floats, Units, parse_floats, parse_units
from server.checkpoint import Pending, StudyDirectory, StudyState
from server.cohort import Accept, Cohort, Outcome
from server.round import (
    Contribution,
    contribute_body,
    deadline_after,
    pack_shown,
    parse_contribution,
    parse_witnessed,
    stage_request,
    verify_statement,
    witness_request,
)
from server.secagg import ServerRound, ServerStage
from server.study_log import StudyLog, cosign_or_name

log = logging.getLogger("fedrad.server")


@dataclass(frozen=True)
class Attempt:
    """All that an attempt's requests are made of."""

    opened: StudyDirectory
    key: SigningKey
    cohort: Cohort
    state: StudyState
    pending: Pending
    log: StudyLog
    clock: Callable[[], float]
    statements: dict[str, Participation] = field(default_factory=dict)

    @property
    def study(self) -> Study:
        return self.opened.study

    def request(
        self, stage: Stage, site: str, body: bytes, *, round: int | None = None, attempt: int | None = None
    ) -> Envelope:
        """Sign a request of this attempt (or, for a key exchange, of the next round)."""
        return stage_request(
            self.key, self.study, stage, site, body,
            round=self.pending.round if round is None else round,
            attempt=self.pending.attempt if attempt is None else attempt,
            previous=self.state.record_sha256, nonce=self.pending.nonce, version=self.version(site),
        )  # fmt: skip

    def version(self, site: str) -> int:
        """Return the protocol version of this attempt's messages to a site."""
        return self.pending.versions.get(site, OLDEST)

    def contribute(self, site: str, *, cohort: Sequence[str], opening: bytes = b"") -> Envelope:
        """Sign a site's contribute request with the records that it has not seen."""
        ledger: tuple[bytes, ...]
        if self.study.masked:
            offer = self.log.offer(self.pending.sizes.get(site, 0))
            ledger = (offer.request, offer.entry, offer.proof)
        else:
            ledger = (self.pending.witnessed.encode(),)
        shown = pack_shown(self.unseen(site), *ledger)
        body = contribute_body(self.state, self.pending, cohort=cohort, opening=opening, shown=shown)
        return self.request(Stage.CONTRIBUTE, site, body)

    def unseen(self, site: str) -> list[SignedRecord]:
        """The records before this round that a site has not verified."""
        return self.opened.records[self.pending.histories.get(site, -1) + 1 : self.pending.round]

    def take(self, site: str, reply: Message, *, form: str) -> Contribution:
        """Read a contribution, keep the site's cosignature and statement; raises what parsing raises."""
        adapter = vector_sha256(self.state.adapter)
        contribution = parse_contribution(reply, site=site, form=form, adapter_sha256=adapter)
        verify_statement(
            self.study, contribution.statement, self.pending, adapter_in=adapter, before=self.log.stated(site)
        )
        if contribution.cosignature:
            cosign_or_name(self.log, site, contribution.cosignature)
        self.statements[site] = contribution.statement
        return contribution

    def ask(
        self, requests: Mapping[str, Envelope], *, accept: Accept, grace_s: float | None = None
    ) -> Outcome:
        """Exchange until the attempt's deadline, or a while longer where it was taken up after it.

        Sites still at work then get the attempt's grace, or `grace_s`.
        """
        cohort = self.study.cohort
        return self.cohort.exchange(
            requests,
            accept=accept,
            until_unix_s=max(self.pending.deadline_unix_s, self.clock() + min(60.0, cohort.deadline_s)),
            grace_s=self.pending.grace_s if grace_s is None else grace_s,
        )


def collect_direct(attempt: Attempt) -> Collected:
    """Ask every site of the attempt for its contribution as it is (modes plain and local, unmasked tests)."""
    study = attempt.study
    floats: dict[str, Floats] = {}
    digests: dict[str, str] = {}
    units = np.zeros(vector_size(study.adapter.tensors), np.uint32)
    consortium = study.privacy.mode is Mode.CONSORTIUM
    retained = Retained(attempt.opened.directory, study, attempt.pending)

    def accept(site: str, reply: Message) -> None:
        contribution = attempt.take(site, reply, form="u32" if consortium else "f32")
        if consortium:
            np.add(units, parse_units(contribution.vector, length=units.size, site=site), out=units)
            retained.keep(site, contribution)
        else:
            floats[site] = parse_floats(contribution.vector, study=study, site=site)
        digests[site] = sha256_hex(reply.body)

    requests = {
        site: attempt.contribute(site, cohort=attempt.pending.cohort) for site in attempt.pending.cohort
    }
    outcome = attempt.ask(requests, accept=accept)
    if not consortium:
        return Collected(digests, outcome.missing, floats=floats)
    aggregate = retained.close(units, digests)
    return Collected(digests, outcome.missing, units=units, aggregate=aggregate)


def witness_first(attempt: Attempt) -> Pending:
    """Have the sites cosign before they contribute, where no second exchange of the round shows the quorum.

    Returns the attempt with the witnessed checkpoint, durable. Raises QuorumNotReached.
    """
    pending = attempt.pending
    if pending.witnessed:
        return pending

    def accept(site: str, reply: Message) -> None:
        cosign_or_name(attempt.log, site, parse_witnessed(reply))

    requests = {
        site: witness_request(
            attempt.key, attempt.study, site, attempt.state, attempt.unseen(site),
            attempt.log.offer(pending.sizes[site]), version=attempt.version(site),
        )
        for site in pending.cohort
    }  # fmt: skip
    patience_s = min(60.0, attempt.study.cohort.deadline_s / 4)  # the deadline is for the contributions
    attempt.cohort.exchange(requests, accept=accept, until_unix_s=attempt.clock() + patience_s)
    pending = replace(pending, witnessed=attempt.log.witnessed().decode())
    attempt.opened.save_pending(pending)
    return pending


class Retained:
    """The contributions as they came, kept for auditors in the rounds that the manifest names."""

    def __init__(self, directory: Path, study: Study, pending: Pending) -> None:
        audit = study.audit
        self._kept = audit is not None and (pending.round + 1) % audit.retain_every_rounds == 0
        self._folder = directory / "retained" / f"{pending.round}-{pending.attempt}"

    def keep(self, site: str, contribution: Contribution) -> None:
        """Keep one contribution with the key that opens its commitment."""
        if self._kept:
            write_atomic(self._folder / f"{site}.bin", contribution.vector)
            write_atomic(self._folder / f"{site}.key", contribution.commitment_key)

    def close(self, total: Units, sites: Iterable[str]) -> str:
        """Commit to the sum of what came, keep the opening, and drop what is not in the sum."""
        key = secrets.token_bytes(32)
        if self._kept:
            stored = self._folder / "aggregate.key"
            key = stored.read_bytes() if stored.is_file() else key
            write_atomic(stored, key)
            for path in self._folder.iterdir():
                if path.stem not in {*sites, "aggregate"}:
                    path.unlink()
        return commit(key, total.astype("<u4", copy=False).data)

    def discard(self) -> None:
        """Drop what an attempt without a sum left."""
        shutil.rmtree(self._folder, ignore_errors=True)


class MaskingBook:
    """The server's rounds of secure aggregation on disk: the one under way and the one being prepared."""

    def __init__(self, directory: Path, study: Study) -> None:
        self._path = directory / "masking.json"
        self.total_path = directory / "total.u32"
        self._statements_path = directory / "statements.json"
        self._study = study
        self._identities = {site.id: site.message_key for site in study.cohort.site}

    def read(self, round: int, attempt: int) -> ServerRound:
        """Return the stored machine of a round's attempt, or a new one.

        One that was stored while uploads came in takes them again: the sites resend the same bytes.
        """
        terms = round_terms(self._study, round=round, attempt=attempt)
        state = self._all().get(f"{round}/{attempt}")
        if state is None:
            return ServerRound(terms, self._identities)
        if not state["uploads_closed"]:
            state = {**state, "uploads": [], "added": [], "adding": None}
        return ServerRound.from_json(state, terms=terms, identities=self._identities)

    def prepared(self, round: int) -> tuple[str, ...] | None:
        """Name the sites whose keys for a round came with the round before; None where none did."""
        machine = self.read(round, 1)
        return None if machine.stage is ServerStage.KEYS else machine.key_set.sites

    def write(self, *machines: ServerRound) -> None:
        """Make machines durable; those of rounds behind the first one are dropped."""
        first = machines[0].terms.round
        kept = {name: state for name, state in self._all().items() if int(name.split("/")[0]) >= first}
        for machine in machines:
            kept[f"{machine.terms.round}/{machine.terms.attempt}"] = machine.to_json()
        write_atomic(self._path, json.dumps(kept).encode())

    def keep_statements(self, statements: Mapping[str, Participation]) -> None:
        """Make the statements of the sites in the sum durable, before the uploads are closed for good."""
        value = {site: format_participation(s).decode() for site, s in statements.items()}
        write_atomic(self._statements_path, json.dumps(value).encode())

    def statements(self) -> dict[str, Participation]:
        value: dict[str, str] = json.loads(self._statements_path.read_text())
        return {site: parse_participation(text.encode()) for site, text in value.items()}

    def _all(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        return value


def collect_masked(attempt: Attempt, book: MaskingBook, missing: dict[str, str]) -> Collected:
    """Run one attempt of secure aggregation, naming in `missing` who fell out and why.

    Raises CohortTooSmall, ShareWrong or SecretWrong when it ends without a sum.
    """
    pending, study = attempt.pending, attempt.study
    machine = book.read(pending.round, pending.attempt)
    following = book.read(pending.round + 1, 1)
    if machine.stage is ServerStage.KEYS:
        _take_keys(attempt, book, machine, missing)
    if machine.stage is ServerStage.DEALING:
        if not machine.to_json()["shares"]:  # the long form, or a server killed in the middle of it
            _take_shares(attempt, machine, missing)
        machine.close_shares(adapter=vector_sha256(attempt.state.adapter))
        attempt = _timed_anew(attempt)
        book.write(machine, following)
    retained = Retained(attempt.opened.directory, study, pending)
    if machine.stage is ServerStage.UPLOADS:
        total = np.zeros(machine.terms.length, np.uint32)
        _take_uploads(attempt, machine, following, total, retained, missing)
        survivors = machine.close_uploads()
        write_atomic(book.total_path, total.astype("<u4", copy=False).data)
        key_set = _close_next_keys(following, study)
        if key_set is None:
            following = book.read(pending.round + 1, 1)
        book.keep_statements(attempt.statements)
        book.write(machine, following)
    else:
        survivors = machine.survivor_set
        total = np.fromfile(book.total_path, "<u4")
        key_set = _stored_key_set(following)
        attempt.statements.update(book.statements())
    digests = {receipt.site: receipt.upload.hex() for receipt in survivors.survivors}
    aggregate = retained.close(total, digests)
    witnessed = _witnessed(attempt)
    _take_reveals(attempt, machine, following, format_survivor_set(survivors), witnessed, key_set, missing)
    book.write(machine, following)
    out = np.empty_like(total)
    machine.unmask(total, out)
    return Collected(digests, missing, units=out, aggregate=aggregate)


def _timed_anew(attempt: Attempt) -> Attempt:
    """Start the contributions' deadline, durably: keys and shares may have taken the attempt's own."""
    pending = replace(
        attempt.pending, deadline_unix_s=deadline_after(attempt.study, now_unix_s=attempt.clock())
    )
    attempt.opened.save_pending(pending)
    return replace(attempt, pending=pending)


def _witnessed(attempt: Attempt) -> bytes:
    """Return the quorum's cosignatures as first shown in this attempt; raises QuorumNotReached."""
    if not attempt.pending.witnessed:
        note = attempt.log.witnessed().decode()
        attempt.opened.save_pending(replace(attempt.pending, witnessed=note))
        return note.encode()
    return attempt.pending.witnessed.encode()


def _take_keys(attempt: Attempt, book: MaskingBook, machine: ServerRound, missing: dict[str, str]) -> None:
    """Ask for keys in an exchange of their own: the long form's first half."""

    def accept_keys(site: str, reply: Message) -> None:
        _, (keys,) = unpack_body(reply.body, fields={}, parts=1)
        machine.accept_keys(parse_keys(bytes(keys)))

    requests = {site: attempt.request(Stage.KEYS, site, pack_body({})) for site in attempt.pending.cohort}
    outcome = attempt.ask(requests, accept=accept_keys)
    missing.update(outcome.missing)
    machine.close_keys()
    book.write(machine)


def _take_shares(attempt: Attempt, machine: ServerRound, missing: dict[str, str]) -> None:
    """Ask for shares in an exchange of their own: the long form's second half."""
    key_set = machine.key_set

    def accept_shares(site: str, reply: Message) -> None:
        _, (shares,) = unpack_body(reply.body, fields={}, parts=1)
        machine.accept_shares(parse_shares(bytes(shares)))

    body = pack_body({}, format_key_set(key_set))
    requests = {site: attempt.request(Stage.SHARES, site, body) for site in key_set.sites}
    outcome = attempt.ask(requests, accept=accept_shares)
    missing.update(outcome.missing)


def _take_uploads(
    attempt: Attempt,
    machine: ServerRound,
    following: ServerRound,
    total: Units,
    retained: Retained,
    missing: dict[str, str],
) -> None:
    """Exchange 1: openings and checkpoints out; masked vectors, cosignatures and the next round's keys in."""
    study = attempt.study

    def accept(site: str, reply: Message) -> None:
        if reply.header.stage is Stage.KEYS:
            _, (newcomer,) = unpack_body(reply.body, fields={}, parts=1)
            following.accept_keys(parse_keys(bytes(newcomer)))
            return
        contribution = attempt.take(site, reply, form="masked")
        units = parse_units(contribution.vector, length=total.size, site=site)  # before any state moves
        machine.announce(parse_upload(bytes(contribution.upload)))
        machine.start_adding(site)
        machine.add(units, total)
        retained.keep(site, contribution)
        if contribution.keys and following.stage is ServerStage.KEYS:
            try:
                following.accept_keys(parse_keys(bytes(contribution.keys)))
            except FedRadError as error:  # costs the site the next round, not this one
                log.warning("next keys of %s refused: %s: %s", site, error.code, error)

    openings = machine.openings()
    requests = {
        site: attempt.contribute(site, cohort=machine.roster, opening=format_opening(openings[site]))
        for site in machine.roster
    }
    if attempt.pending.round + 1 < study.rounds and following.stage is ServerStage.KEYS:
        for site in _others(attempt, machine.roster):
            requests[site] = attempt.request(
                Stage.KEYS, site, pack_body({}), round=attempt.pending.round + 1, attempt=1
            )
    outcome = attempt.ask(requests, accept=accept)
    missing.update(outcome.missing)


def _take_reveals(
    attempt: Attempt,
    machine: ServerRound,
    following: ServerRound,
    survivor_set: bytes,
    witnessed: bytes,
    key_set: KeySet | None,
    missing: dict[str, str],
) -> None:
    """Exchange 2: survivor set, cosignatures, next key set out; reveals and shares in."""
    encoded = b"" if key_set is None else format_key_set(key_set)
    members = () if key_set is None else key_set.sites

    def accept(site: str, reply: Message) -> None:
        if reply.header.stage is Stage.SHARES:
            _, (dealt,) = unpack_body(reply.body, fields={}, parts=1)
            following.accept_shares(parse_shares(bytes(dealt)))
            return
        _, (reveal, shares) = unpack_body(reply.body, fields={}, parts=2)
        machine.accept_reveal(parse_reveal(bytes(reveal)))
        if shares:
            following.accept_shares(parse_shares(bytes(shares)))

    requests = {}
    for site in machine.added:
        own = encoded if site in members else b""
        requests[site] = attempt.request(
            Stage.UNMASK, site, pack_body({}, survivor_set, own, deflate(witnessed))
        )
    for site in members:
        if site not in requests:
            body = pack_body({}, encoded)
            requests[site] = attempt.request(
                Stage.SHARES, site, body, round=attempt.pending.round + 1, attempt=1
            )
    outcome = attempt.ask(requests, accept=accept, grace_s=0.0)  # a threshold is enough
    missing.update(
        {site: f"no reveal: {why}" for site, why in outcome.missing.items() if site in machine.added}
    )


def _close_next_keys(following: ServerRound, study: Study) -> KeySet | None:
    """Close the next round's keys where enough came; else that round uses the long form."""
    if following.terms.round >= study.rounds or following.stage is not ServerStage.KEYS:
        return None
    try:
        return following.close_keys()
    except FedRadError:
        return None


def _stored_key_set(following: ServerRound) -> KeySet | None:
    return following.key_set if following.stage is ServerStage.DEALING else None


def _others(attempt: Attempt, roster: Iterable[str]) -> list[str]:
    return sorted(set(attempt.pending.cohort) - set(roster))
