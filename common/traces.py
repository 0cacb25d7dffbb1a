"""OpenTelemetry traces without its libraries: spans as OTLP/HTTP JSON to the collector that is named.

Read are OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT, _HEADERS, _TIMEOUT (ms), _CERTIFICATE and _PROTOCOL
(http/json, or it is refused), OTEL_SERVICE_NAME and OTEL_SDK_DISABLED, as OpenTelemetry specifies them.
Guarantees: without an endpoint nothing is sent; attributes are of a closed list; ids are hashes of
study and round, so that what is sent twice is the same span; no redirect and no proxy is followed, so what
may go to loopback only goes nowhere else; a collector that is away costs spans, never a round.
It makes no spans (server/traces.py, client/traces.py) and has no sampling: a round is a dozen spans.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import logging
import signal
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from common.errors import CollectorInvalid

log = logging.getLogger("fedrad.traces")

ATTRIBUTES = frozenset({"study", "round", "attempt", "stage", "seconds", "site", "reason"})
MAX_WAITING = 2000
_BATCH = 200
_PATH = "v1/traces"
_TIMEOUT_MS = 10_000
_INTERNAL, _ERROR = 1, 2  # SpanKind and StatusCode of OTLP


@dataclass(frozen=True, kw_only=True)
class Span:
    """One span; `attributes` are named in ATTRIBUTES and travel as `fedrad.NAME`; `failed` names an error."""

    trace: str
    id: str
    parent: str = ""
    name: str
    start_unix_s: float
    end_unix_s: float
    attributes: Mapping[str, str | int | float]
    failed: str = ""


@dataclass(frozen=True)
class Collector:
    """Where spans go: a whole URL, headers, and whom to believe there (a PEM file, or the system's)."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float = _TIMEOUT_MS / 1000
    certificate: str = ""
    service: str = ""


def trace_id(study: str, round: int) -> str:
    """Return the trace of a round: the same at the server and at its sites."""
    return _hash("trace", study, round)[:32]


def span_id(*parts: str | int) -> str:
    return _hash("span", *parts)[:16]


def parse_collector(
    environment: Mapping[str, str], *, service: str, loopback_only: bool = False
) -> Collector | None:
    """Read OpenTelemetry's variables; None where they name no endpoint. Raises CollectorInvalid."""
    own = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    url = own or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not url or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = _variable(environment, "PROTOCOL")
    if protocol not in ("", "http/json"):
        raise CollectorInvalid(f"OTEL_EXPORTER_OTLP_PROTOCOL: expected http/json or none, got {protocol!r}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise CollectorInvalid(f"OTEL_EXPORTER_OTLP_ENDPOINT: expected a URL, got {url!r}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        raise CollectorInvalid(
            f"OTEL_EXPORTER_OTLP_ENDPOINT: expected http://HOST:4318 or https://…, got {parts.scheme}:…"
        )
    if loopback_only and not is_loopback(host):
        raise CollectorInvalid(
            f"OTEL_EXPORTER_OTLP_ENDPOINT: expected a collector on this machine's loopback, got {host}; "
            "a site sends traces to another machine only with --beyond-loopback"
        )
    timeout = _variable(environment, "TIMEOUT") or str(_TIMEOUT_MS)
    if not timeout.isdigit() or not 0 < int(timeout) <= 600_000:
        raise CollectorInvalid(f"OTEL_EXPORTER_OTLP_TIMEOUT: expected milliseconds, got {timeout!r}")
    return Collector(
        url if own else f"{url.rstrip('/')}/{_PATH}",
        _headers(_variable(environment, "HEADERS")),
        int(timeout) / 1000,
        _variable(environment, "CERTIFICATE"),
        environment.get("OTEL_SERVICE_NAME", "") or service,
    )


def is_loopback(host: str) -> bool:
    """Whether this host is this machine: `localhost`, 127.0.0.0/8 or ::1."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def format_spans(spans: Iterable[Span], *, service: str) -> bytes:
    """Encode spans as an ExportTraceServiceRequest in OTLP's JSON (ids in hex, 64-bit numbers as text)."""
    scope = {"scope": {"name": "fedrad"}, "spans": [_span(one) for one in spans]}
    resource = {"attributes": [_attribute("service.name", service)]}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}).encode()


class Outbox:
    """Spans on their way to a collector: kept while it is away, the oldest forgotten beyond MAX_WAITING."""

    def __init__(self, collector: Collector) -> None:
        """Make ready to send; raises CollectorInvalid for a certificate that is none."""
        self._collector = collector
        try:
            context = ssl.create_default_context(cafile=collector.certificate or None)
        except OSError as error:
            raise CollectorInvalid(
                f"OTEL_EXPORTER_OTLP_CERTIFICATE: expected a PEM file, got {collector.certificate}"
            ) from error
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _NoRedirect(), urllib.request.HTTPSHandler(context=context)
        )
        self._waiting: deque[Span] = deque(maxlen=MAX_WAITING)
        self.trouble = ""
        self.sent = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, spans: Iterable[Span]) -> None:
        self._waiting.extend(spans)

    def send(self) -> bool:
        """Send what waits; on a failure say so once, keep it for the next turn and return False."""
        while self._waiting:
            batch = [self._waiting[number] for number in range(min(_BATCH, len(self._waiting)))]
            try:
                self._post(format_spans(batch, service=self._collector.service))
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # urllib's errors; an answer that is no HTTP
                self._say(f"{type(error).__name__}: {repr(str(error))[:200]}")
                return False
            self._say("")
            self.sent += len(batch)
            for _ in batch:
                self._waiting.popleft()
        return True

    def _post(self, body: bytes) -> None:
        headers = {**self._collector.headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self._collector.url, body, headers, method="POST")  # noqa: S310
        with self._opener.open(request, timeout=self._collector.timeout_s) as answer:
            answer.read(1 << 16)

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            log.warning("the collector takes no traces, they are sent again: %s", trouble)
        self.trouble = trouble


def say_and_stop_on_signal(collector: Collector) -> threading.Event:
    """Say where traces go, and return what SIGINT and SIGTERM will set."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    print(f"traces go to {collector.url}", file=sys.stderr, flush=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the answer is the error that it is."""


def _variable(environment: Mapping[str, str], name: str) -> str:
    own = environment.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "")
    return own or environment.get(f"OTEL_EXPORTER_OTLP_{name}", "")


def _headers(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    headers = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    if any(not name.isascii() or not name or not value.isprintable() for name, value in headers.items()):
        raise CollectorInvalid("OTEL_EXPORTER_OTLP_HEADERS: expected NAME=VALUE,NAME=VALUE")
    return headers


def _span(span: Span) -> dict[str, Any]:
    unknown = set(span.attributes) - ATTRIBUTES
    if unknown:
        raise CollectorInvalid(f"span {span.name}: expected attributes of the closed list, got {unknown}")
    return {
        "traceId": span.trace,
        "spanId": span.id,
        **({"parentSpanId": span.parent} if span.parent else {}),
        "name": span.name,
        "kind": _INTERNAL,
        "startTimeUnixNano": _nanoseconds(span.start_unix_s),
        "endTimeUnixNano": _nanoseconds(span.end_unix_s),
        "attributes": [_attribute(f"fedrad.{name}", value) for name, value in span.attributes.items()],
        **({"status": {"code": _ERROR, "message": span.failed}} if span.failed else {}),
    }


def _nanoseconds(seconds: float) -> str:
    return str(1000 * round(1e6 * seconds))


def _attribute(name: str, value: str | int | float) -> dict[str, Any]:
    kinds = {str: "stringValue", int: "intValue", float: "doubleValue"}
    return {"key": name, "value": {kinds[type(value)]: str(value) if type(value) is int else value}}


def _hash(*parts: str | int) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()
