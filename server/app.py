"""The Flower ServerApp: one study's rounds from top to bottom.

Open the directory, meet the sites, then for each round: fix the attempt, ask every site for one gradient sum,
add the sums, take one optimizer step, sign the record, make it durable, log it. The sites witness the log:
what they send stays masked until a quorum has cosigned it. A round below its floor is named in the log with
the missing sites and repeated or ended as the manifest says. Kill the process anywhere: the same command goes
on from the last durable step and asks again for exactly what it asked before.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.canonical import canonical_json
from common.compatibility import Speaks, running_release
from common.config import Study
from common.errors import CheckpointInvalid, DealtWrong, FedRadError, QuorumNotReached, RoundFailed
from common.evaluation_counts import evaluation_plan_of
from common.files import write_atomic
from common.identity import SigningKey, load_key
from common.ledger.entries import Acceptance, AdapterDecision, Body, EndReason, Incident, Outcome, StudyEnd
from common.ledger.entries import RoundRecord as LoggedRound
from common.ledger.sbom import code_sha256, dependencies_sha256, software
from common.ledger.statements import make_round
from common.model.lora import Vector, read_adapter, vector_sha256, vector_size
from common.privacy.study_plan import verify_plan
from common.protocol import Message
from common.records import RoundRecord, SignedRecord, sign_record
from common.schedule import active_groups, learning_rate
from server.acceptance import Judge, Verdict, decide, due, open_judge
from server.aggregation import Collected, Protected, protect, release_epsilon
from server.checkpoint import Pending, StudyDirectory, StudyState
from server.cohort import Cohort
from server.collect import Attempt, MaskingBook, Retained, collect_direct, collect_masked, witness_first
from server.evaluation import evaluate_sum
from server.optimizer import take_step
from server.round import (
    hello_request,
    make_record,
    parse_hello,
    parse_witnessed,
    plan_attempt,
    witness_request,
)
from server.study_log import StudyLog, cosign_or_name, open_study_log

log = logging.getLogger("fedrad.server")
app = ServerApp()
Clock = Callable[[], float]
_LAST_CALLS = 3
INCIDENTS = {"SumOutOfRange": "sum-out-of-range", "SecretWrong": "wrong-secret", "ShareWrong": "wrong-share"}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in run_config `study-dir` to its end, or to a named failure."""
    run_study(grid, Path(str(context.run_config["study-dir"])))


@dataclass(frozen=True)
class Run:
    """One process's run of a study: what every step needs, and what the sites said in their hellos.

    `culprits` are sites whose dealings spoilt an attempt: left out as long as enough others are ready.
    """

    opened: StudyDirectory
    key: SigningKey
    cohort: Cohort
    log: StudyLog
    clock: Clock
    code: str
    lockfile: str
    judge: Judge | None = None
    histories: dict[str, int] = field(default_factory=dict)
    approvals: dict[str, bytes] = field(default_factory=dict)
    statements: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    culprits: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    release: Speaks = field(default_factory=running_release)
    expected: Callable[[], Collection[str]] | None = None

    def awaited(self, among: Iterable[str]) -> int:
        """Count the sites to wait for: those that can come at all, and never fewer than a round needs."""
        expected = self.study.site_ids if self.expected is None else self.expected()
        return max(self.study.cohort.min_sites, len(set(among) & set(expected)))

    @property
    def study(self) -> Study:
        return self.opened.study

    def patience(self) -> float:
        """Until when to wait for a short answer."""
        return self.clock() + min(60.0, self.study.cohort.deadline_s)


def run_study(
    grid: Grid,
    directory: Path,
    *,
    clock: Clock = time.time,
    judge: Judge | None = None,
    release: Speaks | None = None,
    expected: Callable[[], Collection[str]] | None = None,
) -> StudyState:
    """Run a signed study's remaining rounds; raises RoundFailed when the manifest says to end.

    expected: names the sites that can come at all, where some have left the study for good.
    A study that has ended is witnessed once more: what was logged since (a release) gets its cosignatures.
    """
    with _opened(grid, directory, clock, judge, release or running_release(), expected) as run:
        verify_plan(run.study)
        if run.study.federated_evaluation is not None:
            evaluation_plan_of(run.study).verify_accounting()
        state = run.opened.load_state(_initial_adapter(run.opened))
        run.log.add_sealed(run.opened.round_entries())
        run.opened.log("started", round=state.round + 1, rounds=run.study.rounds, study=run.study.sha256)
        if state.round + 1 < run.study.rounds:
            _meet(run)
        while state.round + 1 < run.study.rounds:
            state = _run_round(run, state)
        _evaluate(run, state)
        _finish(run, state)
        return state


@contextlib.contextmanager
def _opened(
    grid: Grid,
    directory: Path,
    clock: Clock,
    judge: Judge | None,
    release: Speaks,
    expected: Callable[[], Collection[str]] | None,
) -> Iterator[Run]:
    """Hold the study directory and its log for this process; load what the acceptance test needs."""
    with open_study_log(directory, clock=clock) as (opened, book):
        study = opened.study
        if study.acceptance is not None and judge is None:
            judge = open_judge(directory, study)
        cohort = Cohort(grid, study, clock=clock, spoken=release.versions)
        yield Run(
            opened, load_key(opened.key_path), cohort, book, clock, code_sha256(), dependencies_sha256(),
            judge, culprits=opened.culprits(), release=release, expected=expected,
        )  # fmt: skip


def _run_round(run: Run, state: StudyState) -> StudyState:
    """Attempt a round until its sum is there, then step, record, save and log."""
    study, round = run.study, state.round + 1
    pending = run.opened.pending()
    if pending is None or pending.round != round:
        pending = _new_attempt(run, round=round, attempt=1)
    elif run.log.has_attempt(round, pending.attempt):
        pending = _new_attempt(run, round=round, attempt=pending.attempt + 1)
    else:
        run.cohort.present(wait_s=study.cohort.deadline_s, at_least=run.awaited(pending.cohort))
    while True:
        started = run.clock()
        attempt = Attempt(run.opened, run.key, run.cohort, state, pending, run.log, run.clock)
        collected, protected, reason = _collect(run, attempt)
        missing = _missing(run, pending, collected, summed=protected is not None)
        if protected is not None:
            break
        _name_failure(run, attempt, missing, len(collected.contributions), reason)
        pending = _new_attempt(run, round=round, attempt=pending.attempt + 1)

    adapter, optimizer, step_norm = take_step(
        study,
        state.adapter,
        state.optimizer,
        protected.gradient,
        groups=active_groups(study, round),
        learning_rate=learning_rate(study, round),
    )
    after, verdict = _judged(run, state, replace(state, round=round, adapter=adapter, optimizer=optimizer))
    rolled_back = verdict is not None and not verdict.passed
    record = make_record(
        study,
        state,
        pending,
        adapter_out=vector_sha256(adapter),
        contributions=collected.contributions,
        missing=missing,
        site_share_sigma_units=protected.site_share_sigma_units,
        server_sigma_units=protected.server_sigma_units,
        rolled_back_to=vector_sha256(after.adapter) if rolled_back else "",
        now_unix_s=run.clock(),
    )
    signed = sign_record(run.key, record)
    entries: list[Body] = [_logged_round(run, attempt, collected, signed), *_decision(record, verdict)]
    sealed = run.log.seal(entries)
    after = replace(after, record_sha256=record.sha256)
    run.opened.save_round(after, signed, sealed)
    run.log.add_sealed(sealed)
    run.opened.clear_pending()
    for site in collected.contributions:
        run.histories[site] = round - 1
        run.versions.setdefault(site, attempt.version(site))
    _forget(run, missing)
    _log_round(run, pending, missing, verdict, step_norm=step_norm, seconds=run.clock() - started)
    return after


def _judged(run: Run, before: StudyState, after: StudyState) -> tuple[StudyState, Verdict | None]:
    """Test a new adapter where it is due; one that fails is given up for the last accepted one."""
    acceptance = run.study.acceptance
    if acceptance is None or run.judge is None or not due(run.study, after.round):
        return after, None
    accepted_loss = before.accepted_loss
    if accepted_loss is None:
        accepted_loss = run.judge(_initial_adapter(run.opened))
    verdict = decide(acceptance, loss=run.judge(after.adapter), accepted_loss=accepted_loss)
    if verdict.passed:
        return replace(after, accepted_round=after.round, accepted_loss=verdict.loss), verdict
    adapter, optimizer = run.opened.accepted(before, _initial_adapter(run.opened))
    return replace(
        after, adapter=adapter, optimizer=optimizer, accepted_round=after.round, accepted_loss=accepted_loss
    ), verdict


def _decision(record: RoundRecord, verdict: Verdict | None) -> list[Body]:
    """Write the acceptance test's outcome down for the ledger; a rollback is an incident, too."""
    if verdict is None:
        return []
    if verdict.passed:
        accept = Acceptance.ACCEPT
        return [
            AdapterDecision(number=record.round, decision=accept, adapter=record.adapter_out, rejected="")
        ]
    return [
        AdapterDecision(
            number=record.round, decision=Acceptance.ROLLBACK, adapter=record.rolled_back_to,
            rejected=record.adapter_out,
        ),
        Incident(code="adapter-rejected", site="", number=record.round, detail=""),
    ]  # fmt: skip


def _collect(run: Run, attempt: Attempt) -> tuple[Collected, Protected | None, str]:
    """Collect an attempt's sum and protect it; an attempt that fails gives no gradient but the reason."""
    missing: dict[str, str] = {}
    study, round = attempt.study, attempt.pending.round
    collected = Collected({}, missing)
    try:
        if study.masked:
            collected = collect_masked(attempt, MaskingBook(attempt.opened.directory, study), missing)
        else:
            collected = collect_direct(replace(attempt, pending=witness_first(attempt)))
        if len(collected.contributions) < study.cohort.min_sites:
            return collected, None, ""
        return collected, protect(study, collected, round=round), ""
    except FedRadError as error:
        missing.update(_blame(run, error))
        return collected, None, f"{error.code}: {error}"


def _blame(run: Run, error: FedRadError) -> dict[str, str]:
    """Note for good the site for whose dealings an attempt failed, if any; returns it with the reason."""
    if not isinstance(error, DealtWrong) or not error.site:
        return {}
    blamed = {error.site: f"{error.code}: what it dealt spoilt an attempt"}
    run.culprits.update(blamed)
    run.opened.save_culprits(run.culprits)
    return blamed


def _new_attempt(run: Run, *, round: int, attempt: int) -> Pending:
    """Choose the cohort of a new attempt and make its random parts durable before anything is sent.

    A site that was not ready before is greeted first; one that is not ready now stays out of this attempt, as
    does a culprit while enough others are ready. A masked round whose keys came with the round before, and
    lack a site that is back or hold a culprit's, begins with attempt 2.
    """
    study = run.study
    if attempt > study.cohort.max_attempts:
        raise RoundFailed(
            f"round {round}: expected at most {study.cohort.max_attempts} attempts (cohort.max_attempts), "
            "got no further one; see log.jsonl for the missing sites"
        )
    present = run.cohort.present(wait_s=study.cohort.deadline_s, at_least=study.cohort.min_sites)
    newcomers = [site for site in present if site not in run.histories]
    _greet(run, newcomers, until_unix_s=run.patience())
    run.log.open(
        run.approvals, statements=[s for site in sorted(run.statements) for s in run.statements[site]],
        code=run.code, lockfile=run.lockfile, software=software(),
    )  # fmt: skip
    run.log.announce_software(code=run.code, lockfile=run.lockfile, number=min(round, study.rounds))
    ready = [site for site in present if site in run.histories]
    honest = [site for site in ready if site not in run.culprits]
    ready = honest if len(honest) >= study.cohort.min_sites else ready
    if attempt == 1 and study.masked:
        prepared = MaskingBook(run.opened.directory, study).prepared(round)
        dealt = set(prepared or ready)
        changed = set(ready) - dealt or run.culprits.keys() & dealt - set(ready)
        if changed and study.cohort.max_attempts > 1:
            attempt = 2  # somebody is back, or has to be gone: keys for everyone, in exchanges of their own
        else:  # one that has dealt and is away belongs to the round: its masks are undone
            ready = sorted(dealt | set(ready))
    pending = plan_attempt(
        study, round=round, attempt=attempt, cohort=ready, histories=run.histories, sizes=run.log.sizes,
        versions=run.versions, now_unix_s=run.clock(),
    )  # fmt: skip
    run.opened.save_pending(pending)
    return pending


def _meet(run: Run) -> None:
    """Wait for the sites, let each load what it needs, and learn how far each one's history goes."""
    study = run.study
    present = run.cohort.present(wait_s=study.cohort.deadline_s, at_least=run.awaited(study.site_ids))
    until_unix_s = run.clock() + study.cohort.deadline_s
    missing = _greet(run, present, until_unix_s=until_unix_s, grace_s=study.cohort.grace)
    if len(run.histories) < study.cohort.min_sites:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
        raise RoundFailed(
            f"expected at least {study.cohort.min_sites} sites ready (cohort.min_sites), "
            f"got {len(run.histories)}: {reasons or 'nobody connected'}"
        )


def _greet(
    run: Run, sites: Iterable[str], *, until_unix_s: float, grace_s: float = 0.0, train: bool = True
) -> dict[str, str]:
    """Say hello and note what each ready site has seen and approved; returns who is not ready, and why.

    train: whether a site loads model and data, and commits its budget, before it calls itself ready.
    """

    def accept(site: str, reply: Message) -> None:
        hello = parse_hello(reply, release=run.release)
        run.log.verify_approval(site, hello.approval)
        for statement in hello.statements:
            run.log.verify_own(site, statement)
        run.log.saw(site, hello.seen_size)
        run.statements[site] = hello.statements
        run.approvals[site] = hello.approval
        run.versions[site] = hello.version
        run.histories[site] = hello.seen_round

    requests = {
        site: hello_request(run.key, run.study, site, train=train, release=run.release) for site in sites
    }
    if not requests:
        return {}
    outcome = run.cohort.exchange(requests, accept=accept, until_unix_s=until_unix_s, grace_s=grace_s)
    for site, reason in sorted(outcome.missing.items()):
        run.opened.log("site-not-ready", site=site, reason=reason)
        log.warning("site %s is not ready: %s", site, reason)
    return outcome.missing


def _evaluate(run: Run, state: StudyState) -> None:
    """Have the final adapter evaluated across sites, once, where the manifest asks for it.

    Failing does not fail the study: it is named in log and ledger, and the study ends without figures.
    """
    study, round = run.study, run.study.rounds
    if study.federated_evaluation is None or run.log.evaluated or run.log.ended:
        return
    try:
        if not run.histories:
            _meet(run)
        pending = run.opened.pending()
        if pending is None or pending.round != round:
            pending = _new_attempt(run, round=round, attempt=1)
        while True:
            attempt = Attempt(run.opened, run.key, run.cohort, state, pending, run.log, run.clock)
            try:
                collected = collect_masked(attempt, MaskingBook(run.opened.directory, study), {})
                entry = evaluate_sum(
                    study, collected, adapter=vector_sha256(state.adapter), attempt=pending.attempt,
                    statements=attempt.statements.values(),
                )  # fmt: skip
                break
            except FedRadError as error:
                _blame(run, error)
                run.opened.log("evaluation-failed", attempt=pending.attempt, reason=f"{error.code}: {error}")
            pending = _new_attempt(run, round=round, attempt=pending.attempt + 1)
    except RoundFailed as error:
        log.warning("the final adapter was not evaluated across sites: %s", error)
        run.log.add(Incident(code="evaluation-failed", site="", number=state.round, detail=""))
        run.opened.clear_pending()
        return
    run.log.add(entry)
    run.opened.clear_pending()
    run.opened.log("evaluation", metrics=entry.metrics, studies=entry.studies)


def _finish(run: Run, state: StudyState) -> None:
    """Log the end and have the whole log witnessed; sites that are not there are asked some times more."""
    adapter = vector_sha256(state.adapter)
    run.log.add(
        StudyEnd(
            reason=EndReason.COMPLETED, number=state.round, adapter=adapter,
            release_epsilon=run.log.release_epsilon,
        )
    )  # fmt: skip
    shown: set[str] = set()
    for call in range(1, _LAST_CALLS + 1):
        _show_the_end(run, state, shown)
        try:
            run.log.witnessed()
            break
        except QuorumNotReached as error:
            if call < _LAST_CALLS:
                continue
            run.opened.log("end-not-witnessed", reason=str(error))
            log.warning("the log's end is not witnessed yet: %s; run the study again to ask once more", error)
    run.opened.log("finished", rounds=run.study.rounds, adapter=adapter)


def _show_the_end(run: Run, state: StudyState, shown: set[str]) -> None:
    """Show the last records to each site that has not seen them, and let it cosign; waits up to a minute."""
    sites = run.study.site_ids
    present = run.cohort.present(wait_s=min(60.0, run.study.cohort.deadline_s), at_least=run.awaited(sites))
    unknown = [site for site in present if site not in run.histories]
    _greet(run, unknown, train=False, until_unix_s=run.patience())

    def accept(site: str, reply: Message) -> None:
        cosign_or_name(run.log, site, parse_witnessed(reply))
        shown.add(site)

    requests = {
        site: witness_request(
            run.key, run.study, site, state, run.opened.records[run.histories.get(site, -1) + 1 :],
            run.log.offer(run.log.sizes.get(site, 0)), version=run.versions[site],
        )
        for site in present
        if site in run.histories and site not in shown
    }  # fmt: skip
    outcome = run.cohort.exchange(requests, accept=accept, until_unix_s=run.patience())
    for site, reason in sorted(outcome.missing.items()):
        run.opened.log("finish-not-acknowledged", site=site, reason=reason)
        run.histories.pop(site, None)  # asked again where it stands


def _initial_adapter(opened: StudyDirectory) -> Vector:
    """Read the first adapter and compare it with the manifest; raises CheckpointInvalid."""
    path = opened.directory / "initial"
    vector = read_adapter(path, opened.study.adapter.tensors)
    if vector_sha256(vector) != opened.study.adapter.initial_sha256:
        raise CheckpointInvalid(f"{path}: expected the manifest's first adapter, got another one")
    return vector


def _missing(run: Run, pending: Pending, collected: Collected, *, summed: bool) -> dict[str, str]:
    """Name the sites that are not in the sum, with the reason; where there is none, those that failed it."""
    missing = {
        site: run.culprits.get(site, "not connected")
        for site in run.study.site_ids
        if site not in pending.cohort
    }
    if summed:
        for site in sorted(set(pending.cohort) - set(collected.contributions)):
            missing[site] = "no keys for this round: it joins the next"
    return {**missing, **collected.missing}


def _forget(run: Run, missing: Iterable[str]) -> None:
    """Have sites greeted anew before the next attempt: they may have seen more than their answers showed."""
    for site in missing:
        run.histories.pop(site, None)


def _name_failure(run: Run, attempt: Attempt, missing: dict[str, str], served: int, why: str) -> None:
    """Write a failed attempt into log and ledger; raises RoundFailed where the manifest says to end."""
    study, pending = run.study, attempt.pending
    failed = make_round(
        study, number=pending.round, attempt=pending.attempt, outcome=Outcome.FAILED,
        adapter_in=vector_sha256(attempt.state.adapter), cohort=pending.cohort,
        participations=attempt.statements.values(), release_epsilon=run.log.release_epsilon,
        code=run.code, lockfile=run.lockfile,
    )  # fmt: skip
    incidents = [
        Incident(code=INCIDENTS[name], site="", number=pending.round, detail="")
        for name in INCIDENTS
        if name in why
    ]
    run.log.add_round(failed, *incidents)
    Retained(run.opened.directory, study, pending).discard()
    _forget(run, missing)
    run.opened.log(
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


def _logged_round(run: Run, attempt: Attempt, collected: Collected, signed: SignedRecord) -> LoggedRound:
    """Write a served round down for the ledger; a site that answered and is not in the sum took part too."""
    study, pending, record = run.study, attempt.pending, signed.record
    parts = [replace(p, summed=site in collected.contributions) for site, p in attempt.statements.items()]
    return make_round(
        study,
        number=pending.round,
        attempt=pending.attempt,
        outcome=Outcome.RELEASED,
        adapter_in=record.adapter_in,
        adapter_out=record.adapter_out,
        cohort=pending.cohort,
        participations=parts,
        server_sigma_units=record.server_sigma_units,
        release_epsilon=release_epsilon(study, run.opened.records, record, parts, run.log.release_epsilon),
        aggregate=collected.aggregate,
        record=record.sha256,
        code=run.code,
        lockfile=run.lockfile,
    )


def _log_round(
    run: Run,
    pending: Pending,
    missing: dict[str, str],
    verdict: Verdict | None,
    *,
    step_norm: float,
    seconds: float,
) -> None:
    run.opened.log(
        "round", round=pending.round, attempt=pending.attempt, cohort=list(pending.cohort),
        missing=missing, seconds=round(seconds, 4), step_norm=step_norm,
        late={site: round(late_s, 1) for site, late_s in sorted(run.cohort.take_late().items())},
        stage_seconds={stage: round(spent, 4) for stage, spent in run.cohort.take_seconds().items()},
    )  # fmt: skip
    if verdict is not None:
        run.opened.log(
            "acceptance", round=pending.round, loss=verdict.loss, accepted_loss=verdict.accepted_loss,
            passed=verdict.passed,
        )  # fmt: skip
        if not verdict.passed:
            log.warning(
                "round %d: public loss %.4f after %.4f: gone back to the adapter accepted last",
                pending.round, verdict.loss, verdict.accepted_loss,
            )  # fmt: skip
    size = 4 * vector_size(run.study.adapter.tensors)
    traffic = {
        "adapter_bytes": size, "messages": run.cohort.traffic.messages, "bytes": run.cohort.traffic.bytes,
    }  # fmt: skip
    write_atomic(run.opened.directory / "traffic.json", canonical_json(traffic))
