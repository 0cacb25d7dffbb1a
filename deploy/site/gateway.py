"""A site's one way out: a loopback port whose connections go to the server under the site's certificate.

The SuperNode knows no client certificate and no proxy rules of a hospital, and should hold no TLS key. So it
speaks TLS to this port, with an authority made for this machine and this start, and the gateway carries the
bytes to the server over mutual TLS, through an HTTP proxy (CONNECT) where one is set.

Guarantees: it connects to the enrolled server only, and believes it only under the consortium's authority; a
renewed certificate is used from the next connection on; outbound connections only. It reads nothing of what
passes. Whoever can reach loopback on this machine can pass bytes to the server's door: node key and message
signatures are what count there.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.proxy import connect_through, parse_proxy
from common.errors import ServerUnreachable, SiteRevoked
from deploy.local.certificates import LoopbackTls

log = logging.getLogger("fedrad.gateway")

_CONNECT_S = 20.0
_PIECE = 256 << 10
_MAX_CONNECTIONS = 64
_MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True)
class Route:
    """How the server is reached: its address, whom to believe, what to show, and a proxy or an empty text.

    `proxy` is what client/proxy.py parses.
    """

    host: str
    port: int
    authority: Path
    certificate: Path
    key: Path
    proxy: str = ""

    def context(self, *, with_certificate: bool = True) -> ssl.SSLContext:
        """Make the TLS settings of a new connection; the certificate is read anew each time."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cafile=str(self.authority))
        if with_certificate:
            context.load_cert_chain(str(self.certificate), str(self.key))
        return context


def open_route(route: Route, *, timeout_s: float = _CONNECT_S) -> socket.socket:
    """Connect to the server, or through the proxy to it, without TLS yet.

    Raises ServerUnreachable, for a proxy of an unknown kind (ProxyUnsupported) before anything is connected.
    """
    proxy = parse_proxy(route.proxy)
    host, port = (proxy.host, proxy.port) if proxy else (route.host, route.port)
    what = "proxy" if proxy else "server"
    try:
        connection = socket.create_connection((host, port), timeout=timeout_s)
    except socket.gaierror as error:
        raise ServerUnreachable(f"{what} {host}: expected a name that DNS knows, got none") from error
    except OSError as error:
        reason = error.strerror or "no answer in time"
        raise ServerUnreachable(f"{what} {host}:{port}: expected a connection, got: {reason}") from error
    if proxy:
        try:
            connect_through(connection, proxy, host=route.host, port=route.port)
        except OSError as error:
            connection.close()
            raise ServerUnreachable(f"proxy {host}:{port}: expected it to connect, got: {error}") from error
        except ServerUnreachable:
            connection.close()
            raise
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return connection


def ask_server(route: Route, body: bytes, *, with_certificate: bool = True) -> dict[str, Any]:
    """Send one site request and return the answer; a refusal of the server is raised by its name.

    Raises ServerUnreachable, SiteRevoked, or ServerRefused with the server's own words.
    """
    try:
        context = route.context(with_certificate=with_certificate)
        with context.wrap_socket(open_route(route), server_hostname=route.host) as connection:
            connection.settimeout(_CONNECT_S)
            client = http.client.HTTPConnection(route.host, route.port)
            client.sock = connection
            client.request("POST", "/fedrad/v1/site", body, {"Content-Type": "application/json"})
            response = client.getresponse()
            data = response.read(_MAX_ANSWER_BYTES)
    except ssl.SSLCertVerificationError as error:
        raise ServerUnreachable(
            f"server {route.host}: expected a certificate of the consortium, got: {error.verify_message}; "
            "is this machine's clock right?"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerUnreachable(
            f"server {route.host}:{route.port}: expected an answer, got: {error}"
        ) from error
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if response.status == http.client.FORBIDDEN and not isinstance(value, dict):
        raise DoorClosed(
            f"server {route.host}: the certificate is not accepted (revoked, expired or another's)"
        )
    if not isinstance(value, dict) or "time_s" not in value:
        raise ServerUnreachable(f"server {route.host}: expected an answer, got HTTP {response.status}")
    if "error" in value:
        raised = SiteRevoked if value["error"] == "SiteRevoked" else ServerRefused
        raise raised(f"{value['error']}: {value.get('message', '')}")
    return value


class ServerRefused(ServerUnreachable):
    """The server answered and refused; the message starts with its error's name."""


class DoorClosed(ServerRefused):
    """The server's proxy did not accept this site's certificate."""


class Gateway:
    """Carries connections of one loopback port to the server; counts what it carries."""

    def __init__(
        self, route: Callable[[], Route], *, tls: LoopbackTls, port: int, host: str = "127.0.0.1"
    ) -> None:
        self._route, self._tls, self._host = route, tls, host
        self._port = port
        self._open = 0
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="gateway")
        self._thread = threading.Thread(target=self._serve, daemon=True, name="gateway")
        self._failure: BaseException | None = None
        self.last_connected_s = 0.0
        self.last_error = ""
        self.bytes_up = 0
        self.bytes_down = 0

    @property
    def port(self) -> int:
        return self._port

    @property
    def open(self) -> int:
        """How many connections to the server are open."""
        return self._open

    def start(self) -> None:
        """Listen; raises OSError where the port is taken."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(str(self._tls.certificate), str(self._tls.key))
            server = self._loop.run_until_complete(
                asyncio.start_server(self._carry, self._host, self._port, ssl=context, limit=_PIECE)
            )
            self._port = int(server.sockets[0].getsockname()[1])
        except BaseException as failure:
            self._failure = failure
            self._loop.close()
            self._ready.set()
            return
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0.05))
            self._loop.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        outward: asyncio.StreamWriter | None = None
        try:
            if self._open >= _MAX_CONNECTIONS:
                return
            route = self._route()
            raw = await self._loop.run_in_executor(self._pool, open_route, route)
            raw.setblocking(False)
            try:
                inward, outward = await asyncio.open_connection(
                    sock=raw, ssl=route.context(), server_hostname=route.host,
                    ssl_handshake_timeout=_CONNECT_S, limit=_PIECE,
                )  # fmt: skip
            except (OSError, TimeoutError):
                raw.close()
                raise
            self.last_connected_s, self.last_error = time.time(), ""
            with self._counted():
                await self._both_ways(reader, writer, inward, outward)
        except (OSError, ServerUnreachable, ssl.SSLError, TimeoutError) as error:
            text = str(error) or type(error).__name__
            if text != self.last_error:
                log.warning("no way to the server: %s", error)
                print(f"gateway: {text}", flush=True)
            self.last_error = text
        finally:
            for end in (writer, outward):
                if end is not None:
                    end.close()

    async def _both_ways(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        inward: asyncio.StreamReader,
        outward: asyncio.StreamWriter,
    ) -> None:
        up = asyncio.create_task(self._pump(reader, outward, up=True))
        down = asyncio.create_task(self._pump(inward, writer, up=False))
        done, left = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        for task in (*done, *left):
            with contextlib.suppress(asyncio.CancelledError, OSError, ssl.SSLError):
                await task

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        while piece := await source.read(_PIECE):
            if up:
                self.bytes_up += len(piece)
            else:
                self.bytes_down += len(piece)
                self.last_connected_s = time.time()
            sink.write(piece)
            await sink.drain()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
