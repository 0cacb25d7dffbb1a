"""One round in pure steps: what is asked of each site, what its answer must be, and the record of it.

Nothing here talks to the network or the disk; `server/app.py` puts the steps in order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.canonical import sha256_hex
from common.config import Study
from common.errors import AdapterInvalid, FedRadError
from common.identity import SigningKey
from common.model.lora import vector_sha256, vector_to_bytes
from common.protocol import SERVER, Message, Stage, pack_body, seal_request, unpack_body
from common.records import RoundRecord, SignedRecord, signed_to_json
from common.schedule import active_groups, learning_rate
from server.aggregation import parse_sum
from server.checkpoint import Pending, StudyState


@dataclass(frozen=True)
class Epsilons:
    """What one patient has paid after a round, against the server and against a release; 0 in mode plain."""

    site: float = 0.0
    release: float = 0.0


def plan_attempt(
    study: Study, *, round: int, attempt: int, cohort: Sequence[str], now_unix_s: float
) -> Pending:
    """Fix everything random or timed of an attempt, so that its requests can be made again byte for byte."""
    return Pending(
        round=round,
        attempt=attempt,
        cohort=tuple(sorted(cohort)),
        deadline_unix_s=round_up(now_unix_s + study.cohort.deadline_s),
        nonces={site: secrets.token_hex(16) for site in cohort},
    )


def round_up(seconds: float) -> float:
    """Whole seconds, so that canonical JSON writes a deadline the same way everywhere."""
    return float(int(seconds) + 1)


def contribute_requests(
    key: SigningKey,
    study: Study,
    state: StudyState,
    pending: Pending,
    records_for: Mapping[str, Sequence[SignedRecord]],
) -> dict[str, bytes]:
    """Make every site's signed contribute request; `records_for` is the history that the site lacks."""
    adapter_sha256 = vector_sha256(state.adapter)
    blob = vector_to_bytes(state.adapter)
    requests = {}
    for site in pending.cohort:
        meta = {
            "adapter_sha256": adapter_sha256,
            "cohort": list(pending.cohort),
            "deadline_unix_s": pending.deadline_unix_s,
            "records": [signed_to_json(signed) for signed in records_for[site]],
        }
        requests[site] = _request(key, study, pending, Stage.CONTRIBUTE, site, state, pack_body(meta, blob))
    return requests


def hello_request(key: SigningKey, study: Study, site: str) -> bytes:
    return seal_request(
        key, study=study.sha256, round=0, attempt=0, stage=Stage.HELLO, sender=SERVER, recipient=site,
        nonce=secrets.token_hex(16), previous=study.sha256, body=pack_body({}),
    )  # fmt: skip


def finish_request(
    key: SigningKey, study: Study, site: str, state: StudyState, records: Sequence[SignedRecord]
) -> bytes:
    return seal_request(
        key, study=study.sha256, round=study.rounds, attempt=0, stage=Stage.FINISH, sender=SERVER,
        recipient=site, nonce=secrets.token_hex(16), previous=state.record_sha256,
        body=pack_body({"records": [signed_to_json(signed) for signed in records]}),
    )  # fmt: skip


def parse_hello(reply: Message) -> int:
    """Return the last round that a site has verified (-1 before the first)."""
    meta, _ = unpack_body(reply.body, fields={"version": int, "seen_round": int, "seen_record": str})
    return int(meta["seen_round"])


def parse_contributions(
    study: Study, replies: Mapping[str, Message], *, adapter_sha256: str
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, str]]:
    """Decode the sites' sums; a site whose answer is unfit is returned with the reason instead."""
    sums, unfit = {}, {}
    for site, reply in sorted(replies.items()):
        try:
            meta, blob = unpack_body(reply.body, fields={"adapter_sha256": str, "form": str})
            if meta["adapter_sha256"] != adapter_sha256 or meta["form"] != "f32":
                raise AdapterInvalid(f"contribution of {site}: expected f32 for this adapter, got another")
            sums[site] = parse_sum(blob, study=study, site=site)
        except FedRadError as error:
            unfit[site] = f"{error.code}: {error}"
    return sums, unfit


def make_record(
    study: Study,
    state: StudyState,
    pending: Pending,
    *,
    adapter_out: str,
    contributions: Mapping[str, bytes],
    missing: Mapping[str, str],
    epsilons: Epsilons,
    now_unix_s: float,
) -> RoundRecord:
    """Write down one served round; `missing` keeps only the reason's name, never free text of a site."""
    privacy = study.privacy
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
        contributions={site: sha256_hex(body) for site, body in sorted(contributions.items())},
        groups=tuple(sorted(group.value for group in active_groups(study, pending.round))),
        learning_rate=learning_rate(study, pending.round),
        sampling_rate=study.training.sampling_rate,
        patients=study.training.patients,
        mode=privacy.mode.value,
        clip_norm=privacy.clip_norm,
        site_noise=privacy.site_noise,
        release_noise=privacy.release_noise,
        site_epsilon=epsilons.site,
        release_epsilon=epsilons.release,
        time_unix_s=int(now_unix_s),
    )


def _request(
    key: SigningKey, study: Study, pending: Pending, stage: Stage, site: str, state: StudyState, body: Any
) -> bytes:
    return seal_request(
        key, study=study.sha256, round=pending.round, attempt=pending.attempt, stage=stage, sender=SERVER,
        recipient=site, nonce=pending.nonces[site], previous=state.record_sha256, body=body,
    )  # fmt: skip
