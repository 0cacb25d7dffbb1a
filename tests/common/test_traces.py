"""Spans on their way to a collector: which one, in what form, and what happens when it is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from common.errors import CollectorInvalid
from common.traces import (
    MAX_WAITING,
    Collector,
    Outbox,
    Span,
    format_spans,
    parse_collector,
    span_id,
    trace_id,
)
from tests.otlp_collector import attributes, collector

STUDY = "ab" * 32
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
SPAN = Span(
    trace=trace_id(STUDY, 2), id=span_id(STUDY, 2), parent=span_id(STUDY), name="round", start_unix_s=1.8e9,
    end_unix_s=1.8e9 + 1.25, attributes={"study": "chest", "round": 2, "seconds": 1.25}, failed="RoundFailed",
)  # fmt: skip


def test_nothing_is_sent_where_no_endpoint_is_named() -> None:
    assert parse_collector({}, service="x") is None
    assert parse_collector({ENDPOINT: ""}, service="x") is None
    assert (
        parse_collector({ENDPOINT: "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, service="x") is None
    )


def test_the_standard_variables_are_read() -> None:
    environment = {
        ENDPOINT: "http://otel:4318/", "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a%20b, tenant=1",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2500", "OTEL_SERVICE_NAME": "ours",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json", "OTEL_EXPORTER_OTLP_CERTIFICATE": "/ca.pem",
    }  # fmt: skip
    assert parse_collector(environment, service="x") == Collector(
        "http://otel:4318/v1/traces", {"api-key": "a b", "tenant": "1"}, 2.5, "/ca.pem", "ours"
    )
    own = {**environment, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://traces/in"}
    found = parse_collector(own, service="x")
    assert found is not None and found.url == "https://traces/in"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (ENDPOINT, "otel:4318"), (ENDPOINT, "grpc://otel:4317"), (ENDPOINT, "http://"),
        (ENDPOINT, "http://otel:notaport"), (ENDPOINT, "http://user:secret@otel:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"), ("OTEL_EXPORTER_OTLP_HEADERS", "=x"),
    ],
)  # fmt: skip
def test_a_variable_that_says_something_else_is_refused(name: str, value: str) -> None:
    with pytest.raises(CollectorInvalid, match="OTEL_EXPORTER_OTLP_") as refusal:
        parse_collector({ENDPOINT: "http://127.0.0.1:4318", name: value}, service="x")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost"])
def test_a_site_may_send_to_its_own_loopback(host: str) -> None:
    assert parse_collector({ENDPOINT: f"http://{host}:4318"}, service="x", loopback_only=True)


@pytest.mark.parametrize("host", ["10.0.0.7", "otel.hospital", "[fe80::1]", "localhost.evil.org"])
def test_a_site_sends_nothing_to_another_machine(host: str) -> None:
    with pytest.raises(CollectorInvalid, match="loopback"):
        parse_collector({ENDPOINT: f"http://{host}:4318"}, service="x", loopback_only=True)


def test_spans_arrive_in_the_form_that_the_specification_gives() -> None:
    with collector() as there:
        outbox = Outbox(Collector(f"{there.url}/v1/traces", {"api-key": "k"}, service="fedrad-server"))
        outbox.put([SPAN])
        assert outbox.send() and outbox.sent == 1 and outbox.waiting == 0
        [(path, headers, body)] = there.requests
        [span] = there.spans()
    assert path == "/v1/traces"
    assert (headers["Content-Type"], headers["Api-Key"]) == ("application/json", "k")
    assert body["resourceSpans"][0]["resource"]["attributes"] == [
        {"key": "service.name", "value": {"stringValue": "fedrad-server"}}
    ]
    assert re.fullmatch("[0-9a-f]{32}", span["traceId"]) and re.fullmatch("[0-9a-f]{16}", span["spanId"])
    assert span["startTimeUnixNano"] == "1800000000000000000"
    assert span["endTimeUnixNano"] == "1800000001250000000"
    assert attributes(span) == {"fedrad.study": "chest", "fedrad.round": "2", "fedrad.seconds": 1.25}
    assert span["status"] == {"code": 2, "message": "RoundFailed"}


def test_an_attribute_outside_the_list_is_refused() -> None:
    with pytest.raises(CollectorInvalid, match="patients"):
        format_spans([replace(SPAN, attributes={"patients": 12})], service="x")


def test_what_a_collector_does_not_take_waits_for_the_next_turn(caplog: pytest.LogCaptureFixture) -> None:
    with collector() as there:
        outbox = Outbox(Collector(f"{there.url}/v1/traces"))
        outbox.put([SPAN])
        there.status = 503
        assert not outbox.send() and not outbox.send()
        assert (outbox.waiting, outbox.sent) == (1, 0)
        assert len(caplog.records) == 1
        there.status = 200
        assert outbox.send() and outbox.waiting == 0
    outbox.put([SPAN] * (MAX_WAITING + 5))
    assert not outbox.send()
    assert outbox.waiting == MAX_WAITING


def test_an_answer_that_is_no_http_is_waited_out_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    with collector() as there:
        outbox = Outbox(Collector(f"{there.url}/v1/traces"))
        outbox.put([SPAN])
        there.garbled = b"\x00\x00\x18\x04" + bytes(500)  # what gRPC's port begins with
        assert not outbox.send()
        assert outbox.waiting == 1 and outbox.trouble.startswith("BadStatusLine")
        assert all(len(line) < 400 and line.isprintable() for line in caplog.messages)
        there.garbled = b""
        assert outbox.send() and outbox.sent == 1


def test_neither_a_redirect_nor_a_proxy_takes_spans_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as there, collector() as elsewhere:
        monkeypatch.setenv("HTTP_PROXY", elsewhere.url)
        monkeypatch.setenv("http_proxy", elsewhere.url)
        there.status, there.location = 307, f"{elsewhere.url}/v1/traces"
        outbox = Outbox(Collector(f"{there.url}/v1/traces"))
        outbox.put([SPAN])
        assert not outbox.send()
        assert len(there.requests) == 1
        assert elsewhere.requests == []


def test_a_certificate_that_is_no_file_is_refused() -> None:
    with pytest.raises(CollectorInvalid, match="PEM"):
        Outbox(Collector("https://127.0.0.1/v1/traces", certificate="/no/such.pem"))


@pytest.mark.parametrize("program", ["deploy.server.cli", "deploy.site.cli", "client.app"])
def test_what_runs_rounds_does_not_load_traces(program: str) -> None:
    code = f"import sys, {program}; sys.exit(any('traces' in m or 'opentelemetry' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
