"""Prometheus metrics of one site, made from its ledger, its studies, its agent's structured log and its link.

Read at each scrape while the agent may be running: nothing is locked or changed. Labels are a study's id or
the start of its hash, a stage, a direction, and an error's name. Nothing counts patients, images or reports,
and no metric is made of data. It listens on loopback unless told otherwise; it is for the hospital's own
monitoring, and nothing of it goes to the operator.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.budget import BudgetLimits, BudgetSummary, read_summary
from client.heartbeat import LINK_NAME
from client.home import SiteHome, list_studies, open_home, read_approved_study, read_study
from common.errors import FedRadError, StudyNotApproved

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

LOG_NAME = Path("logs") / "agent.jsonl"
SERVED = "answered a stage"
_REASON = re.compile(r"[A-Z][A-Za-z]{2,50}")


class SiteCollector:
    """Reads a site's directory whenever Prometheus asks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[tuple[int, int], BudgetSummary] = {}
        self._log = AgentLog(directory / LOG_NAME)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the site; `fedrad_site_readable` is 0 where its directory cannot be read."""
        from prometheus_client.core import GaugeMetricFamily

        readable = GaugeMetricFamily("fedrad_site_readable", "1 where the site's directory could be read.")
        try:
            home = open_home(self._directory)
            self._log.read()
            families = [
                *_budget(self._summary(home)),
                *_studies(home),
                *_log(self._log),
                *_link(home.directory / "run" / LINK_NAME),
            ]
        except (FedRadError, OSError):
            readable.add_metric([], 0)
            yield readable
            return
        readable.add_metric([], 1)
        yield readable
        yield from families

    def _summary(self, home: SiteHome) -> BudgetSummary:
        """The budget's summary, composed again only where the ledger has grown."""
        path = home.budget_path
        status = path.stat() if path.exists() else None
        key = (status.st_size, status.st_mtime_ns) if status else (0, 0)
        if key not in self._seen:
            limits = BudgetLimits(epsilon=home.epsilon, delta=home.delta)
            self._seen = {key: read_summary(path, limits)}
        return self._seen[key]


def _budget(summary: BudgetSummary) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    spent = GaugeMetricFamily(
        "fedrad_site_study_epsilon_spent", "Epsilon spent, at the study's delta.", labels=["study"]
    )
    committed = GaugeMetricFamily(
        "fedrad_site_study_epsilon_committed", "Epsilon that the study may spend.", labels=["study"]
    )
    charges = CounterMetricFamily("fedrad_site_charges", "Rounds charged to the budget.", labels=["study"])
    for study in summary.studies:
        name = study.study[:12]
        spent.add_metric([name], study.epsilon_spent)
        committed.add_metric([name], study.epsilon_committed)
        charges.add_metric([name], study.charges)
    yield from (spent, committed, charges)
    for metric, text, value in (
        (
            "fedrad_site_epsilon_spent",
            "Epsilon spent by all studies, at the site's delta.",
            summary.epsilon_spent,
        ),
        ("fedrad_site_epsilon_committed", "Epsilon committed to all studies.", summary.epsilon_committed),
        ("fedrad_site_epsilon_allowed", "Epsilon that the site allows in total.", summary.limits.epsilon),
    ):
        family = GaugeMetricFamily(metric, text)
        family.add_metric([], value)
        yield family


def _studies(home: SiteHome) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    approved = GaugeMetricFamily(
        "fedrad_site_study_approved", "1 for a study that this site approved.", labels=["study"]
    )
    seen = GaugeMetricFamily(
        "fedrad_site_rounds_seen", "Rounds whose record this site has verified.", labels=["study"]
    )
    for sha256 in list_studies(home):
        try:
            read_study(home, sha256)
            read_approved_study(home, sha256)
            value = 1
        except StudyNotApproved:
            value = 0
        approved.add_metric([sha256[:12]], value)
        path = home.state_directory(sha256) / "seen.json"
        if path.is_file():
            seen.add_metric([sha256[:12]], int(json.loads(path.read_text())["round"]) + 1)
    yield from (approved, seen)


def _log(log: AgentLog) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    refusals = CounterMetricFamily(
        "fedrad_site_refusals", "Requests that the agent refused, since its log began.", labels=["reason"]
    )
    for reason, count in sorted(log.refusals.items()):
        refusals.add_metric([reason], count)
    seconds = CounterMetricFamily(
        "fedrad_site_stage_seconds", "Seconds the agent worked in a stage.", labels=["study", "stage"]
    )
    answers = CounterMetricFamily(
        "fedrad_site_stage_answers", "Requests of a stage that it answered.", labels=["study", "stage"]
    )
    for key, spent in sorted(log.seconds.items()):
        seconds.add_metric(key, spent)
        answers.add_metric(key, log.answers[key])
    yield from (refusals, seconds, answers)


def _link(path: Path) -> Iterator[Metric]:
    """Bytes that the gateway has carried since the link started; none where it never ran."""
    from prometheus_client.core import CounterMetricFamily

    carried = CounterMetricFamily(
        "fedrad_site_bytes", "Bytes carried between SuperNode and server.", labels=["direction"]
    )
    try:
        value = json.loads(path.read_text())
        for direction in ("up", "down"):
            carried.add_metric([direction], int(value[f"bytes_{direction}"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    yield carried


class AgentLog:
    """What an agent's structured log adds up to; each line is read once, a torn one when it is whole.

    When the log begins anew (at 16 MB), so does the reading; the sums go on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._end = 0
        self._one_reader = threading.Lock()
        self.refusals: Counter[str] = Counter()
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.answers: Counter[tuple[str, str]] = Counter()

    def read(self) -> None:
        """Read what was added since the last time; scrapes at the same time take turns."""
        if not self._path.is_file():
            return
        with self._one_reader, self._path.open("rb") as handle:
            status = os.fstat(handle.fileno())
            if status.st_ino != self._inode or status.st_size < self._end:
                self._inode, self._end = status.st_ino, 0
            handle.seek(self._end)
            for line in handle:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        if b'"refused ' not in line and SERVED.encode() not in line:
            return
        try:
            value: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if value.get("event") == SERVED:
            study, stage, spent = (value.get(name) for name in ("study", "stage", "seconds"))
            if isinstance(study, str) and isinstance(stage, str) and isinstance(spent, int | float):
                self.seconds[study[:12], stage] += spent
                self.answers[study[:12], stage] += 1
            return
        names = [
            item for item in value.get("values", []) if isinstance(item, str) and _REASON.fullmatch(item)
        ]
        self.refusals[str(value.get("reason") or (names[-1] if names else "other"))] += 1


def registry_of(directory: Path) -> CollectorRegistry:
    """Make a registry that holds one site and nothing of this process."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(SiteCollector(directory))  # type: ignore[arg-type]
    return registry
