"""A real proxy before a stand-in for SuperLink and endpoint, with a real consortium's certificates."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.ec_keys import make_csr
from common.enrolment import (
    SiteKeySet,
    fingerprint_of,
)
from common.ledger.entries import RevocationReason
from deploy.local.certificates import LoopbackTls, write_loopback_tls
from deploy.local.flower import free_port
from deploy.proxy.files import write_door
from deploy.proxy.render import CLIENT_HEADER, Door, KnownNode
from deploy.server.up import Proxy, find_proxy
from server.consortium import ServerHome, create_server_home
from server.enrolment import SiteState, approve, read_sites, renew, revoke
from tests.common.test_enrolment import Keys

PULL = "/v1/fleet/pull-messages"
SITE_API = "/fedrad/v1/site"
NODE_HEADER = "flwr-public-key"


@dataclass
class Backend:
    """Answers 200 to whatever gets through, and remembers the paths."""

    seen: list[str] = field(default_factory=list)
    clients: list[str | None] = field(default_factory=list)  # whom the door named, for the endpoint's rate
    nodes: list[list[str]] = field(default_factory=list)  # which node keys came with each request

    def serve(self, context: ssl.SSLContext | None) -> ThreadingHTTPServer:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                backend.seen.append(self.path)
                backend.clients.append(self.headers[CLIENT_HEADER])
                backend.nodes.append(self.headers.get_all(NODE_HEADER, []))
                size = int(self.headers.get("Content-Length", "0"))
                self.rfile.read(size)
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


@dataclass
class Lab:
    """A consortium with sites, and a running proxy."""

    home: ServerHome
    door: Door
    proxy: Proxy
    backend: Backend
    sites: dict[str, Keys] = field(default_factory=dict)
    certificates: dict[str, bytes] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def enter(self, site: str, *, days_ago: float = 0.0) -> None:
        keys, now = Keys(), datetime.now(UTC) - timedelta(days=days_ago)
        request = keys.request(site)
        signed = approve(
            self.home, self.home.authority(), request, fingerprint=fingerprint_of(request.keys), now=now
        )
        self.sites[site], self.certificates[site] = keys, signed.bundle.certificate.encode()

    def renew(self, site: str) -> None:
        csr = make_csr(site, self.sites[site].tls)
        signed = renew(self.home, self.home.authority(), site, csr, now=datetime.now(UTC))
        self.certificates[site] = signed.bundle.certificate.encode()

    def revoke(self, site: str) -> None:
        revoke(self.home, self.home.authority(), site, reason=RevocationReason.LEFT, now=datetime.now(UTC))

    def write(self) -> None:
        sites = read_sites(self.home)
        nodes = [KnownNode(n, s.node_key) for n, s in sites.items() if s.state is SiteState.APPROVED]
        revoked = [int(c.serial, 16) for s in sites.values() for c in s.certificates if c.revoked_s]
        self.door.logs.mkdir(parents=True, exist_ok=True)
        write_door(self.door, nodes, revoked)

    def restart(self) -> None:
        """Start the proxy with what the registry holds now, and wait until it listens."""
        self.stop()
        self.write()
        binary, state = find_proxy(self.proxy), str(self.door.state)
        command = [binary, "-p", state, "-c", f"{state}/nginx.conf"]
        if self.proxy is Proxy.CADDY:
            command = [binary, "run", "--adapter", "caddyfile", "--config", f"{state}/Caddyfile"]
        with (self.door.logs / "proxy.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={"HOME": state, "PATH": "/usr/bin:/bin"}
            )
        end = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                self.ask("/", certificate=None)
                return
            assert self.process.poll() is None, (self.door.logs / "proxy.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def node(self, site: str) -> str:
        """Return what a site's SuperNode sends in NODE_HEADER."""
        known: SiteKeySet = self.sites[site].request(site).keys
        return KnownNode(site, known.node_key).header

    def ask(
        self,
        path: str,
        *,
        certificate: str | None,
        node: str | None = None,
        method: str = "POST",
        body: bytes = b"x",
        key: str | None = None,
        claims: str = "",
        also: str | None = None,
    ) -> int:
        """Send one request as a site (`certificate`), signed by a site's node key header; return the status.

        `claims` is an address that the client says it has; `also` a site whose node key is named after that
        of `node`. A connection that the proxy ends is 0.
        """
        context = ssl.create_default_context(cafile=str(self.home.authority_directory / "ca.crt"))
        if certificate is not None:
            path_of = self.home.directory / f"{certificate}.test.pem"
            tls = self.sites[key or certificate].tls
            pem = tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            path_of.write_bytes(self.certificates[certificate] + pem)
            context.load_cert_chain(str(path_of))
        host, _, port = self.door.listen.rpartition(":")
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
        headers = {CLIENT_HEADER: claims} if claims else {}
        for header, named in ((NODE_HEADER, node), (NODE_HEADER.title(), also)):
            if named is not None:
                headers[header] = self.node(named)
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse().status
        except (ssl.SSLError, ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
            return 0
        finally:
            connection.close()


def door_of(
    home: ServerHome, port: int, internal: LoopbackTls, *, superlink_port: int, api_port: int, **limits: int
) -> Door:
    """Return the door of a consortium, its files beside the consortium's directory."""
    directory = home.directory.parent
    return Door(
        listen=f"127.0.0.1:{port}",
        state=directory / "proxy",
        logs=directory / "logs",
        certificate=home.certificate,
        key=home.certificate_key,
        authority=home.authority_directory / "ca.crt",
        crl=home.crl,
        internal_authority=internal.authority,
        superlink_port=superlink_port,
        api_port=api_port,
        **limits,
    )


@contextlib.contextmanager
def running_lab(directory: Path, proxy: Proxy, **limits: int) -> Iterator[Lab]:
    """Run a proxy with the sites north and south before a backend."""
    now = datetime.now(UTC)
    port = free_port()
    home = create_server_home(directory / "srv", consortium="lab", address=f"localhost:{port}", now=now)
    tls = write_loopback_tls(directory / "internal", now=now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(tls.certificate), str(tls.key))
    backend = Backend()
    superlink, api = backend.serve(context), backend.serve(None)
    door = door_of(
        home, port, tls, superlink_port=superlink.server_address[1], api_port=api.server_address[1], **limits
    )
    lab = Lab(home, door, proxy, backend)
    for site in ("north", "south"):
        lab.enter(site)
    try:
        lab.restart()
        yield lab
    finally:
        lab.stop()
        for server in (superlink, api):
            server.shutdown()
            server.server_close()
