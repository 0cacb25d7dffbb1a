"""What a site agent refuses: pure checks of a request against the signed manifest and what was seen before.

Each function takes values and raises one named error that says what of the manifest was violated; nothing
here reads data, keys or the clock. The agent calls all of them before it touches a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client.state import Seen
from common.config import Study
from common.errors import (
    AdapterInvalid,
    CohortRepeatsSite,
    CohortTooSmall,
    DeadlinePassed,
    PreviousStateMismatch,
    RoundAlreadyServed,
    RoundLimitReached,
    SiteNotInStudy,
    StepTooLarge,
    WrongRound,
)
from common.model.lora import Vector, vector_from_bytes, vector_sha256
from common.protocol import Header
from common.records import SignedRecord, verify_chain


def verify_cohort(study: Study, cohort: Sequence[str], *, site: str) -> None:
    """Refuse a cohort below the floor, with an unknown or doubled site, or without this one."""
    unknown = [site for site in cohort if site not in study.site_ids]
    if unknown:
        raise SiteNotInStudy(f"cohort.site: expected sites of the manifest, got {unknown[0]!r}")
    if len(set(cohort)) != len(cohort):
        raise CohortRepeatsSite("cohort: expected each site once, got one twice")
    if site not in cohort:
        raise CohortTooSmall(f"cohort: expected this site ({site}) in it, got {', '.join(cohort)}")
    if len(cohort) < study.cohort.min_sites:
        raise CohortTooSmall(
            f"cohort.min_sites: expected at least {study.cohort.min_sites} sites, got {len(cohort)}"
        )


def verify_turn(study: Study, header: Header, seen: Seen, *, last_attempt: int) -> None:
    """Refuse a round outside the study or already behind, and an attempt that is not a new one."""
    if header.round >= study.sums:
        raise RoundLimitReached(f"stage.rounds: expected a round below {study.sums}, got {header.round}")
    if header.round <= seen.round:
        raise RoundAlreadyServed(f"expected a round after {seen.round}, got round {header.round} again")
    if not 1 <= header.attempt <= study.cohort.max_attempts:
        raise RoundLimitReached(
            f"cohort.max_attempts: expected attempt 1…{study.cohort.max_attempts}, got {header.attempt}"
        )
    if header.attempt < last_attempt:
        raise RoundAlreadyServed(
            f"round {header.round}: expected attempt {last_attempt} or later, got {header.attempt}"
        )


def verify_deadline(deadline_unix_s: float, *, now_unix_s: float) -> None:
    """Refuse a request that came too late."""
    if now_unix_s > deadline_unix_s:
        raise DeadlinePassed(
            f"expected the request before its deadline, got it {now_unix_s - deadline_unix_s:.0f} s late "
            "(if this repeats, compare this machine's clock with the server's)"
        )


def extend_history(study: Study, records: Sequence[SignedRecord], seen: Seen) -> Seen:
    """Verify the records that the site has not seen yet, each on the one before; returns the new history."""
    records = [signed for signed in records if signed.record.round > seen.round]
    if study.acceptance is None and any(signed.record.rolled_back_to for signed in records):
        raise AdapterInvalid("acceptance: expected no rollback in a study without this section, got one")
    verify_chain(
        records,
        study=study.sha256,
        after_round=seen.round,
        previous=seen.record_sha256,
        operator_key=study.cohort.operator_key,
    )
    newest = seen
    if records:
        last = records[-1].record
        newest = Seen(last.round, last.sha256, last.next_adapter)
    return newest


def verify_history(
    study: Study, header: Header, records: Sequence[SignedRecord], seen: Seen, *, adapter_sha256: str
) -> Seen:
    """Refuse a round that does not follow from the site's own history; returns the history before it.

    The records must lead from the last one the site verified to `header.previous`, and the adapter must be
    the one that the last record (or, in round 0, the manifest) names.
    """
    newest = extend_history(study, records, seen)
    if header.round != newest.round + 1:
        raise WrongRound(f"expected round {newest.round + 1} after the records shown, got {header.round}")
    if header.previous != newest.record_sha256:
        raise PreviousStateMismatch(
            f"expected a request that builds on {newest.record_sha256[:16]}…, got {header.previous[:16]}…"
        )
    expected = newest.adapter_sha256 if newest.round >= 0 else study.adapter.initial_sha256
    if adapter_sha256 != expected:
        raise AdapterInvalid(
            f"adapter: expected the one with hash {expected[:16]}… that the signed history leads to, "
            f"got {adapter_sha256[:16]}…"
        )
    return newest


def verify_adapter(study: Study, blob: bytes | memoryview, *, adapter_sha256: str) -> Vector:
    """Refuse adapter bytes of another length, with a non-finite value or another hash; returns the vector."""
    vector = vector_from_bytes(blob, study.adapter.tensors)
    got = vector_sha256(vector)
    if got != adapter_sha256:
        raise AdapterInvalid(f"adapter: expected hash {adapter_sha256[:16]}…, got {got[:16]}…")
    return vector


def verify_step(study: Study, adapter: Vector, *, round: int, kept: tuple[int, bytes] | None) -> None:
    """Refuse an adapter further from the last one this site was given than the rounds between allow.

    Each round moves it by at most optimizer.max_step_norm (L2), also where it went back to an earlier one.
    """
    if kept is None or kept[0] >= round:
        return
    before = vector_from_bytes(kept[1], study.adapter.tensors)
    rounds = round - kept[0]
    if study.acceptance is not None:
        rounds += study.acceptance.every_rounds
    norm = float(np.linalg.norm(adapter.astype(np.float64) - before))
    limit = rounds * study.optimizer.max_step_norm
    if norm > limit * (1 + 1e-5):
        raise StepTooLarge(
            f"optimizer.max_step_norm: expected at most {limit:g} in {rounds} rounds, got {norm:.4g}"
        )


def verify_roster(cohort: Sequence[str], roster: Sequence[str]) -> None:
    """Refuse a round whose masks are for other sites than its cohort."""
    if tuple(sorted(cohort)) != tuple(roster):
        raise CohortTooSmall(f"cohort: expected the roster of the masks, got {', '.join(sorted(cohort))}")


def verify_previous(header: Header, seen: Seen) -> None:
    """Refuse a later stage of a round that builds on another state than the round was opened on."""
    if header.previous != seen.record_sha256:
        raise PreviousStateMismatch(
            f"expected a request that builds on {seen.record_sha256[:16]}…, got {header.previous[:16]}…"
        )
