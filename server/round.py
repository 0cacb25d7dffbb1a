"""One round in pure steps: what is asked of each site, what its answer must be, and the record of it.

Nothing here talks to the network or the disk; `server/app.py` and `server/collect.py` put the steps in order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from common.canonical import sha256_hex
from common.config import Study
from common.errors import AdapterInvalid
from common.identity import SigningKey
from common.model.lora import vector_sha256, vector_to_bytes
from common.protocol import GENESIS, SERVER, Message, Stage, pack_body, seal_request, unpack_body
from common.records import RoundRecord, SignedRecord, signed_to_json
from common.schedule import active_groups, learning_rate
from server.checkpoint import Pending, StudyState


def plan_attempt(
    study: Study,
    *,
    round: int,
    attempt: int,
    cohort: Sequence[str],
    histories: Mapping[str, int],
    now_unix_s: float,
) -> Pending:
    """Fix everything random or timed of an attempt, so that its requests can be made again byte for byte."""
    return Pending(
        round=round,
        attempt=attempt,
        cohort=tuple(sorted(cohort)),
        deadline_unix_s=float(int(now_unix_s + study.cohort.deadline_s) + 1),
        nonce=secrets.token_hex(16),
        histories={site: histories.get(site, -1) for site in cohort},
    )


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
) -> bytes:
    """Sign one request; the nonce of an attempt gives each site and stage its own."""
    own = sha256_hex(f"{nonce}|{stage.value}|{site}|{round}".encode())[:32]
    return seal_request(
        key, study=study.sha256, round=round, attempt=attempt, stage=stage, sender=SERVER, recipient=site,
        nonce=own, previous=previous, body=body,
    )  # fmt: skip


def contribute_body(
    state: StudyState,
    pending: Pending,
    records: Sequence[SignedRecord],
    *,
    cohort: Sequence[str],
    opening: bytes,
) -> bytes:
    """Make the body of a contribute request: global adapter, cohort, deadline, the site's missing history."""
    meta = {
        "adapter_sha256": vector_sha256(state.adapter),
        "cohort": list(cohort),
        "deadline_unix_s": pending.deadline_unix_s,
        "records": [signed_to_json(signed) for signed in records],
    }
    return pack_body(meta, opening, vector_to_bytes(state.adapter))


def hello_request(key: SigningKey, study: Study, site: str) -> bytes:
    return stage_request(
        key, study, Stage.HELLO, site, pack_body({}), round=0, attempt=0, previous=GENESIS,
        nonce=secrets.token_hex(16),
    )  # fmt: skip


def finish_request(
    key: SigningKey, study: Study, site: str, state: StudyState, records: Sequence[SignedRecord]
) -> bytes:
    body = pack_body({"records": [signed_to_json(signed) for signed in records]})
    return stage_request(
        key, study, Stage.FINISH, site, body, round=study.rounds, attempt=0,
        previous=state.record_sha256, nonce=secrets.token_hex(16),
    )  # fmt: skip


def parse_hello(reply: Message) -> int:
    """Return the last round that a site has verified (-1 before the first)."""
    meta, _ = unpack_body(reply.body, fields={"version": int, "seen_round": int, "seen_record": str})
    return int(meta["seen_round"])


def parse_contribution(
    reply: Message, *, site: str, form: str, adapter_sha256: str
) -> tuple[memoryview, memoryview, memoryview]:
    """Split a contribution into announcement, next keys and vector.

    Raises AdapterInvalid or EnvelopeMalformed.
    """
    meta, (upload, keys, vector) = unpack_body(
        reply.body, fields={"adapter_sha256": str, "form": str}, parts=3
    )
    if meta["adapter_sha256"] != adapter_sha256 or meta["form"] != form:
        raise AdapterInvalid(
            f"contribution of {site}: expected form {form} for adapter {adapter_sha256[:16]}…, "
            f"got {meta['form'][:16]!r} for {meta['adapter_sha256'][:16]}…"
        )
    return upload, keys, vector


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
    )
