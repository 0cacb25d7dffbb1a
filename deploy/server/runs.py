"""Which studies run: started when every site has approved, started again after a crash, left when they ended.

Guarantees: a study is started only when `server.submission.verify_ready` passes at that moment; one ServerApp
per study (the study directory's lock says whether one lives); a ServerApp that dies is started again and goes
on from its last durable step, with the sites that still take part; a site that withdrew or was revoked is
asked for nothing more; a named refusal that no retry can change ends the study until the operator says
`study resume`. Flower's own run state is not trusted to survive: a run whose ServerApp is gone is stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from common.config import OnFailedRound
from common.errors import FedRadError
from common.files import write_atomic
from deploy.local.control import Control
from deploy.server.app import NODES_NAME, OUTCOME_NAME, read_outcome
from server.consortium import ServerHome
from server.submission import Submitted, submitted_studies, verify_ready

log = logging.getLogger("fedrad.up")

FAB = Path(__file__).parent / "fab"
_GONE_S = 5.0
_START_S = 120.0
_FIRST_RETRY_S = 5.0


@dataclass
class _Run:
    run_id: int
    started: float
    seen: bool = False
    alive: float = 0.0


@dataclass
class _Wait:
    due: float
    pause_s: float
    reason: str


class StudyRuns:
    """The studies of one server; `tick` moves them on."""

    def __init__(
        self, home: ServerHome, control: Control, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._home = home
        self._control = control
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._waits: dict[str, _Wait] = {}

    def forget_flower_runs(self) -> None:
        """Stop what an earlier life of this server left unfinished in Flower's state."""
        for run_id in self._control.unfinished_runs():
            self._control.stop_run(run_id)

    def tick(self, nodes: Mapping[str, int]) -> dict[str, dict[str, object]]:
        """Write each study's nodes, follow its run, start what may start; returns the studies' states."""
        states: dict[str, dict[str, object]] = {}
        for submitted in submitted_studies(self._home):
            name = submitted.study.study.id
            self._write_nodes(submitted, nodes)
            state, reason = self._move(name, submitted)
            states[name] = {
                "study": submitted.study.sha256,
                "state": state,
                "reason": reason,
                "missing": submitted.missing,
            }
        return states

    def _move(self, name: str, submitted: Submitted) -> tuple[str, str]:
        run = self._runs.get(name)
        if run is not None:
            self._follow(name, submitted, run)
        if name in self._runs:
            return "running", ""
        state, reason = read_outcome(submitted.directory)
        if state == "finished" or (state == "failed" and not _may_retry(submitted, reason)):
            return state, reason
        try:
            verify_ready(submitted)
        except FedRadError as error:
            return "waiting", str(error)
        wait = self._waits.get(name)
        if wait is not None and self._clock() < wait.due:
            return "retrying", wait.reason
        if len(self._runs) >= self._home.policy.studies_at_once:
            return "queued", f"expected at most {self._home.policy.studies_at_once} studies at once"
        self._start(name, submitted)
        return "running", ""

    def _start(self, name: str, submitted: Submitted) -> None:
        (submitted.directory / OUTCOME_NAME).unlink(missing_ok=True)
        run_id = self._control.start_run(FAB, {"study-dir": str(submitted.directory.absolute())})
        self._runs[name] = _Run(run_id, self._clock())
        without = f", without {', '.join(sorted(submitted.missing))}" if submitted.missing else ""
        log.info("study %s starts%s", name, without, extra={"study": submitted.study.sha256})

    def _follow(self, name: str, submitted: Submitted, run: _Run) -> None:
        """Look at Flower's word and at the study's lock; forget a run that is over."""
        now = self._clock()
        if is_held(submitted.directory):
            run.seen, run.alive = True, now
        status = self._control.run_status(run.run_id)
        gone = run.seen and now - run.alive > _GONE_S
        late = not run.seen and now - run.started > _START_S
        if not status.finished and not gone and not late:
            return
        if not status.finished:
            try:
                self._control.stop_run(run.run_id)
            except httpx.HTTPError:
                log.warning("a run could not be stopped", extra={"study": submitted.study.sha256})
        del self._runs[name]
        state, reason = read_outcome(submitted.directory)
        if state == "finished":
            self._waits.pop(name, None)
            log.info("study %s has finished", name, extra={"study": submitted.study.sha256})
            return
        before = self._waits.get(name)
        longest = self._home.policy.study_retry_s
        pause = min(longest, 2 * before.pause_s) if before else min(longest, _FIRST_RETRY_S)
        why = reason or f"its ServerApp ended ({status.text or 'no word'})"
        self._waits[name] = _Wait(now + pause, pause, why)
        code = reason.partition(":")[0] or "ServerAppEnded"
        log.warning(
            "the ServerApp of %s ended: %s",
            name,
            why,
            extra={"study": submitted.study.sha256, "reason": code},
        )

    @staticmethod
    def _write_nodes(submitted: Submitted, nodes: Mapping[str, int]) -> None:
        """Keep `nodes.json` to the manifest's sites that take part: approval and registry both count."""
        mine = {
            site: nodes[site]
            for site in submitted.study.site_ids
            if site in nodes and site not in submitted.missing
        }
        path = submitted.directory / NODES_NAME
        data = json.dumps(mine, sort_keys=True).encode()
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)


def resume(submitted: Submitted) -> None:
    """Let a study that ended with a refusal be started again."""
    state, _ = read_outcome(submitted.directory)
    if state == "failed":
        (submitted.directory / OUTCOME_NAME).unlink()


def is_held(directory: Path) -> bool:
    """Tell whether a process holds the study directory's lock; looking does not take it."""
    try:
        inode = (directory / "lock").stat().st_ino
        locks = Path("/proc/locks").read_text().splitlines()
    except FileNotFoundError:
        return False
    return any(" FLOCK " in line and f":{inode} " in line for line in locks)


def _may_retry(submitted: Submitted, reason: str) -> bool:
    """A round that lacks sites is tried again; whatever else was refused by name stays refused."""
    if reason.startswith("RunDirectoryBusy"):
        return True
    if not reason.startswith("RoundFailed") or "cohort.max_attempts" in reason:
        return False
    return submitted.study.cohort.on_failed_round is not OnFailedRound.END
