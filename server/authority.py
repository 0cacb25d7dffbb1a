"""The consortium's certificate authority on disk: `ca.key` (0600, a passphrase where wanted) and `ca.crt`.

What it signs is `common/certificates.py`; who gets a certificate is `server/enrolment.py`.
"""

from __future__ import annotations

import stat
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from common.certificates import BACKDATE, Authority, make_authority
from common.errors import CertificateInvalid
from common.files import write_atomic

_AUTHORITY_LIFETIME = timedelta(days=3653)


def create_authority(
    directory: Path, *, consortium: str, now: datetime, passphrase: bytes = b""
) -> Authority:
    """Make an authority's key and certificate in a directory; an existing one is never replaced."""
    path = directory / "ca.key"
    if path.exists():
        raise CertificateInvalid(f"{path}: expected no authority here yet, got one; it is never replaced")
    made = make_authority(f"FedRad {consortium}", now=now, lifetime=_AUTHORITY_LIFETIME)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    write_atomic(path, made.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=0o600)
    write_atomic(directory / "ca.crt", made.certificate.public_bytes(Encoding.PEM))
    return made


def open_authority(directory: Path, *, passphrase: bytes = b"") -> Authority:
    """Read an authority; raises CertificateInvalid when missing, open to others or under a passphrase."""
    certificate = read_certificate(directory / "ca.crt")
    key = read_ec_key(directory / "ca.key", passphrase=passphrase)
    if key.public_key() != certificate.public_key():
        raise CertificateInvalid(f"{directory}: expected the key of ca.crt, got another")
    return Authority(certificate, key)


def read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateInvalid(f"{path}: expected a certificate in PEM, got none") from error


def read_ec_key(path: Path, *, passphrase: bytes = b"") -> ec.EllipticCurvePrivateKey:
    """Read a P-384 private key file of mode 0600; raises CertificateInvalid."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise CertificateInvalid(f"{path}: expected mode 0600, got {mode:04o}; chmod 600 it")
        key = serialization.load_pem_private_key(path.read_bytes(), password=passphrase or None)
    except TypeError as error:
        wanted = "no passphrase" if passphrase else "its passphrase"
        raise CertificateInvalid(f"{path}: expected {wanted}") from error
    except (OSError, ValueError) as error:
        raise CertificateInvalid(
            f"{path}: expected a private key in PEM (and its passphrase), got none that opens"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateInvalid(f"{path}: expected an EC key, got another kind")
    return key


def verify_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Raise CertificateInvalid unless this authority signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CertificateInvalid(
            "expected a certificate of the consortium's authority, got another"
        ) from error


def renew_after(certificate: x509.Certificate) -> datetime:
    """Return when two thirds of the lifetime are over."""
    start = certificate.not_valid_before_utc + BACKDATE
    return start + (certificate.not_valid_after_utc - start) * 2 / 3
