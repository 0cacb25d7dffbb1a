"""Throw-away TLS and node keys of a local engine."""

from __future__ import annotations

import datetime
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key

from deploy.local.certificates import write_loopback_tls, write_node_key

NOW = datetime.datetime.now(datetime.UTC)


def handshake(directory: Path, authority: Path, *, name: str) -> None:
    """Run a TLS handshake in memory, the server side with the certificate in `directory`."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(directory / "server.pem", directory / "server.key")
    client_context = ssl.create_default_context(cafile=str(authority))
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_server_certificate_holds_for_loopback(tmp_path: Path, name: str) -> None:
    tls = write_loopback_tls(tmp_path, now=NOW)
    handshake(tmp_path, tls.authority, name=name)


def test_the_server_certificate_holds_for_no_other_name(tmp_path: Path) -> None:
    tls = write_loopback_tls(tmp_path, now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, tls.authority, name="hospital.example")


def test_another_engines_authority_is_not_trusted(tmp_path: Path) -> None:
    write_loopback_tls(tmp_path / "one", now=NOW)
    other = write_loopback_tls(tmp_path / "two", now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "one", other.authority, name="localhost")


def test_only_the_server_key_is_written_and_private(tmp_path: Path) -> None:
    tls = write_loopback_tls(tmp_path, now=NOW)
    with_keys = [path for path in tmp_path.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert with_keys == [tls.key]
    assert tls.key.stat().st_mode & 0o777 == 0o600


def test_a_node_key_is_a_private_openssh_p384_key(tmp_path: Path) -> None:
    public = write_node_key(tmp_path / "a.node")
    key = load_ssh_private_key((tmp_path / "a.node").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert key.public_key() == load_pem_public_key(public)
    assert (tmp_path / "a.node").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_agrees_on_the_public_half(tmp_path: Path) -> None:
    write_node_key(tmp_path / "a.node")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(tmp_path / "a.node")], capture_output=True, check=True
    )
    assert derived.stdout.split()[:2] == (tmp_path / "a.pub").read_bytes().split()[:2]
