"""Mutual TLS: the client's certificate is the user; who has none does not get in."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from client.serving.certificate_user import common_name
from client.serving.launch import Tls
from tests.client.serving.hosting import hosted, png


def certificates(folder: Path) -> None:
    """Write a CA, a server certificate for 127.0.0.1 and a client certificate for dr.bob."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server", "dr.bob")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in keys}
    for name, key in keys.items():
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if name == "ca":
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        if name == "server":
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        made = builder.sign(keys["ca"], hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


@pytest.mark.slow
def test_a_client_certificate_names_the_user(tmp_path: Path) -> None:
    certificates(tmp_path)
    tls = Tls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    with hosted(tmp_path, launch=lambda one: replace(one, tls=tls), certificate_users=True) as host:
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
            httpx.get(f"{host.url}/health", verify=trusting, timeout=60)
        trusting.load_cert_chain(tmp_path / "dr.bob.pem", tmp_path / "dr.bob.key")
        answer = httpx.post(f"{host.url}/v1/report", content=png(1), verify=trusting, timeout=300)
        assert answer.status_code == 200
        user = next(iter(host.service._access.records())).user
        assert user == "cert:dr.bob"


def test_only_a_plain_common_name_is_a_user() -> None:
    assert common_name({"subject": ((("commonName", "dr.bob"),),)}) == "dr.bob"
    for value in ("../x", "a b", "", "x" * 65):
        assert common_name({"subject": ((("commonName", value),),)}) == ""
    assert common_name(None) == ""
