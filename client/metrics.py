"""Prometheus metrics of one site, made from its ledger, its studies and its agent's structured log.

Read at each scrape while the agent may be running: nothing is locked or changed. Labels are a study's id or
the start of its hash, and an error's name. Nothing counts patients, images or reports, and no metric is made
of data. It listens on loopback unless told otherwise; it is for the hospital's own monitoring, and nothing
of it goes to the operator.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.budget import BudgetLimits, BudgetSummary, read_summary
from client.home import SiteHome, list_studies, open_home, read_approved_study, read_study
from common.errors import FedRadError, StudyNotApproved

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

LOG_NAME = Path("logs") / "agent.jsonl"
_REASON = re.compile(r"[A-Z][A-Za-z]{2,50}")


class SiteCollector:
    """Reads a site's directory whenever Prometheus asks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[tuple[int, int], BudgetSummary] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the site; `fedrad_site_readable` is 0 where its directory cannot be read."""
        from prometheus_client.core import GaugeMetricFamily

        readable = GaugeMetricFamily("fedrad_site_readable", "1 where the site's directory could be read.")
        try:
            home = open_home(self._directory)
            families = [*_budget(self._summary(home)), *_studies(home), *_log(home.directory / LOG_NAME)]
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


def _log(path: Path) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    refusals = CounterMetricFamily(
        "fedrad_site_refusals", "Requests that the agent refused, since its log began.", labels=["reason"]
    )
    for reason, count in sorted(refusals_by_reason(path).items()):
        refusals.add_metric([reason], count)
    yield refusals


def refusals_by_reason(path: Path) -> Counter[str]:
    """Count the refusals in an agent's structured log by the error's name; torn lines are left out."""
    counts: Counter[str] = Counter()
    if not path.is_file():
        return counts
    with path.open("rb") as handle:
        for line in handle:
            reason = _refusal(line)
            if reason:
                counts[reason] += 1
    return counts


def _refusal(line: bytes) -> str:
    if b'"refused ' not in line:
        return ""
    try:
        value: dict[str, Any] = json.loads(line)
    except ValueError:
        return ""
    names = [item for item in value.get("values", []) if isinstance(item, str) and _REASON.fullmatch(item)]
    return str(value.get("reason") or (names[-1] if names else "other"))


def registry_of(directory: Path) -> CollectorRegistry:
    """Make a registry that holds one site and nothing of this process."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(SiteCollector(directory))  # type: ignore[arg-type]
    return registry
