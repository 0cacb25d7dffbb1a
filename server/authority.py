"""The consortium's certificate authority: one P-384 key that signs site and server certificates.

Guarantees: certificates name exactly one site, serve client authentication only, and are back-dated by an
hour so that a slow clock still accepts them; the authority may sign nothing but end entities. The key file is
0600 and may carry a passphrase. It decides nothing: who gets a certificate is `server/enrolment.py`.
"""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import CertificateInvalid
from common.files import write_atomic

BACKDATE = timedelta(hours=1)
_AUTHORITY_LIFETIME = timedelta(days=3653)
_CRL_LIFETIME = timedelta(days=30)


@dataclass(frozen=True)
class Authority:
    """An opened authority: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue_site(
        self, site: str, public: ec.EllipticCurvePublicKey, *, now: datetime, lifetime: timedelta
    ) -> x509.Certificate:
        """Sign a client certificate whose common name is the site's id."""
        return self._issue(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)]),
            public,
            now=now,
            lifetime=lifetime,
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            names=[],
        )

    def issue_server(
        self, hosts: Iterable[str], public: ec.EllipticCurvePublicKey, *, now: datetime, lifetime: timedelta
    ) -> x509.Certificate:
        """Sign a server certificate for host names and IP addresses."""
        names = [_general_name(host) for host in hosts]
        return self._issue(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedRad server")]),
            public,
            now=now,
            lifetime=lifetime,
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            names=names,
        )

    def revoke(self, serials: Iterable[tuple[int, datetime]], *, now: datetime) -> bytes:
        """Sign a revocation list of (serial number, time) as PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - BACKDATE)
            .next_update(now + _CRL_LIFETIME)
        )
        for serial, when in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(Encoding.PEM)

    def _issue(
        self,
        subject: x509.Name,
        public: ec.EllipticCurvePublicKey,
        *,
        now: datetime,
        lifetime: timedelta,
        usage: x509.ObjectIdentifier,
        names: list[x509.GeneralName],
    ) -> x509.Certificate:
        builder = (
            _builder(subject, self.certificate.subject, public, now=now, lifetime=lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA384())


def create_authority(
    directory: Path, *, consortium: str, now: datetime, passphrase: bytes = b""
) -> Authority:
    """Make an authority's key and certificate in a directory; an existing one is never replaced."""
    path = directory / "ca.key"
    if path.exists():
        raise CertificateInvalid(f"{path}: expected no authority here yet, got one; it is never replaced")
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"FedRad {consortium}")])
    certificate = (
        _builder(name, name, key.public_key(), now=now, lifetime=_AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=0o600)
    write_atomic(directory / "ca.crt", certificate.public_bytes(Encoding.PEM))
    return Authority(certificate, key)


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


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    *,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
