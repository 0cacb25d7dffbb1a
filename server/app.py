"""The Flower ServerApp: one study's rounds from top to bottom.

Open the directory, meet the sites, then for each round: fix the attempt, ask every site for one gradient sum,
add the sums, take one optimizer step, sign the record, make it durable. A round below its floor is named in
the log with the missing sites and repeated or ended as the manifest says. Kill the process anywhere: the
same command goes on from the last durable step and asks again for exactly what it asked before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.canonical import canonical_json
from common.errors import CheckpointInvalid, RoundFailed
from common.files import write_atomic
from common.identity import SigningKey, load_key
from common.model.lora import Vector, read_adapter, vector_sha256, vector_size
from common.records import SignedRecord, sign_record
from common.schedule import active_groups, learning_rate
from server.aggregation import average
from server.checkpoint import Pending, StudyDirectory, StudyState
from server.cohort import Cohort, Outcome
from server.optimizer import take_step
from server.round import (
    Epsilons,
    contribute_requests,
    finish_request,
    hello_request,
    make_record,
    parse_contributions,
    parse_hello,
    plan_attempt,
)

log = logging.getLogger("fedrad.server")
app = ServerApp()
Clock = Callable[[], float]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in run_config `study-dir` to its end, or to a named failure."""
    run_study(grid, Path(str(context.run_config["study-dir"])))


def run_study(grid: Grid, directory: Path, *, clock: Clock = time.time) -> StudyState:
    """Run a signed study's remaining rounds; raises RoundFailed when the manifest says to end."""
    opened = StudyDirectory(directory)
    try:
        study, key = opened.study, load_key(opened.key_path)
        state = opened.load_state(_initial_adapter(opened))
        cohort = Cohort(grid, study, clock=clock)
        opened.log("started", round=state.round + 1, rounds=study.rounds, study=study.sha256)
        histories = _meet(opened, key, cohort, clock)
        while state.round + 1 < study.rounds:
            state = _run_round(opened, key, cohort, state, histories, clock)
        _finish(opened, key, cohort, state, histories, clock)
        return state
    finally:
        opened.close()


def _run_round(
    opened: StudyDirectory,
    key: SigningKey,
    cohort: Cohort,
    state: StudyState,
    histories: dict[str, int],
    clock: Clock,
) -> StudyState:
    study, round = opened.study, state.round + 1
    pending = opened.pending()
    attempt = pending.attempt if pending is not None and pending.round == round else 0
    resumed = attempt > 0
    while True:
        started = clock()
        if not resumed or pending is None:
            attempt += 1
            pending = _new_attempt(opened, cohort, round, attempt, clock)
        outcome = _ask(opened, key, cohort, state, pending, histories, resumed=resumed, clock=clock)
        adapter_in = vector_sha256(state.adapter)
        sums, unfit = parse_contributions(study, outcome.replies, adapter_sha256=adapter_in)
        missing = {**_absent(opened, pending), **outcome.missing, **unfit}
        if len(sums) >= study.cohort.min_sites:
            break
        resumed = False
        _name_failure(opened, pending, missing, len(sums))

    gradient = average(study, sums)
    adapter, optimizer, step_norm = take_step(
        study,
        state.adapter,
        state.optimizer,
        gradient,
        groups=active_groups(study, round),
        learning_rate=learning_rate(study, round),
    )
    record = make_record(
        study,
        state,
        pending,
        adapter_out=vector_sha256(adapter),
        contributions={site: outcome.replies[site].body for site in sums},
        missing=missing,
        epsilons=Epsilons(),
        now_unix_s=clock(),
    )
    signed = sign_record(key, record)
    after = StudyState(round, adapter, optimizer, record.sha256)
    opened.save_round(after, signed)
    opened.clear_pending()
    for site in outcome.replies:
        histories[site] = round - 1
    _log_round(opened, cohort, pending, missing, step_norm=step_norm, seconds=clock() - started)
    return after


def _new_attempt(opened: StudyDirectory, cohort: Cohort, round: int, attempt: int, clock: Clock) -> Pending:
    """Choose the cohort of a new attempt and make its random parts durable before anything is sent."""
    study = opened.study
    if attempt > study.cohort.max_attempts:
        raise RoundFailed(
            f"round {round}: expected at most {study.cohort.max_attempts} attempts (cohort.max_attempts), "
            "got no further one; see log.jsonl for the missing sites"
        )
    present = cohort.present(wait_s=study.cohort.deadline_s, at_least=study.cohort.min_sites)
    if len(present) < study.cohort.min_sites:
        absent = {site: "not connected" for site in study.site_ids if site not in present}
        empty = Pending(round, attempt, present, clock(), {})
        _name_failure(opened, empty, absent, len(present))
    pending = plan_attempt(study, round=round, attempt=attempt, cohort=present, now_unix_s=clock())
    opened.save_pending(pending)
    return pending


def _ask(
    opened: StudyDirectory,
    key: SigningKey,
    cohort: Cohort,
    state: StudyState,
    pending: Pending,
    histories: dict[str, int],
    *,
    resumed: bool,
    clock: Clock,
) -> Outcome:
    """Send the attempt's requests, the same bytes again when it is resumed, and collect the answers."""
    if "histories" not in pending.extra:
        known = {site: histories.get(site, -1) for site in pending.cohort}
        pending = replace(pending, extra={**pending.extra, "histories": known})
        opened.save_pending(pending)
    records_for = {
        site: _records_after(opened.records, pending.extra["histories"][site], pending.round)
        for site in pending.cohort
    }
    requests = contribute_requests(key, opened.study, state, pending, records_for)
    until = max(pending.deadline_unix_s, clock() + opened.study.cohort.deadline_s if resumed else 0.0)
    if resumed:
        cohort.present(wait_s=opened.study.cohort.deadline_s, at_least=len(pending.cohort))
    return cohort.exchange(requests, until_unix_s=until)


def _meet(opened: StudyDirectory, key: SigningKey, cohort: Cohort, clock: Clock) -> dict[str, int]:
    """Wait for the sites, let each load what it needs, and learn how far each one's history goes."""
    study = opened.study
    present = cohort.present(wait_s=study.cohort.deadline_s, at_least=len(study.cohort.site))
    requests = {site: hello_request(key, study, site) for site in present}
    outcome = cohort.exchange(requests, until_unix_s=clock() + study.cohort.deadline_s)
    for site, reason in sorted(outcome.missing.items()):
        opened.log("site-not-ready", site=site, reason=reason)
        log.warning("site %s is not ready: %s", site, reason)
    if len(outcome.replies) < study.cohort.min_sites:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(outcome.missing.items()))
        raise RoundFailed(
            f"expected at least {study.cohort.min_sites} sites ready (cohort.min_sites), "
            f"got {len(outcome.replies)}: {reasons or 'nobody connected'}"
        )
    return {site: parse_hello(reply) for site, reply in outcome.replies.items()}


def _finish(
    opened: StudyDirectory,
    key: SigningKey,
    cohort: Cohort,
    state: StudyState,
    histories: dict[str, int],
    clock: Clock,
) -> None:
    """Show every reachable site the last records and write what the run cost."""
    study = opened.study
    requests = {
        site: finish_request(
            key, study, site, state, _records_after(opened.records, histories.get(site, -1), study.rounds)
        )
        for site in cohort.present(wait_s=0.0, at_least=1)
    }
    outcome = cohort.exchange(requests, until_unix_s=clock() + min(60.0, study.cohort.deadline_s))
    for site, reason in sorted(outcome.missing.items()):
        opened.log("finish-not-acknowledged", site=site, reason=reason)
    opened.log("finished", rounds=study.rounds, adapter=vector_sha256(state.adapter))


def _initial_adapter(opened: StudyDirectory) -> Vector:
    """Read the first adapter and compare it with the manifest; raises CheckpointInvalid."""
    path = opened.directory / "initial"
    vector = read_adapter(path, opened.study.adapter.tensors)
    if vector_sha256(vector) != opened.study.adapter.initial_sha256:
        raise CheckpointInvalid(f"{path}: expected the manifest's first adapter, got another one")
    return vector


def _records_after(records: list[SignedRecord], after: int, before: int) -> list[SignedRecord]:
    return records[after + 1 : before]


def _absent(opened: StudyDirectory, pending: Pending) -> dict[str, str]:
    return {site: "not connected" for site in opened.study.site_ids if site not in pending.cohort}


def _name_failure(opened: StudyDirectory, pending: Pending, missing: dict[str, str], served: int) -> None:
    study = opened.study
    opened.log(
        "round-failed", round=pending.round, attempt=pending.attempt, served=served,
        floor=study.cohort.min_sites, missing=missing,
    )  # fmt: skip
    names = "; ".join(f"{site} ({reason})" for site, reason in sorted(missing.items()))
    message = (
        f"round {pending.round} attempt {pending.attempt}: expected at least {study.cohort.min_sites} "
        f"contributions (cohort.min_sites), got {served}; missing: {names}"
    )
    log.warning("%s", message)
    if study.cohort.on_failed_round.value == "end":
        raise RoundFailed(message)


def _log_round(
    opened: StudyDirectory,
    cohort: Cohort,
    pending: Pending,
    missing: dict[str, str],
    *,
    step_norm: float,
    seconds: float,
) -> None:
    opened.log(
        "round", round=pending.round, attempt=pending.attempt, cohort=list(pending.cohort),
        missing=missing, seconds=round(seconds, 4), step_norm=step_norm,
    )  # fmt: skip
    size = 4 * vector_size(opened.study.adapter.tensors)
    traffic = {
        "adapter_bytes": size, "messages": cohort.traffic.messages, "bytes": cohort.traffic.bytes,
    }  # fmt: skip
    write_atomic(opened.directory / "traffic.json", canonical_json(traffic))
