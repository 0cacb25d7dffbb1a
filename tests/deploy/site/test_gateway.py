"""The site's one way out: mutual TLS, an HTTP proxy, cuts, and whom it believes."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.errors import ProxyUnsupported, ServerUnreachable, SiteRevoked
from deploy.local.certificates import write_loopback_tls
from deploy.site.gateway import Gateway, Route, ask_server, open_route
from server.authority import create_authority
from tests.common.test_enrolment import new_tls

NOW = datetime.now(UTC)


@dataclass
class ConnectProxy:
    """An HTTP proxy as a hospital has it: CONNECT only, perhaps with a password; it can be cut."""

    password: str = ""
    asked: list[str] = field(default_factory=list)
    open: list[socket.socket] = field(default_factory=list)
    down: bool = False
    port: int = 0

    def cut(self) -> None:
        for end in self.open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def connect_proxy(password: str = "") -> Iterator[ConnectProxy]:
    proxy = ConnectProxy(password)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += self.rfile.readline()
            proxy.asked.append(head.split(b"\r\n")[0].decode())
            if proxy.down:
                return
            if proxy.password and proxy.password.encode() not in head:
                self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            host, _, port = head.split(b" ")[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as far:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                proxy.open += [far, self.connection]
                there = threading.Thread(target=pump, args=(self.connection, far), daemon=True)
                there.start()
                pump(far, self.connection)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield proxy
        proxy.cut()
        server.shutdown()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@dataclass
class Server:
    """A TLS server that wants client certificates and answers each line with who asks and the line."""

    route: Route
    listener: socketserver.ThreadingTCPServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    authority = create_authority(directory / "ca", consortium="lab", now=NOW)
    lifetime = timedelta(days=1)
    server_key, site_key = new_tls(), new_tls()
    for name, key, certificate in (
        (
            "server",
            server_key,
            authority.issue_server(["localhost"], server_key.public_key(), now=NOW, lifetime=lifetime),
        ),
        ("site", site_key, authority.issue_site("north", site_key.public_key(), now=NOW, lifetime=lifetime)),
    ):
        (directory / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        (directory / f"{name}.key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(directory / "server.pem"), str(directory / "server.key"))
    context.load_verify_locations(str(directory / "ca" / "ca.crt"))
    context.verify_mode = ssl.CERT_OPTIONAL

    class Handler(socketserver.StreamRequestHandler):
        def setup(self) -> None:
            self.request: Any = context.wrap_socket(
                self.request, server_side=True, do_handshake_on_connect=False
            )
            super().setup()

        def handle(self) -> None:
            try:
                self.request.do_handshake()
            except (ssl.SSLError, OSError):
                return
            subject = (self.request.getpeercert() or {}).get("subject", ((("", "nobody"),),))
            line = self.rfile.readline()
            if line.startswith(b"POST"):
                self.answer(line)
                return
            while line:
                self.wfile.write(subject[0][0][1].encode() + b" " + line)
                line = self.rfile.readline()

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                super().finish()
            self.request.close()

        def answer(self, line: bytes) -> None:
            while self.rfile.readline().strip():
                pass
            size = 0 if b"site" not in line else 1
            words = {
                b"1": b'{"time_s": 1.0, "ok": 1}',
                b"2": b'{"time_s": 1.0, "error": "SiteRevoked", "message": "left"}',
            }
            kind = self.rfile.read(size)
            body = words.get(kind, b"<html>")
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        listener.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        route = Route(
            "localhost",
            listener.server_address[1],
            directory / "ca" / "ca.crt",
            directory / "site.pem",
            directory / "site.key",
        )
        yield Server(route, listener)
        listener.shutdown()


@contextlib.contextmanager
def running(route: Route, directory: Path) -> Iterator[tuple[Gateway, ssl.SSLContext]]:
    tls = write_loopback_tls(directory / "gateway", now=NOW)
    gateway = Gateway(lambda: route, tls=tls, port=0)
    gateway.start()
    try:
        yield gateway, ssl.create_default_context(cafile=str(tls.authority))
    finally:
        gateway.stop()


@contextlib.contextmanager
def dialled(gateway: Gateway, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secured,
    ):
        yield secured


def say(connection: ssl.SSLSocket, line: bytes) -> bytes:
    connection.sendall(line)
    answer = b""
    while not answer.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece:
            break
        answer += piece
    return answer


def test_bytes_go_out_under_the_sites_certificate(server: Server, tmp_path: Path) -> None:
    with running(server.route, tmp_path) as (gateway, context), dialled(gateway, context) as connection:
        assert say(connection, b"hello\n") == b"north hello\n"
        large = b"x" * 3_000_000 + b"\n"
        assert say(connection, large) == b"north " + large
        assert gateway.open == 1 and gateway.bytes_up > 3_000_000 and not gateway.last_error


def test_bytes_go_out_through_a_proxy_with_a_password(server: Server, tmp_path: Path) -> None:
    import base64

    token = base64.b64encode(b"north:s3 cret").decode()
    with connect_proxy(f"Basic {token}") as proxy:
        address = f"http://north:s3%20cret@127.0.0.1:{proxy.port}"
        with (
            running(replace(server.route, proxy=address), tmp_path) as (gateway, context),
            dialled(gateway, context) as connection,
        ):
            assert say(connection, b"hello\n") == b"north hello\n"
        assert proxy.asked == [f"CONNECT localhost:{server.route.port} HTTP/1.1"]
        with pytest.raises(ServerUnreachable, match=r"407.*user and password"):
            open_route(replace(server.route, proxy=f"http://127.0.0.1:{proxy.port}"))


def test_a_proxy_is_used_without_a_scheme_and_refused_by_another(server: Server, tmp_path: Path) -> None:
    with connect_proxy() as proxy:
        address = f"127.0.0.1:{proxy.port}"
        with pytest.raises(ProxyUnsupported, match="https://"):
            open_route(replace(server.route, proxy=f"https://{address}"))
        assert proxy.asked == []
        with (
            running(replace(server.route, proxy=address), tmp_path) as (gateway, context),
            dialled(gateway, context) as connection,
        ):
            assert say(connection, b"hello\n") == b"north hello\n"


def test_after_a_cut_the_next_connection_gets_through(server: Server, tmp_path: Path) -> None:
    with connect_proxy() as proxy:
        route = replace(server.route, proxy=f"http://127.0.0.1:{proxy.port}")
        with running(route, tmp_path) as (gateway, context):
            with dialled(gateway, context) as connection:
                assert say(connection, b"one\n") == b"north one\n"
                proxy.cut()
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    assert connection.recv(10) == b""
            proxy.down = True
            with dialled(gateway, context) as connection, contextlib.suppress(ssl.SSLError, ConnectionError):
                assert say(connection, b"two\n") == b""
            assert "proxy" in gateway.last_error
            proxy.down = False
            with dialled(gateway, context) as connection:
                assert say(connection, b"three\n") == b"north three\n"
            assert gateway.last_error == ""


def test_a_server_of_another_authority_is_not_believed(server: Server, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", consortium="lab", now=NOW)
    route = replace(server.route, authority=tmp_path / "other" / "ca.crt")
    with running(route, tmp_path) as (gateway, context):
        with dialled(gateway, context) as connection, contextlib.suppress(ssl.SSLError, ConnectionError):
            assert say(connection, b"hello\n") == b""
        assert "certificate verify failed" in gateway.last_error
    with pytest.raises(ServerUnreachable, match="clock"):
        ask_server(route, b"1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "no-such-host.invalid"}, "a name that DNS knows"),
        ({"port": 1}, "refused"),
        ({"proxy": "socks5://127.0.0.1:1"}, "http://.*HOST:PORT"),
        ({"proxy": "http://127.0.0.1:1"}, "proxy 127.0.0.1:1"),
    ],
)
def test_what_is_in_the_way_is_named(server: Server, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ServerUnreachable, match=words):
        ask_server(replace(server.route, **change), b"1")


def test_a_question_is_answered_refused_or_not_understood(server: Server) -> None:
    assert ask_server(server.route, b"1")["ok"] == 1
    with pytest.raises(SiteRevoked, match="left"):
        ask_server(server.route, b"2")
    with pytest.raises(ServerUnreachable, match="HTTP 200"):
        ask_server(server.route, b"3")


def test_a_taken_port_is_an_error_at_start(server: Server, tmp_path: Path) -> None:
    tls = write_loopback_tls(tmp_path / "gateway", now=NOW)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        Gateway(lambda: server.route, tls=tls, port=taken.getsockname()[1]).start()
