"""One round in pure steps: what is asked of each site, what its answer must be, and the record of it.

Nothing here talks to the network or the disk; `server/app.py` and `server/collect.py` put the steps in order.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.canonical import sha256_hex
from common.compatibility import Speaks, agree, format_speaks, parse_speaks
from common.config import Mode, Study
from common.deflate import deflate
from common.errors import AdapterInvalid, EntryInvalid, EnvelopeMalformed
from common.evaluation_counts import evaluation_plan_of
from common.identity import SigningKey
from common.ledger.entries import Outcome, Participation
from common.ledger.statements import commit, make_round, parse_participation, verify_contribution
from common.model.lora import vector_sha256, vector_to_bytes
from common.privacy.mechanism import ServedRound, View
from common.privacy.study_plan import plan_of
from common.protocol import (
    GENESIS,
    HELLO_VERSION,
    OLDEST,
    SERVER,
    Envelope,
    Message,
    Stage,
    pack_body,
    seal_request,
    unpack_body,
)
from common.records import RoundRecord, SignedRecord, signed_to_json
from common.schedule import active_groups, learning_rate
from server.checkpoint import Pending, StudyState
from server.study_log import Stated, WitnessOffer

MAX_STATEMENTS_BYTES = 65_536


def plan_attempt(
    study: Study,
    *,
    round: int,
    attempt: int,
    cohort: Sequence[str],
    histories: Mapping[str, int],
    sizes: Mapping[str, int],
    versions: Mapping[str, int],
    now_unix_s: float,
) -> Pending:
    """Fix everything random or timed of an attempt, so that its requests can be made again byte for byte."""
    return Pending(
        round=round,
        attempt=attempt,
        cohort=tuple(sorted(cohort)),
        deadline_unix_s=deadline_after(study, now_unix_s=now_unix_s),
        nonce=secrets.token_hex(16),
        histories={site: histories.get(site, -1) for site in cohort},
        sizes={site: sizes.get(site, 0) for site in cohort},
        versions={site: versions.get(site, OLDEST) for site in cohort},
        grace_s=study.cohort.grace,
    )


def deadline_after(study: Study, *, now_unix_s: float) -> float:
    """Return the deadline of what is asked from now on, in whole Unix seconds."""
    return float(int(now_unix_s + study.cohort.deadline_s) + 1)


def stage_request(
    key: SigningKey,
    study: Study,
    stage: Stage,
    site: str,
    body: bytes,
    *,
    round: int,
    attempt: int,
    previous: str,
    nonce: str,
    version: int,
) -> Envelope:
    """Sign one request; the nonce of an attempt gives each site and stage its own."""
    own = sha256_hex(f"{nonce}|{stage.value}|{site}|{round}".encode())[:32]
    return seal_request(
        key, study=study.sha256, round=round, attempt=attempt, stage=stage, sender=SERVER, recipient=site,
        nonce=own, previous=previous, body=body, version=version,
    )  # fmt: skip


def contribute_body(
    state: StudyState,
    pending: Pending,
    *,
    cohort: Sequence[str],
    opening: bytes,
    shown: bytes,
) -> bytes:
    """Make the body of a contribute request: global adapter, cohort, the grace's end, what `shown` packs."""
    meta = {
        "adapter_sha256": vector_sha256(state.adapter),
        "cohort": list(cohort),
        "deadline_unix_s": pending.deadline_unix_s + pending.grace_s,
    }
    return pack_body(meta, opening, shown, vector_to_bytes(state.adapter))


def hello_request(key: SigningKey, study: Study, site: str, *, train: bool, release: Speaks) -> Envelope:
    body = pack_body({"train": train, "speaks": format_speaks(release)})
    return stage_request(
        key, study, Stage.HELLO, site, body, round=0, attempt=0, previous=GENESIS,
        nonce=secrets.token_hex(16), version=HELLO_VERSION,
    )  # fmt: skip


def witness_request(
    key: SigningKey,
    study: Study,
    site: str,
    state: StudyState,
    records: Sequence[SignedRecord],
    offer: WitnessOffer,
    *,
    version: int,
) -> Envelope:
    """Show a site the records it has not seen and ask it to cosign the checkpoint that covers them."""
    body = pack_body({}, pack_shown(records, offer.request, offer.entry, offer.proof))
    return stage_request(
        key, study, Stage.WITNESS, site, body, round=min(state.round + 1, study.rounds), attempt=0,
        previous=state.record_sha256, nonce=secrets.token_hex(16), version=version,
    )  # fmt: skip


def pack_shown(records: Sequence[SignedRecord], *ledger: bytes) -> bytes:
    """Pack what a site must see before it answers: the records it has not verified, and of the ledger.

    ledger: an offer to cosign (request, entry, proof), or a quorum's cosignatures of what was cosigned.
    """
    return deflate(pack_body({"records": [signed_to_json(signed) for signed in records]}, *ledger))


@dataclass(frozen=True)
class Hello:
    """What a site says of itself: the last round it verified (-1: none), what it saw of the ledger.

    `version` is the protocol version that both sides speak; `statements` are the site's own entries for the
    ledger, encoded; nothing of them is verified here.
    """

    version: int
    seen_round: int
    seen_size: int
    approval: bytes
    statements: tuple[bytes, ...]


def parse_hello(reply: Message, *, release: Speaks) -> Hello:
    """Parse a site's answer to hello; raises EnvelopeMalformed or VersionsTooFarApart."""
    meta, (approval, statements) = unpack_body(
        reply.body,
        fields={"speaks": dict, "seen_round": int, "seen_record": str, "seen_size": int},
        parts=2,
    )
    if meta["seen_size"] < 0 or meta["seen_round"] < -1:
        raise EnvelopeMalformed("hello: expected what was seen to be a round and a size, got less than none")
    version = agree(release, parse_speaks(meta["speaks"]))
    if len(statements) > MAX_STATEMENTS_BYTES:
        raise EnvelopeMalformed(f"hello: expected statements of at most {MAX_STATEMENTS_BYTES} bytes")
    lines = tuple(bytes(statements).split(b"\n")) if statements else ()
    return Hello(version, int(meta["seen_round"]), int(meta["seen_size"]), bytes(approval), lines)


def parse_witnessed(reply: Message) -> bytes:
    """Return the cosignature line of a site's answer to witness; raises EnvelopeMalformed."""
    _, (line,) = unpack_body(reply.body, fields={"seen_round": int, "seen_record": str}, parts=1)
    return bytes(line)


def verify_statement(
    study: Study, stated: Participation, pending: Pending, *, adapter_in: str, before: Stated
) -> None:
    """Refuse a statement that the study's audit would not let pass: the site then counts as missing.

    before: what this site stated in the log so far. Raises SignatureInvalid unless the site signed it for
    this very attempt and adapter, EntryInvalid for noise, ε or a commitment that cannot be.
    """
    evaluates = pending.round == study.rounds
    sigma = low = high = 0.0
    if study.privacy.mode is not Mode.PLAIN:
        plan = evaluation_plan_of(study) if evaluates else plan_of(study)
        charges = 1 if evaluates else before.statements + 1
        sigma = plan.site_share_sigma_units
        low = plan.epsilon(View.SITE, [ServedRound(None)] * charges)
        high = plan.epsilon(View.SITE)
    floor = low if evaluates else max(low, before.epsilon)
    if not math.isclose(stated.sigma_units, sigma, rel_tol=1e-9):
        raise EntryInvalid(f"statement of {stated.site}: expected noise of width {sigma:g}, got another")
    if not floor * (1 - 1e-6) <= stated.epsilon <= high * (1 + 1e-6):
        raise EntryInvalid(
            f"statement of {stated.site}: expected a spent ε from {floor:.4f} to {high:.4f}, got another"
        )
    if stated.commitment in before.commitments:
        raise EntryInvalid(f"statement of {stated.site}: expected a new commitment, got one again")
    record = make_round(
        study, number=pending.round, attempt=pending.attempt, outcome=Outcome.FAILED, adapter_in=adapter_in,
        cohort=[stated.site], code="", lockfile="",
    )  # fmt: skip
    verify_contribution(study.sha256, record, stated, study.site(stated.site).message_key)


@dataclass(frozen=True)
class Contribution:
    """A site's answer to contribute: `cosignature` is empty where the checkpoint was cosigned before."""

    upload: memoryview
    keys: memoryview
    cosignature: bytes
    statement: Participation
    commitment_key: bytes
    vector: memoryview


def parse_contribution(reply: Message, *, site: str, form: str, adapter_sha256: str) -> Contribution:
    """Split a contribution; raises AdapterInvalid, EnvelopeMalformed or EntryInvalid.

    The statement's commitment is opened here; its signature is the ledger's to check.
    """
    meta, (upload, keys, cosignature, statement, commitment_key, vector) = unpack_body(
        reply.body, fields={"adapter_sha256": str, "form": str}, parts=6
    )
    if meta["adapter_sha256"] != adapter_sha256 or meta["form"] != form:
        raise AdapterInvalid(
            f"contribution of {site}: expected form {form} for adapter {adapter_sha256[:16]}…, "
            f"got {meta['form'][:16]!r} for {meta['adapter_sha256'][:16]}…"
        )
    stated = parse_participation(bytes(statement))
    if stated.site != site or stated.summed or commit(bytes(commitment_key), vector) != stated.commitment:
        raise EntryInvalid(
            f"contribution of {site}: expected its own commitment to what it sent, got another"
        )
    return Contribution(upload, keys, bytes(cosignature), stated, bytes(commitment_key), vector)


def make_record(
    study: Study,
    state: StudyState,
    pending: Pending,
    *,
    adapter_out: str,
    contributions: Mapping[str, str],
    missing: Mapping[str, str],
    site_share_sigma_units: float,
    server_sigma_units: float,
    rolled_back_to: str,
    now_unix_s: float,
) -> RoundRecord:
    """Write down one served round; `missing` keeps only the reason's name, never free text of a site."""
    return RoundRecord(
        study=study.sha256,
        round=pending.round,
        attempt=pending.attempt,
        previous=state.record_sha256,
        adapter_in=vector_sha256(state.adapter),
        adapter_out=adapter_out,
        cohort=pending.cohort,
        contributors=tuple(sorted(contributions)),
        missing={site: reason.partition(":")[0] for site, reason in sorted(missing.items())},
        contributions=dict(sorted(contributions.items())),
        groups=tuple(sorted(group.value for group in active_groups(study, pending.round))),
        learning_rate=learning_rate(study, pending.round),
        sampling_rate=study.training.sampling_rate,
        patients=study.training.patients,
        mode=study.privacy.mode.value,
        clip_norm=study.privacy.clip_norm,
        site_share_sigma_units=site_share_sigma_units,
        server_sigma_units=server_sigma_units,
        time_unix_s=int(now_unix_s),
        rolled_back_to=rolled_back_to,
    )
