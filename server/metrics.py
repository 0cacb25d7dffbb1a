"""Prometheus metrics of the operator's studies, made from their durable files at each scrape.

Labels are a study's id, a site's id, a protocol stage, a direction and a reason out of a closed list; no
metric counts patients or says anything of a site's data. Nothing is kept in this process: a restart loses
nothing, and the server that runs the rounds does not know that it is watched.
It listens on loopback unless told otherwise, without TLS: put the hospital's own proxy before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import FedRadError
from server.connections import ServerView, read_server
from server.status import StudyView, find_studies, read_lines, read_view

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

STATES = ("not started", "starting", "running", "stopped", "finished", "unknown")
SECONDS_BUCKETS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class StudiesCollector:
    """Reads all studies below a directory whenever Prometheus asks."""

    def __init__(self, directory: Path, *, read: Callable[[Path], StudyView] = read_view) -> None:
        self._directory = directory
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of every study that can be read, and how many cannot."""
        from prometheus_client.core import GaugeMetricFamily

        views: list[tuple[StudyView, list[dict[str, Any]]]] = []
        unreadable = 0
        try:
            directories = find_studies(self._directory)
        except FedRadError:
            directories = []
        for path in directories:
            try:
                views.append((self._read(path), read_lines(path / "log.jsonl")))
            except FedRadError:
                unreadable += 1
        yield from study_metrics(views)
        yield from connection_metrics(read_server(self._directory))
        family = GaugeMetricFamily("fedrad_studies_unreadable", "Study directories that could not be read.")
        family.add_metric([], unreadable)
        yield family


def connection_metrics(server: ServerView | None) -> Iterator[Metric]:
    """Make the metric families of the server itself; without samples where `up` never ran."""
    from prometheus_client.core import GaugeMetricFamily

    online = GaugeMetricFamily("fedrad_site_online", "1 while a site is connected.", labels=["site"])
    ends = GaugeMetricFamily(
        "fedrad_site_certificate_end_time_seconds", "When a site's certificate ends, Unix time.",
        labels=["site"],
    )  # fmt: skip
    warnings = GaugeMetricFamily("fedrad_server_warnings", "What `up` warns of now.")
    for site in server.sites if server else ():
        if site.state == "approved":
            ends.add_metric([site.site], site.certificate_until_s)
        if site.online is not None:
            online.add_metric([site.site], float(site.online))
    if server and server.running:
        warnings.add_metric([], len(server.warnings))
    yield from (online, ends, warnings)


def study_metrics(views: Iterable[tuple[StudyView, list[dict[str, Any]]]]) -> Iterator[Metric]:
    """Make the metric families of studies from their views and logged events; pure."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    views = list(views)
    by_study, by_site = ["study"], ["study", "site"]

    def gauge(name: str, text: str, labels: list[str]) -> Any:
        return GaugeMetricFamily(name, text, labels=labels)

    def counter(name: str, text: str, labels: list[str]) -> Any:
        return CounterMetricFamily(name, text, labels=labels)

    state = gauge("fedrad_study_state", "1 for the state that the study is in.", ["study", "state"])
    planned = gauge("fedrad_study_rounds_planned", "Rounds that the manifest allows.", by_study)
    floor = gauge("fedrad_study_sites_floor", "Sites that a round needs at least.", by_study)
    rounds = counter("fedrad_study_rounds", "Rounds served.", by_study)
    failed = counter("fedrad_study_attempts_failed", "Attempts of rounds that brought no sum.", by_study)
    seconds = HistogramMetricFamily("fedrad_round_seconds", "Seconds per served round.", labels=by_study)
    stages = counter("fedrad_stage_seconds", "Seconds spent in a stage, all rounds.", ["study", "stage"])
    last = gauge("fedrad_last_round_time_seconds", "When the last round was served, Unix time.", by_study)
    release = gauge("fedrad_release_epsilon", "Release epsilon of the rounds served.", by_study)
    release_limit = gauge(
        "fedrad_release_epsilon_limit", "Release epsilon that the manifest allows.", by_study
    )
    site_bound = gauge(
        "fedrad_site_epsilon_bound", "A site's epsilon as it signed it, else a bound seen from here.", by_site
    )
    site_limit = gauge("fedrad_site_epsilon_limit", "Site epsilon that the manifest allows.", by_study)
    missing = gauge("fedrad_site_missing", "1 while a site is not in the newest attempt's sum.", by_site)
    late = gauge("fedrad_site_late_seconds", "Seconds past the deadline in the newest round.", by_site)
    site_rounds = counter("fedrad_site_rounds", "Rounds that a site contributed to.", by_site)
    absences = counter(
        "fedrad_site_absences", "Attempts that a site was not in, by reason.", ["study", "site", "reason"]
    )
    sent = counter(
        "fedrad_bytes", "Envelope bytes since the server's start.", ["study", "stage", "direction"]
    )
    messages = counter(
        "fedrad_messages", "Envelopes since the server's start.", ["study", "stage", "direction"]
    )

    ids = Counter(view.id for view, _ in views)
    for view, events in views:
        study = view.id if ids[view.id] == 1 else f"{view.id}-{view.sha256[:12]}"
        for name in STATES:
            state.add_metric([study, name.replace(" ", "-")], float(view.state == name))
        planned.add_metric([study], view.rounds_planned)
        floor.add_metric([study], view.floor)
        rounds.add_metric([study], view.rounds_done)
        failed.add_metric([study], len(view.failed))
        measured = [one.seconds for one in view.rounds if one.seconds is not None]
        buckets = [(str(edge), sum(value <= edge for value in measured)) for edge in SECONDS_BUCKETS]
        seconds.add_metric([study], [*buckets, ("+Inf", len(measured))], sum(measured))
        for stage, spent in stage_seconds(events).items():
            stages.add_metric([study, stage], spent)
        if view.rounds:
            last.add_metric([study], view.rounds[-1].time_unix_s)
        for family, value in ((release, view.release_epsilon), (release_limit, view.release_epsilon_limit),
                              (site_limit, view.site_epsilon_limit)):  # fmt: skip
            if value is not None:
                family.add_metric([study], value)
        for site in view.sites:
            missing.add_metric([study, site.site], float(not site.serves))
            late.add_metric([study, site.site], site.late_s)
            site_rounds.add_metric([study, site.site], site.rounds_served)
            if site.epsilon is not None:
                site_bound.add_metric([study, site.site], site.epsilon)
            for reason, count in site.absences.items():
                absences.add_metric([study, site.site, reason], count)
        for family, counts in ((sent, view.bytes_by_stage), (messages, view.messages_by_stage)):
            for name, count in counts.items():
                stage, _, direction = name.rpartition("-")
                family.add_metric([study, stage, direction], count)
    yield from (state, planned, floor, rounds, failed, seconds, stages, last, release, release_limit)
    yield from (site_bound, site_limit, missing, late, site_rounds, absences, sent, messages)


def stage_seconds(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Sum the seconds of each stage over the rounds whose log lines say them (`stage_seconds`)."""
    total: dict[str, float] = {}
    for event in events:
        spent = event.get("stage_seconds")
        if event.get("event") == "round" and isinstance(spent, dict):
            for stage, value in spent.items():
                total[str(stage)] = total.get(str(stage), 0.0) + float(value)
    return dict(sorted(total.items()))


def registry_of(directory: Path) -> CollectorRegistry:
    """Make a registry that holds the studies below a directory and nothing of this process."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(StudiesCollector(directory))  # type: ignore[arg-type]
    return registry
