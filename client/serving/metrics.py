"""What serving counts for Prometheus: no words, no patients, no users.

Each service has its own registry; `text()` is what `/metrics` answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.serving.engine import ModelVersion
    from client.serving.service import Draft


class ServingMetrics:
    """Counters and histograms of one service."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._drafts = Counter("fedrad_drafts_total", "Drafts by how they ended.", ["finish"], **made)
        self._refusals = Counter("fedrad_refusals_total", "Refusals by reason.", ["code"], **made)
        self._failures = Counter("fedrad_failures_total", "Failed drafts by error.", ["error"], **made)
        self._tokens = Counter("fedrad_tokens_total", "Tokens written.", **made)
        self._cached = Counter(
            "fedrad_cached_prompt_tokens_total", "Prompt tokens not computed again.", **made
        )
        self._switches = Counter("fedrad_model_switches_total", "Switches to another release.", **made)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
        self._seconds = Histogram(
            "fedrad_draft_seconds", "Seconds from request to whole draft.", buckets=buckets, **made
        )
        self._first = Histogram(
            "fedrad_first_token_seconds", "Seconds from request to first token.", buckets=buckets, **made
        )
        self._distance = Histogram(
            "fedrad_ood_score_over_threshold",
            "Image's out-of-domain score over its threshold.",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.25, 1.5, 2, 4, 8),
            **made,
        )
        self._requests = Counter("fedrad_http_requests_total", "HTTP answers.", ["route", "status"], **made)
        self._waiting = Gauge("fedrad_waiting_questions", "Questions waiting for the engine.", **made)
        self._in_flight = Gauge("fedrad_running_questions", "Questions being answered.", **made)
        self._restarts = Gauge("fedrad_engine_restarts", "Times the engine's process was restarted.", **made)
        self._model = Gauge(
            "fedrad_model_info", "The release that answers.", ["version", "study", "round", "adapter"], **made
        )

    def finished(self, draft: Draft, *, cached_tokens: int) -> None:
        self._drafts.labels(draft.finish.value).inc()
        self._tokens.inc(len(draft.token_ids))
        self._cached.inc(cached_tokens)
        self._seconds.observe(draft.seconds)
        if draft.first_token_s is not None:
            self._first.observe(draft.first_token_s)
        if draft.decision.refused:
            self._refusals.labels(draft.decision.code).inc()
        if draft.decision.ood_score is not None and draft.decision.ood_threshold:
            self._distance.observe(draft.decision.ood_score / draft.decision.ood_threshold)

    def failed(self, error: str) -> None:
        self._failures.labels(error).inc()

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def switched(self, model: ModelVersion) -> None:
        self._switches.inc()
        self.serving(model)

    def serving(self, model: ModelVersion) -> None:
        """Name the release that answers now."""
        self._model.clear()
        self._model.labels(
            str(model.version), model.study_id, str(model.round), model.adapter_sha256[:12]
        ).set(1)

    def engine(self, *, waiting: int, in_flight: int, restarts: int) -> None:
        self._waiting.set(waiting)
        self._in_flight.set(in_flight)
        self._restarts.set(restarts)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
