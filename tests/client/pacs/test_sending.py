"""One attempt to deliver: mutual TLS, and which answers are worth another attempt."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client.pacs.config import Destination, FhirTarget, TlsFiles
from client.pacs.diagnostic_report import diagnostic_report
from client.pacs.sending import echo, post_report, store_report
from client.pacs.structured_report import ReportText, read_evidence, structured_report
from common.errors import DeliveryFailed, DeliveryRefused, DestinationUnreachable
from tests.client.data.test_receive import certificate
from tests.client.pacs.nodes import SENTENCES, VERSION, archive, chest_bytes

TEXT = ReportText("d" * 32, SENTENCES, "")


@pytest.fixture(scope="module")
def report() -> bytes:
    return structured_report(read_evidence(chest_bytes(1)), TEXT, VERSION)


@pytest.fixture(scope="module")
def resource() -> bytes:
    return diagnostic_report(read_evidence(chest_bytes(1)), TEXT, VERSION, issued="2026-11-22T11:00:00+00:00")


@pytest.mark.parametrize(
    ("status", "error"), [(0xA700, DeliveryFailed), (0xA900, DeliveryRefused), (0xC000, DeliveryRefused)]
)
def test_answers_are_told_apart(report: bytes, status: int, error: type[Exception]) -> None:
    with archive(answers=(status,)) as kept, pytest.raises(error, match=f"{status:04X}"):
        store_report(report, Destination("ARCHIVE", "127.0.0.1", kept.port, None), calling="FEDRAD")


def test_warning_counts_as_stored(report: bytes) -> None:
    with archive(answers=(0xB000,)) as kept:
        store_report(report, Destination("ARCHIVE", "127.0.0.1", kept.port, None), calling="FEDRAD")


def test_absent_node_is_worth_another_attempt(report: bytes) -> None:
    with archive() as gone:
        port = gone.port
    away = Destination("ARCHIVE", "127.0.0.1", port, None)
    with pytest.raises(DeliveryFailed, match="reached"):
        store_report(report, away, calling="FEDRAD")
    with pytest.raises(DestinationUnreachable):
        echo(away, calling="FEDRAD")


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "pacs.pem", folder / "pacs.key")
    context.load_verify_locations(folder / "ca.pem")
    return context


def test_report_goes_over_mutual_tls_and_never_to_an_impostor(tmp_path: Path, report: bytes) -> None:
    authority = certificate(tmp_path, "ca", None)
    for name in ("pacs", "site"):
        certificate(tmp_path, name, authority)
    certificate(tmp_path, "rogue", None)
    files = TlsFiles(tmp_path / "site.pem", tmp_path / "site.key", tmp_path / "ca.pem")
    with archive(tls=server_context(tmp_path)) as kept:
        there = Destination("ARCHIVE", "localhost", kept.port, files)
        echo(there, calling="FEDRAD")
        store_report(report, there, calling="FEDRAD")
        rogue = TlsFiles(tmp_path / "site.pem", tmp_path / "site.key", tmp_path / "rogue.pem")
        with pytest.raises(DeliveryFailed):
            store_report(report, Destination("ARCHIVE", "localhost", kept.port, rogue), calling="FEDRAD")
        with pytest.raises(DeliveryFailed, match="TLS"):
            missing = TlsFiles(tmp_path / "none.pem", tmp_path / "site.key", tmp_path / "ca.pem")
            store_report(report, Destination("ARCHIVE", "localhost", kept.port, missing), calling="FEDRAD")
    assert len(kept.got) == 1


@contextmanager
def fhir_server(*statuses: int) -> Iterator[tuple[str, list[tuple[str, dict[str, str], bytes]]]]:
    """A server on loopback that answers with these statuses, then 201."""
    answers, seen = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), body))
            self.send_response(answers.pop(0) if answers else 201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/r4", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_resource_is_created_conditionally_with_the_token(tmp_path: Path, resource: bytes) -> None:
    (tmp_path / "token").write_text("secret\n")
    with fhir_server() as (url, seen):
        post_report(resource, FhirTarget(None, url, tmp_path / "token"), name="x")
    ((path, headers, body),) = seen
    assert path == "/r4/DiagnosticReport" and body == resource
    assert headers["Authorization"] == "Bearer secret"
    assert (
        headers["If-None-Exist"]
        == f"identifier=urn:ietf:rfc:3986|{json.loads(body)['identifier'][0]['value']}"
    )


@pytest.mark.parametrize(
    ("status", "error"),
    [(503, DeliveryFailed), (401, DeliveryFailed), (429, DeliveryFailed), (422, DeliveryRefused)],
)
def test_fhir_answers_are_told_apart(resource: bytes, status: int, error: type[Exception]) -> None:
    with fhir_server(status) as (url, _), pytest.raises(error, match=str(status)):
        post_report(resource, FhirTarget(None, url, None), name="x")


def test_absent_fhir_server_and_token_are_worth_another_attempt(tmp_path: Path, resource: bytes) -> None:
    with fhir_server() as (url, _):
        pass
    with pytest.raises(DeliveryFailed):
        post_report(resource, FhirTarget(None, url, None), name="x")
    with pytest.raises(DeliveryFailed, match="token"):
        post_report(resource, FhirTarget(None, url, tmp_path / "none"), name="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(DeliveryFailed):
        post_report(resource, FhirTarget(tmp_path / "file", "", None), name="x")
