"""The audit of one study: its chain of rounds, what the sites signed, the mechanism, the code."""

from __future__ import annotations

from collections import Counter

from common.config import Mode
from common.errors import FedRadError
from common.ledger.case import Case, StudyCase
from common.ledger.entries import (
    SOFTWARE_CHANGED,
    Acceptance,
    AdapterDecision,
    Incident,
    KeyUse,
    Outcome,
    Release,
    RoundRecord,
    StudyEnd,
)
from common.ledger.findings import Finding, Problem, Problems, Status, conclude
from common.ledger.statements import verify_contribution
from common.privacy.study_plan import plan_of


def check_rounds(study: StudyCase) -> Finding:
    """Round follows round, each on the adapter that the one before left, attempts as the manifest allows."""
    manifest, problems = study.manifest, Problems()
    current = manifest.adapter.initial_sha256
    known = {current}
    number, attempt, released, failed = 0, 0, 0, 0
    for index, entry in study.entries:
        body, where = entry.body, f"entry {index}"
        if isinstance(body, AdapterDecision):
            if body.decision is Acceptance.ACCEPT and body.adapter != current:
                problems.add(f"round {body.number}: accepted an adapter that is not the newest", where)
            if body.decision is Acceptance.ROLLBACK:
                if body.adapter not in known or body.rejected != current:
                    problems.add(f"round {body.number}: rolled back between adapters not in the chain", where)
                current = body.adapter
        elif isinstance(body, StudyEnd) and body.adapter != current:
            problems.add("the study ends with an adapter that the rounds did not make", where)
        if not isinstance(body, RoundRecord):
            continue
        name = f"round {body.number}"
        if body.number != number:
            problems.add(f"expected round {number}, got round {body.number}: dropped or repeated", where)
            number, attempt = body.number, 0
        if body.attempt <= attempt or body.attempt > manifest.cohort.max_attempts:
            problems.add(
                f"{name}: attempt {body.attempt} after {attempt}, at most {manifest.cohort.max_attempts}",
                where,
            )
        if body.adapter_in != current:
            problems.add(f"{name}: starts from an adapter that no round left", where)
        summed = sum(part.summed for part in body.participations)
        if not set(body.cohort) <= set(manifest.site_ids):
            problems.add(f"{name}: a site outside the manifest", where)
        attempt = body.attempt
        if body.outcome is Outcome.RELEASED:
            if summed < manifest.cohort.min_sites:
                problems.add(
                    f"{name}: released with {summed} sites of at least {manifest.cohort.min_sites}",
                    where,
                )
            current, number, attempt = body.adapter_out, number + 1, 0
            known.add(current)
            released += 1
        else:
            failed += 1
    if number > manifest.rounds:
        problems.add(f"{number} rounds, the manifest allows {manifest.rounds}")
    return conclude(
        "round-chain",
        problems,
        passed=f"{released} rounds in one chain of adapters, {failed} failed attempts",
        evidence=_span(study),
        study=study.sha256,
    )


def check_contributions(case: Case, study: StudyCase) -> Finding:
    """Every participating site signed its commitment, its noise, clipping, sampling and epsilon."""
    problems, count = Problems(), 0
    for index, record in study.rounds:
        for part in record.participations:
            keys = case.keys.valid(part.site, KeyUse.MESSAGE, index=index, time_s=case.entries[index].time_s)
            if not keys:
                problems.add(f"round {record.number}: {part.site} had no key that counted", f"entry {index}")
            for position, key in enumerate(keys):
                try:
                    verify_contribution(study.sha256, record, part, key)
                    count += 1
                    break
                except FedRadError:
                    if position == len(keys) - 1:
                        problems.add(
                            f"round {record.number}: {part.site} did not sign what is recorded",
                            f"entry {index}",
                        )
    commitments = Counter(p.commitment for _, record in study.rounds for p in record.participations)
    for commitment, times in commitments.items():
        if times > 1:
            problems.add(f"commitment {commitment[:16]}… stands {times} times: a contribution was replayed")
    return conclude(
        "contribution-signatures",
        problems,
        passed=f"{count} contributions, each signed by its site",
        evidence=_span(study),
        study=study.sha256,
    )


def check_mechanism(study: StudyCase) -> Finding:
    """Clipping, sampling, delta and every noise width are those of the manifest's privacy plan."""
    manifest = study.manifest
    if manifest.privacy.mode is Mode.PLAIN:
        return Finding(
            "mechanism", Status.NOT_CHECKABLE, "mode plain: the study claims no privacy", study=study.sha256
        )
    try:
        plan = plan_of(manifest)
    except FedRadError as error:
        return conclude(
            "mechanism",
            [Problem(f"the manifest fixes no privacy plan: {error}", f"entry {study.index}")],
            passed="",
            study=study.sha256,
        )
    share, problems = plan.site_share_sigma_units, Problems()
    privacy, rate = manifest.privacy, manifest.training.sampling_rate
    for index, record in study.rounds:
        where, name = f"entry {index}", f"round {record.number}"
        for what, got, expected in (
            ("clip_norm", record.clip_norm, privacy.clip_norm),
            ("sampling_rate", record.sampling_rate, rate),
            ("patients", record.patients, manifest.training.patients),
            ("delta", record.delta, privacy.delta),
        ):
            if got != expected:
                problems.add(f"{name}: {what} is {got:g}, the manifest says {expected:g}", where)
        for part in record.participations:
            if not close(part.sigma_units, share):
                problems.add(
                    f"{name}: {part.site} added noise of width {part.sigma_units:g}, the plan says {share:g}",
                    where,
                )
        summed = sum(part.summed for part in record.participations)
        if record.outcome is Outcome.RELEASED and plan.survivor_floor <= summed <= plan.sites:
            got, expected = record.server_sigma_units, plan.server_topup_sigma_units(summed)
            if not close(got, expected):
                problems.add(f"{name}: the server added width {got:g}, the plan says {expected:g}", where)
    return conclude(
        "mechanism",
        problems,
        passed=f"every round: clip {privacy.clip_norm:g}, sampling {rate:g}, site noise {share:.1f} units, "
        f"delta {privacy.delta:g}",
        evidence=(f"entry {study.index}", *_span(study)),
        study=study.sha256,
    )


def check_code(study: StudyCase) -> Finding:
    """Code and lockfile hashes of every round are those that the study was opened with, or announced later.

    A change that an incident announced before the round is no failure, but what the new code does is not
    checkable from here.
    """
    problems, changes, announced = Problems(), [], False
    code, lockfile = study.opened.code, study.opened.lockfile
    for index, entry in study.entries:
        body = entry.body
        if isinstance(body, Incident) and body.code == SOFTWARE_CHANGED:
            announced = True
        if not isinstance(body, RoundRecord):
            continue
        if announced and (body.code, body.lockfile) != (code, lockfile):
            code, lockfile = body.code, body.lockfile
            changes.append(f"entry {index}")
        announced = False
        for what, got, expected in (("code", body.code, code), ("dependencies", body.lockfile, lockfile)):
            if got != expected:
                problems.add(
                    f"round {body.number}: other {what} than the study was opened with", f"entry {index}"
                )
    unchecked = f"the software changed between rounds, as announced: {', '.join(changes)}" if changes else ""
    return conclude(
        "code",
        problems,
        passed=f"code {study.opened.code[:16]}… and lockfile {study.opened.lockfile[:16]}… throughout",
        unchecked=unchecked,
        evidence=(f"entry {study.index}", *changes),
        study=study.sha256,
    )


def check_end(study: StudyCase) -> Finding:
    """The study has an end in the ledger, and its incidents are counted."""
    ends = kind_evidence(study, StudyEnd)
    incidents = kind_evidence(study, Incident)
    detail = f"ended; {len(incidents)} incidents on record"
    unchecked = "" if ends else f"the study has not ended; {len(incidents)} incidents on record so far"
    return conclude(
        "completeness",
        [],
        passed=detail,
        unchecked=unchecked,
        evidence=(*ends, *incidents),
        study=study.sha256,
    )


def close(got: float, expected: float) -> bool:
    """Whether a stated width is the expected one, but for the last digits of a float."""
    return abs(got - expected) <= 1e-9 * max(1.0, abs(expected))


def _span(study: StudyCase) -> tuple[str, ...]:
    rounds = study.rounds
    return (f"entry {rounds[0][0]}", f"entry {rounds[-1][0]}") if rounds else ()


def kind_evidence(study: StudyCase, kind: type[Release | StudyEnd | Incident]) -> tuple[str, ...]:
    return tuple(f"entry {index}" for index, entry in study.entries if isinstance(entry.body, kind))
