"""Throw-away TLS certificates and Flower node keys for one local engine.

Guarantees: the authority's private key never touches the disk, so nobody can issue a further certificate;
private keys are files of mode 0600. The certificate is for loopback only.

It does not serve a real consortium: `fedrad-server init` makes those identities.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from common.certificates import make_authority
from common.files import write_atomic

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
    authority = make_authority("FedRad local engine", now=now, lifetime=lifetime)
    server_key = ec.generate_private_key(ec.SECP384R1())
    server = authority.issue_server(
        ["localhost", "127.0.0.1"], server_key.public_key(), now=now, lifetime=lifetime
    )
    tls = LoopbackTls(directory / "ca.crt", directory / "server.pem", directory / "server.key")
    write_atomic(tls.authority, authority.pem.encode())
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
