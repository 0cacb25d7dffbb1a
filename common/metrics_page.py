"""The page that Prometheus scrapes: `/metrics` of one registry, and `/healthz`, over plain HTTP.

Guarantees: GET and HEAD of these two paths only; every other request gets 404 or 405. It listens on
loopback unless it is told another address, and has neither TLS nor authentication of its own.
"""

from __future__ import annotations

import http.server
import socket
import threading
from typing import TYPE_CHECKING, Any

from common.errors import ListenAddressInvalid

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def parse_listen(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`, IPv6 hosts in brackets; raises ListenAddressInvalid."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ListenAddressInvalid(f"--listen: expected HOST:PORT such as 127.0.0.1:9464, got {text!r}")
    return host, int(port)


class MetricsPage:
    """A running page; `stop` ends it."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Listen at once; raises ListenAddressInvalid."""
        kind = _ServerV6 if ":" in host else _Server
        try:
            self._server = kind((host, port), _handler(registry))
        except OSError as error:
            raise ListenAddressInvalid(f"{host}:{port}: expected a free address, got {error}") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _handler(registry: CollectorRegistry) -> type[http.server.BaseHTTPRequestHandler]:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    class Handler(http.server.BaseHTTPRequestHandler):
        server_version = "fedrad"
        sys_version = ""
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._send(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif self.path == "/healthz":
                self._send(200, "text/plain; charset=utf-8", b"ok\n")
            else:
                self._send(404, "text/plain; charset=utf-8", b"/metrics or /healthz\n")

        do_HEAD = do_GET

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Scrapes are not logged."""

    return Handler


def serve_metrics(registry: CollectorRegistry, *, listen: str, once: bool) -> None:
    """Print a registry once, or serve it until SIGINT or SIGTERM; raises ListenAddressInvalid."""
    import signal
    import sys

    if once:
        from prometheus_client import generate_latest

        sys.stdout.write(generate_latest(registry).decode())
        return
    host, port = parse_listen(listen)
    page = MetricsPage(registry, host, port)
    print(f"http://{listen.rpartition(':')[0]}:{page.port}/metrics", file=sys.stderr, flush=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    page.stop()
