"""What a hospital may write for its proxy, and what is refused before anything is connected."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.proxy import Proxy, choose_proxy, connect_through, format_proxy, parse_proxy
from common.errors import ProxyUnsupported, ServerUnreachable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("none", None),
        ("proxy:8080", Proxy("proxy", 8080)),
        ("proxy", Proxy("proxy", 3128)),
        (" http://Proxy.Hospital:3128/ ", Proxy("proxy.hospital", 3128)),
        ("HTTP://proxy:3128", Proxy("proxy", 3128)),
        ("it:s3%20cret@proxy:3128", Proxy("proxy", 3128, "it", "s3 cret")),
        ("http://it:p%40ss@[2001:db8::1]:3128", Proxy("2001:db8::1", 3128, "it", "p@ss")),
    ],
)
def test_a_proxy_is_read_with_or_without_its_scheme(text: str, expected: Proxy | None) -> None:
    assert parse_proxy(text) == expected


@pytest.mark.parametrize("scheme", ["https", "socks5", "socks5h", "HTTPS"])
def test_a_proxy_of_another_kind_is_refused_by_its_name_and_without_its_password(scheme: str) -> None:
    with pytest.raises(ProxyUnsupported, match=f"got {scheme}://") as raised:
        parse_proxy(f"{scheme}://it:secret@proxy:3129")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["http://", ":3128", "proxy:port", "proxy:0", "proxy:99999", "http://proxy/path", "http://proxy?x=1",
     "http://it:p#ss@proxy:3128", "http://[::1", "pro xy:3128", "secret value://x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ProxyUnsupported, match=r"expected http://"):
        parse_proxy(text)


@given(
    host=st.sampled_from(["proxy", "proxy.hospital", "192.0.2.1", "2001:db8::1"]),
    port=st.integers(1, 65535),
    login=st.tuples(st.text(min_size=1), st.text()) | st.just(("", "")),
)
def test_what_is_written_is_read_back(host: str, port: int, login: tuple[str, str]) -> None:
    try:
        (login[0] + login[1]).encode()
    except UnicodeEncodeError:
        return
    proxy = Proxy(host, port, *login)
    assert parse_proxy(format_proxy(proxy)) == proxy


def test_no_proxy_is_written_as_a_word() -> None:
    assert parse_proxy(format_proxy(None)) is None


def test_the_environment_is_read_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert choose_proxy(None)("server") == ""
    monkeypatch.setenv("HTTPS_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inside")
    assert choose_proxy(None)("server") == "proxy:3128"
    assert choose_proxy(None)("inside") == ""
    assert choose_proxy("none")("server") == "none"


def test_an_ipv6_server_is_asked_for_in_brackets_and_a_closed_connection_is_a_refusal() -> None:
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []

    def answer() -> None:
        heard.append(theirs.recv(65536))
        theirs.close()

    with ours:
        there = threading.Thread(target=answer)
        there.start()
        with pytest.raises(ServerUnreachable, match="expected it to connect"):
            connect_through(ours, Proxy("proxy"), host="2001:db8::7", port=443)
        there.join()
    assert heard[0].startswith(b"CONNECT [2001:db8::7]:443 HTTP/1.1\r\n")
