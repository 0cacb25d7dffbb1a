"""Releases over https, from a real TLS server on loopback."""

from __future__ import annotations

import functools
import http.server
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.releases import ModelStore
from common.errors import FedRadError, ReleaseSourceUnreachable
from deploy.local.certificates import LoopbackTls, write_loopback_tls
from tests.server_releases import Consortium


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    made = Consortium(tmp_path / "operator")
    made.publish(1)
    return made


@pytest.fixture
def tls(tmp_path: Path) -> LoopbackTls:
    return write_loopback_tls(tmp_path / "tls", now=datetime.now(UTC))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(consortium: Consortium, tls: LoopbackTls) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(consortium.repository))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def store(tmp_path: Path, consortium: Consortium) -> ModelStore:
    made = ModelStore(tmp_path / "site")
    made.trust(consortium.root, consortium.trust)
    return made


def test_a_release_is_pulled_over_https_under_a_certificate_that_the_machine_trusts(
    url: str, store: ModelStore, tls: LoopbackTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.authority))
    assert store.pull(url) == 1
    assert store.verify(1).version == 1


def test_a_server_whose_certificate_nobody_vouches_for_is_refused(url: str, store: ModelStore) -> None:
    with pytest.raises(ReleaseSourceUnreachable):
        store.pull(url)
    assert store.versions() == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "ledger.tlog-proof"])
def test_a_file_altered_on_the_web_server_is_refused(
    url: str,
    store: ModelStore,
    consortium: Consortium,
    tls: LoopbackTls,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.authority))
    (path,) = (consortium.repository / "targets" / "v1").glob(f"*.{name}")
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(FedRadError):
        store.pull(url)
    assert store.versions() == []


def test_plain_http_is_refused(url: str, store: ModelStore) -> None:
    with pytest.raises(ReleaseSourceUnreachable, match="https"):
        store.pull(url.replace("https", "http"))
