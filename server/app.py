"""The Flower ServerApp: one study's rounds from top to bottom.

Open the directory, meet the sites, then for each round: fix the attempt, ask every site for one gradient sum,
add the sums, take one optimizer step, sign the record, make it durable. A round below its floor is named in
the log with the missing sites and repeated or ended as the manifest says. Kill the process anywhere: the
same command goes on from the last durable step and asks again for exactly what it asked before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.canonical import canonical_json
from common.config import Study
from common.errors import CheckpointInvalid, FedRadError, RoundFailed
from common.files import write_atomic
from common.identity import SigningKey, load_key
from common.model.lora import Vector, read_adapter, vector_sha256, vector_size
from common.privacy.study_plan import verify_plan
from common.protocol import Message
from common.records import sign_record
from common.schedule import active_groups, learning_rate
from server.aggregation import Collected, protect
from server.checkpoint import Pending, StudyDirectory, StudyState
from server.cohort import Cohort
from server.collect import Attempt, MaskingBook, collect_direct, collect_masked
from server.optimizer import take_step
from server.round import finish_request, hello_request, make_record, parse_hello, plan_attempt

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
        verify_plan(study)
        state = opened.load_state(_initial_adapter(opened))
        cohort = Cohort(grid, study, clock=clock)
        opened.log("started", round=state.round + 1, rounds=study.rounds, study=study.sha256)
        histories = _meet(opened, key, cohort, clock) if state.round + 1 < study.rounds else {}
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
    """Attempt a round until its sum is there, then step, record and save."""
    study, round = opened.study, state.round + 1
    pending = opened.pending()
    if pending is None or pending.round != round:
        pending = _new_attempt(opened, key, cohort, histories, round=round, attempt=1, clock=clock)
    else:
        cohort.present(wait_s=study.cohort.deadline_s, at_least=len(pending.cohort))
    while True:
        started = clock()
        collected, reason = _collect(Attempt(opened, key, cohort, state, pending, histories, clock))
        served = len(collected.contributions)
        missing = _missing(study, pending, collected)
        if not reason and served >= study.cohort.min_sites:
            break
        _name_failure(opened, pending, missing, served, reason)
        pending = _new_attempt(
            opened, key, cohort, histories, round=round, attempt=pending.attempt + 1, clock=clock
        )

    protected = protect(study, collected, round=round)
    adapter, optimizer, step_norm = take_step(
        study,
        state.adapter,
        state.optimizer,
        protected.gradient,
        groups=active_groups(study, round),
        learning_rate=learning_rate(study, round),
    )
    record = make_record(
        study,
        state,
        pending,
        adapter_out=vector_sha256(adapter),
        contributions=collected.contributions,
        missing=missing,
        site_share_sigma_units=protected.site_share_sigma_units,
        server_sigma_units=protected.server_sigma_units,
        now_unix_s=clock(),
    )
    after = StudyState(round, adapter, optimizer, record.sha256)
    opened.save_round(after, sign_record(key, record))
    opened.clear_pending()
    for site in collected.contributions:
        histories[site] = round - 1
    _log_round(opened, cohort, pending, missing, step_norm=step_norm, seconds=clock() - started)
    return after


def _collect(attempt: Attempt) -> tuple[Collected, str]:
    """Collect an attempt's sum; a masked one that ends without a sum gives none and the reason."""
    if not attempt.study.masked:
        return collect_direct(attempt), ""
    missing: dict[str, str] = {}
    try:
        return collect_masked(attempt, MaskingBook(attempt.opened.directory, attempt.study), missing), ""
    except FedRadError as error:
        return Collected({}, missing), f"{error.code}: {error}"


def _new_attempt(
    opened: StudyDirectory,
    key: SigningKey,
    cohort: Cohort,
    histories: dict[str, int],
    *,
    round: int,
    attempt: int,
    clock: Clock,
) -> Pending:
    """Choose the cohort of a new attempt and make its random parts durable before anything is sent.

    A site that was not ready before is greeted first; one that is not ready now stays out of this attempt.
    """
    study = opened.study
    if attempt > study.cohort.max_attempts:
        raise RoundFailed(
            f"round {round}: expected at most {study.cohort.max_attempts} attempts (cohort.max_attempts), "
            "got no further one; see log.jsonl for the missing sites"
        )
    present = cohort.present(wait_s=study.cohort.deadline_s, at_least=study.cohort.min_sites)
    newcomers = [site for site in present if site not in histories]
    _greet(
        opened, key, cohort, histories, newcomers, until_unix_s=clock() + min(60.0, study.cohort.deadline_s)
    )
    ready = [site for site in present if site in histories]
    pending = plan_attempt(
        study, round=round, attempt=attempt, cohort=ready, histories=histories, now_unix_s=clock()
    )
    opened.save_pending(pending)
    return pending


def _meet(opened: StudyDirectory, key: SigningKey, cohort: Cohort, clock: Clock) -> dict[str, int]:
    """Wait for the sites, let each load what it needs, and learn how far each one's history goes."""
    study = opened.study
    present = cohort.present(wait_s=study.cohort.deadline_s, at_least=len(study.cohort.site))
    histories: dict[str, int] = {}
    missing = _greet(opened, key, cohort, histories, present, until_unix_s=clock() + study.cohort.deadline_s)
    if len(histories) < study.cohort.min_sites:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
        raise RoundFailed(
            f"expected at least {study.cohort.min_sites} sites ready (cohort.min_sites), "
            f"got {len(histories)}: {reasons or 'nobody connected'}"
        )
    return histories


def _greet(
    opened: StudyDirectory,
    key: SigningKey,
    cohort: Cohort,
    histories: dict[str, int],
    sites: Iterable[str],
    *,
    until_unix_s: float,
) -> dict[str, str]:
    """Say hello, note in `histories` how far each ready site has seen; returns who is not, and why."""

    def accept(site: str, reply: Message) -> None:
        histories[site] = parse_hello(reply)

    requests = {site: hello_request(key, opened.study, site) for site in sites}
    if not requests:
        return {}
    outcome = cohort.exchange(requests, accept=accept, until_unix_s=until_unix_s)
    for site, reason in sorted(outcome.missing.items()):
        opened.log("site-not-ready", site=site, reason=reason)
        log.warning("site %s is not ready: %s", site, reason)
    return outcome.missing


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
        site: finish_request(key, study, site, state, opened.records[histories.get(site, -1) + 1 :])
        for site in cohort.present(wait_s=0.0, at_least=1)
    }
    outcome = cohort.exchange(
        requests, accept=lambda site, reply: None, until_unix_s=clock() + min(60.0, study.cohort.deadline_s)
    )
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


def _missing(study: Study, pending: Pending, collected: Collected) -> dict[str, str]:
    """Name every site of the study that is not in the sum, with the reason."""
    missing = {}
    for site in study.site_ids:
        if site not in pending.cohort:
            missing[site] = "not connected"
        elif site not in collected.contributions:
            missing[site] = "no keys for this round: it joins the next"
    return {**missing, **collected.missing}


def _name_failure(
    opened: StudyDirectory, pending: Pending, missing: dict[str, str], served: int, why: str
) -> None:
    study = opened.study
    opened.log(
        "round-failed", round=pending.round, attempt=pending.attempt, served=served,
        floor=study.cohort.min_sites, missing=missing, reason=why,
    )  # fmt: skip
    names = "; ".join(f"{site} ({reason})" for site, reason in sorted(missing.items()))
    message = (
        f"round {pending.round} attempt {pending.attempt}: expected at least {study.cohort.min_sites} "
        f"contributions (cohort.min_sites), got {served}; missing: {names or 'none'}"
    )
    message += f"; {why}" if why else ""
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
