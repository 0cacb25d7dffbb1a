"""A hospital's HTTP proxy: what its setting may say, which hosts it is for, and how it is asked to connect.

One reading for `up`, `link` and `doctor`. What passes through is TLS from this site to the server; the proxy
itself is spoken to in the clear, so its own password is as safe as the hospital's network.
"""

from __future__ import annotations

import base64
import re
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from common.errors import ProxyUnsupported, ServerUnreachable

DEFAULT_PORT = 3128
_HEAD_BYTES = 16 << 10
_FORM = "http://[USER:PASSWORD@]HOST:PORT"


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that is asked to CONNECT."""

    host: str
    port: int = DEFAULT_PORT
    user: str = ""
    password: str = ""

    @property
    def address(self) -> str:
        """Return HOST:PORT, which may be shown."""
        return _address(self.host, self.port)


def parse_proxy(text: str) -> Proxy | None:
    """Parse a proxy's setting; no scheme means http, an empty text or `none` no proxy.

    Raises ProxyUnsupported, without the password, for another scheme (https, socks5) and for no address.
    """
    text = text.strip()
    if text in ("", "none"):
        return None
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    if scheme.lower() != "http":
        known = scheme if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,15}", scheme) else "something else"
        raise ProxyUnsupported(
            f"proxy: expected {_FORM}, got {known}://…; this release speaks to a proxy over plain HTTP only "
            "(what passes through it is TLS all the same)"
        )
    try:
        where = urlsplit(f"http://{rest}")
        host, port = where.hostname or "", where.port
    except ValueError:
        raise _malformed() from None
    more = where.path not in ("", "/") or where.query or where.fragment
    if not host or port == 0 or more or re.search(r"\s", rest):
        raise _malformed()
    return Proxy(host, port or DEFAULT_PORT, unquote(where.username or ""), unquote(where.password or ""))


def format_proxy(proxy: Proxy | None) -> str:
    """Write a proxy so that `parse_proxy` reads it back; the text holds its password."""
    if proxy is None:
        return "none"
    login = quote(proxy.user, safe="")
    if proxy.password:
        login += ":" + quote(proxy.password, safe="")
    return f"http://{login}@{proxy.address}" if login else f"http://{proxy.address}"


def choose_proxy(given: str | None) -> Callable[[str], str]:
    """Say which setting holds for a host: the given one, else the environment's."""
    if given is not None:
        return lambda _host: given
    return lambda host: (
        "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https", "")
    )


def connect_through(connection: socket.socket, proxy: Proxy, *, host: str, port: int) -> None:
    """Have the proxy connect to the server; raises OSError, or ServerUnreachable with the proxy's answer."""
    target = _address(host, port)
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if proxy.user:
        token = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        head += f"Proxy-Authorization: Basic {token}\r\n"
    connection.sendall(head.encode() + b"\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)  # not a byte more: what follows is the server's
        if not piece or len(answer) > _HEAD_BYTES:
            break
        answer += piece
    status = answer.split(b"\r\n", 1)[0].decode("latin-1", "replace")
    words = status.split(" ", 2)
    if len(words) < 2 or words[1] != "200":
        raise ServerUnreachable(
            f"proxy: expected it to connect to {target}, got {status[:100]!r}"
            + ("; user and password belong into its address" if "407" in status else "")
        )


def _malformed() -> ProxyUnsupported:
    return ProxyUnsupported(
        f"proxy: expected {_FORM}, got another form; signs such as @ : / # in a password are written %40 …"
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
