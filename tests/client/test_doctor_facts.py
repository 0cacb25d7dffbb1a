"""What the doctor gathers, from real files, a real TLS server and a real CONNECT proxy on loopback."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from client.doctor import State, check_server
from client.doctor_facts import _base, _damaged_cases, _data, _keys, gather_machine, parse_cards, probe_server
from client.home import SiteHome, create_home
from common.model.tiny import tiny_base_directory
from deploy.local.certificates import LoopbackTls, write_loopback_tls


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> LoopbackTls:
    return write_loopback_tls(tmp_path_factory.mktemp("tls"), now=datetime.datetime.now(datetime.UTC))


def context_of(tls: LoopbackTls) -> Callable[[], ssl.SSLContext]:
    def make() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.load_verify_locations(cafile=str(tls.authority))
        return made

    return make


def serve(handle: Callable[[socket.socket], None]) -> tuple[int, Callable[[], None]]:
    """Accept connections on a loopback port, each handled in a thread; returns port and how to stop."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(60)
            threading.Thread(target=guarded, args=(connection,), daemon=True).start()

    def guarded(connection: socket.socket) -> None:
        try:
            with connection:
                handle(connection)
        except (OSError, ssl.SSLError):
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def stop() -> None:
        stopped.set()
        thread.join()
        listener.close()

    return int(listener.getsockname()[1]), stop


@pytest.fixture()
def server(tls: LoopbackTls) -> Iterator[tuple[int, list[float]]]:
    """An HTTPS server whose clock is off by `offset[0]` seconds."""
    offset = [0.0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)

    def handle(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True) as connection:
            connection.recv(4096)
            date = formatdate(datetime.datetime.now().timestamp() + offset[0], usegmt=True)
            answer = f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(answer.encode())

    port, stop = serve(handle)
    yield port, offset
    stop()


@pytest.fixture()
def proxy() -> Iterator[tuple[int, list[str]]]:
    """A CONNECT proxy; the second value collects what it was asked, and refuses where it holds `no`."""
    asked: list[str] = []

    def handle(connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        asked.append(head.decode())
        if "no" in asked:
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=60) as onward:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(onward, connection), daemon=True)
            back.start()
            pump(connection, onward)
            back.join(60)

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    port, stop = serve(handle)
    yield port, asked
    stop()


def test_a_server_that_answers_gives_its_clock(server: tuple[int, list[float]], tls: LoopbackTls) -> None:
    port, offset = server
    offset[0] = -3600.0
    facts = probe_server(f"127.0.0.1:{port}", proxy="", context=context_of(tls))
    assert facts.failed == ""
    assert facts.addresses == ("127.0.0.1",)
    assert facts.date_unix_s is not None
    assert abs(facts.asked_unix_s - facts.date_unix_s - 3600) < 5


def test_a_proxy_is_asked_to_connect_with_its_login(
    server: tuple[int, list[float]], proxy: tuple[int, list[str]], tls: LoopbackTls
) -> None:
    facts = probe_server(
        f"127.0.0.1:{server[0]}", proxy=f"http://it:p%40ss@127.0.0.1:{proxy[0]}", context=context_of(tls)
    )
    assert facts.failed == ""
    assert facts.proxy == f"127.0.0.1:{proxy[0]}"
    assert proxy[1][0].startswith(f"CONNECT 127.0.0.1:{server[0]} HTTP/1.1")
    assert "Proxy-Authorization: Basic aXQ6cEBzcw==" in proxy[1][0]


def test_a_proxy_that_refuses_is_named(
    server: tuple[int, list[float]], proxy: tuple[int, list[str]], tls: LoopbackTls
) -> None:
    proxy[1].append("no")
    facts = probe_server(
        f"127.0.0.1:{server[0]}", proxy=f"http://127.0.0.1:{proxy[0]}", context=context_of(tls)
    )
    assert facts.failed == "proxy"
    assert "403" in facts.error


@pytest.mark.parametrize("text", ["https://127.0.0.1:{port}", "socks5://127.0.0.1:{port}"])
def test_a_proxy_of_another_kind_is_named_before_anything_is_connected(
    server: tuple[int, list[float]], proxy: tuple[int, list[str]], tls: LoopbackTls, text: str
) -> None:
    facts = probe_server(f"127.0.0.1:{server[0]}", proxy=text.format(port=proxy[0]), context=context_of(tls))
    assert facts.failed == "proxy" and facts.error.startswith("ProxyUnsupported: ")
    assert proxy[1] == []
    [finding] = check_server(facts)
    assert (finding.check, finding.state) == ("proxy", State.FAIL)


def test_a_proxy_without_a_scheme_is_an_http_proxy(
    server: tuple[int, list[float]], proxy: tuple[int, list[str]], tls: LoopbackTls
) -> None:
    facts = probe_server(f"127.0.0.1:{server[0]}", proxy=f"127.0.0.1:{proxy[0]}", context=context_of(tls))
    assert facts.failed == "" and len(proxy[1]) == 1


def test_a_server_of_another_authority_is_not_believed(
    server: tuple[int, list[float]], tmp_path: Path
) -> None:
    other = write_loopback_tls(tmp_path, now=datetime.datetime.now(datetime.UTC))
    facts = probe_server(f"127.0.0.1:{server[0]}", proxy="", context=context_of(other))
    assert facts.failed == "tls"


def test_a_closed_port_and_an_unknown_name_are_told_apart(tls: LoopbackTls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert probe_server(f"127.0.0.1:{port}", proxy="", context=context_of(tls)).failed == "connect"
    unknown = probe_server("fedrad.invalid:443", proxy="", context=context_of(tls))
    assert unknown.failed == "dns"


def test_nvidia_smi_is_understood() -> None:
    text = (
        "Tesla V100-SXM2-32GB, 7.0, 32768, 580.95.05\nNVIDIA H200, 9.0, 143771, 580.95.05\n[N/A], x, y, z\n"
    )
    first, second = parse_cards(text)
    assert (first.capability, first.memory_bytes) == ((7, 0), 32768 << 20)
    assert (second.name, second.driver) == ("NVIDIA H200", "580.95.05")


def test_this_machine_is_gathered(tmp_path: Path) -> None:
    facts = gather_machine([tmp_path, tmp_path / "not" / "yet"], say=lambda what: None)
    assert facts.packages["flwr"] == "1.41.0"
    assert facts.memory_bytes > 0
    assert list(facts.disk_free_bytes) == [str(tmp_path)]
    assert facts.wheel is not None


@pytest.fixture()
def home(tmp_path: Path) -> SiteHome:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_directory(), base)
    return create_home(
        tmp_path / "home", site="north", operator_key="0" * 64, data=tmp_path / "data", bases={"tiny": base}
    )


def test_keys_that_others_can_read_are_named(home: SiteHome) -> None:
    assert _keys(home) == ()
    home.key_path.chmod(0o644)
    (home.directory / "keys").chmod(0o755)
    problems = " ".join(_keys(home))
    assert "keys/ has mode 0755" in problems
    assert "message.key has mode 0644" in problems


def test_data_that_is_not_there_is_named_and_no_patient_is(home: SiteHome) -> None:
    assert _data(home.data).problem == "DatasetInvalid"
    home.data.mkdir()
    (home.data / "pairs.jsonl").write_text('{"patient": "Erika Mustermann"}\n')
    facts = _data(home.data)
    assert facts.problem
    assert "Erika" not in repr(facts)


def test_damaged_cases_are_named_where_there_is_a_worklist(home: SiteHome) -> None:
    assert _damaged_cases(home) is None
    case = home.directory / "serving" / "page" / "worklist" / ("0" * 32)
    case.mkdir(parents=True)
    assert _damaged_cases(home) == ()
    (case / "case.json").write_text("{")
    (problem,) = _damaged_cases(home) or ()
    assert f"{case.name}/case.json" in problem


def test_a_base_is_measured_hashed_and_its_damage_named(home: SiteHome) -> None:
    facts = _base(home, "tiny", hash_files=True, say=lambda what: None)
    assert facts.problem == ""
    assert facts.size is not None
    assert "files hashed" in facts.hashed
    (home.bases["tiny"] / "model.safetensors").write_bytes(b"x")
    assert _base(home, "tiny", hash_files=True, say=lambda what: None).problem
    shutil.rmtree(home.bases["tiny"])
    assert _base(home, "tiny", hash_files=True, say=lambda what: None).problem
