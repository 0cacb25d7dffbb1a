"""What a site's gateway costs: CPU seconds for 20 MB from loopback TLS to mutual TLS.

`python -m tests.benchmarks.gateway` prints one flat JSON object. Sender and receiver are other processes,
so that the CPU seconds are the gateway's.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import ssl
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deploy.local.certificates import write_loopback_tls
from deploy.site.gateway import Gateway, Route
from server.authority import create_authority
from tests.common.test_enrolment import new_tls

TOTAL_MB = 200
UNIT_MB = 20


def receive(directory: Path, ports: Any) -> None:
    """Accept one connection with a client certificate and take everything in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(directory / "server.pem"), str(directory / "server.key"))
    context.load_verify_locations(str(directory / "ca" / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))
    ports.put(listener.getsockname()[1])
    connection = context.wrap_socket(listener.accept()[0], server_side=True)
    size = 0
    while size < TOTAL_MB << 20:
        size += len(connection.recv(1 << 20))
    connection.sendall(b"done")


def send(port: int, authority: str, seconds: Any) -> None:
    """Send everything to the gateway and wait for the other end's word."""
    context = ssl.create_default_context(cafile=authority)
    raw = socket.create_connection(("127.0.0.1", port))
    connection = context.wrap_socket(raw, server_hostname="localhost")
    started = time.monotonic()
    for _ in range(TOTAL_MB):
        connection.sendall(b"x" * (1 << 20))
    connection.recv(4)
    seconds.put(time.monotonic() - started)


def measure(directory: Path) -> dict[str, float]:
    """Carry 200 MB and return the cost of 20."""
    now, lifetime = datetime.now(UTC), timedelta(days=1)
    authority = create_authority(directory / "ca", consortium="bench", now=now)
    for name in ("server", "site"):
        key = new_tls()
        if name == "server":
            made = authority.issue_server(["localhost"], key.public_key(), now=now, lifetime=lifetime)
        else:
            made = authority.issue_site("north", key.public_key(), now=now, lifetime=lifetime)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
        (directory / f"{name}.key").write_bytes(pem)
    start = multiprocessing.get_context("spawn")
    ports, seconds = start.Queue(), start.Queue()
    receiver = start.Process(target=receive, args=(directory, ports))
    receiver.start()
    own = (directory / "ca" / "ca.crt", directory / "site.pem", directory / "site.key")
    route = Route("localhost", ports.get(), *own)
    tls = write_loopback_tls(directory / "gateway", now=now)
    gateway = Gateway(lambda: route, tls=tls, port=0)
    gateway.start()
    cpu = time.process_time()
    sender = start.Process(target=send, args=(gateway.port, str(tls.authority), seconds))
    sender.start()
    wall = seconds.get()
    cpu = time.process_time() - cpu
    for process in (sender, receiver):
        process.join()
    gateway.stop()
    share = UNIT_MB / TOTAL_MB
    return {"gateway_cpu_s_20mb": round(cpu * share, 4), "gateway_wall_s_20mb": round(wall * share, 3)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder))))
