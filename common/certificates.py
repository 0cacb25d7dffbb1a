"""A certificate authority in memory: one P-384 key that signs site and server certificates.

Guarantees: a site's certificate names exactly that site and serves client authentication only; all are
back-dated by an hour so that a slow clock still accepts them; the authority may sign end entities only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATE = timedelta(hours=1)
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


def make_authority(name: str, *, now: datetime, lifetime: timedelta) -> Authority:
    """Make an authority in memory, with a key of its own."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, subject, key.public_key(), now=now, lifetime=lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate, key)


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
