"""Throw-away TLS certificates and Flower node keys for one local engine.

Guarantees: the authority's private key never touches the disk, so nobody can issue a further certificate;
private keys are files of mode 0600. The certificate is for loopback only.

It does not serve a real consortium: `fedrad-server init` makes those identities.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.files import write_atomic

_BACKDATE = datetime.timedelta(hours=1)
_LIFETIME = datetime.timedelta(days=60)


@dataclass(frozen=True)
class LoopbackTls:
    """Paths of a PEM authority certificate, and of a server certificate and key that it signed."""

    authority: Path
    certificate: Path
    key: Path


def write_loopback_tls(
    directory: Path, *, now: datetime.datetime, lifetime: datetime.timedelta = _LIFETIME
) -> LoopbackTls:
    """Write a fresh authority and a server certificate for localhost and 127.0.0.1."""
    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedRad local engine")])
    authority = (
        _certificate(authority_name, authority_name, authority_key, authority_key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    server_key = ec.generate_private_key(ec.SECP384R1())
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")),
    ]
    server = (
        _certificate(server_name, authority_name, authority_key, server_key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    tls = LoopbackTls(directory / "ca.crt", directory / "server.pem", directory / "server.key")
    write_atomic(tls.authority, authority.public_bytes(Encoding.PEM))
    write_atomic(tls.certificate, server.public_bytes(Encoding.PEM))
    write_atomic(
        tls.key,
        server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        mode=0o600,
    )
    return tls


def write_node_key(path: Path) -> bytes:
    """Write a P-384 key as `ssh-keygen -t ecdsa -b 384` would; return its public key as PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_atomic(path, private, mode=0o600)
    public = key.public_key()
    write_atomic(path.with_suffix(".pub"), public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(issuer_identifier, critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
