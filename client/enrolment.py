"""A site's side of enrolment: its keys, its request, the operator's bundle, renewal and rotation.

Below the site's directory (client/home.py):

    keys/tls.key  keys/node.key    P-384 (0600): TLS client and Flower node
    enrolment.json                 consortium, server address, when the certificate was issued
    tls/certificate.pem authority.pem
    next/                          keys of a rotation that the operator has not answered yet

Guarantees: private keys are made here and never leave; a bundle is installed only when it is for this site
and these keys and signed by the operator whose key this site holds. It talks to nobody: `deploy/site` does.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from client.home import SiteHome
from common.ec_keys import key_sha256, make_csr
from common.enrolment import (
    Ask,
    EnrolmentRequest,
    PresentKeys,
    SignedBundle,
    SignedSiteRequest,
    SiteRequest,
    enrolment_body,
    format_request,
    make_request,
    parse_request,
    sign_site_request,
    verify_bundle,
    verify_fingerprint,
)
from common.errors import CertificateInvalid, EnrolmentInvalid, KeyFileInvalid, SiteNotEnrolled
from common.files import sync_directory, write_atomic
from common.identity import SigningKey, fingerprint, load_key, load_or_create_key, verify_private
from common.ledger.entries import Enrolment

REQUEST_NAME = "enrolment-request.json"
_KEYS = ("tls.key", "node.key", "message.key", "witness.key")


@dataclass(frozen=True)
class Enrolled:
    """What an installed bundle says: where the server is, and the certificate's life."""

    consortium: str
    address: str
    not_before: datetime
    not_after: datetime

    @property
    def renew_after(self) -> datetime:
        """Return when two thirds of the lifetime are over (the first hour is the back-dating)."""
        start = self.not_before + timedelta(hours=1)
        return start + (self.not_after - start) * 2 / 3

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def authority_path(home: SiteHome) -> Path:
    return home.directory / "tls" / "authority.pem"


def certificate_path(home: SiteHome) -> Path:
    return home.directory / "tls" / "certificate.pem"


def tls_key_path(home: SiteHome) -> Path:
    return home.key_file("tls.key")


def node_key_path(home: SiteHome) -> Path:
    return home.key_file("node.key")


def request_enrolment(home: SiteHome, *, software: str, now: datetime) -> EnrolmentRequest:
    """Make the keys that are missing and the request to send; the same request again until a key changes."""
    keys = home.directory / "keys"
    path = home.directory / REQUEST_NAME
    if (home.directory / "enrolment.json").is_file():
        _verify_keys_there(home)
    tls = _load_or_create_ec(tls_key_path(home), PrivateFormat.PKCS8)
    node = _load_or_create_ec(node_key_path(home), PrivateFormat.OpenSSH)
    message = load_or_create_key(home.key_path)
    witness = load_or_create_key(home.witness_key_path)
    keys.chmod(0o700)
    if path.is_file():
        known = parse_request(path.read_bytes())
        body = enrolment_body(known.keys)
        if not known.rotations and _holds(body, tls=tls, node=node, message=message, witness=witness):
            return known
    request = make_request(
        site=home.site, tls=tls, node=node, message=message, witness=witness, software=software,
        time_s=int(now.timestamp()),
    )  # fmt: skip
    write_atomic(path, format_request(request))
    return request


def _verify_keys_there(home: SiteHome) -> None:
    """Raise KeyFileInvalid where an enrolled site lacks a key: a new one would not be the enrolled one."""
    for name in _KEYS:
        if not home.key_file(name).exists():
            raise KeyFileInvalid(
                f"{home.key_file(name)}: expected the enrolled site's key, got none; where systemd holds it, "
                "run this with its credentials (docs/deployment.md), where it is lost, with --new-keys"
            )


def request_rotation(
    home: SiteHome, *, software: str, now: datetime, message_keys: bool = False
) -> EnrolmentRequest:
    """Make new TLS and node keys, and with `message_keys` message and witness keys, and ask to use them.

    The new keys lie in `next/` until the operator's bundle is installed; running studies pin message and
    witness keys and refuse a site that changed them.
    """
    read_enrolled(home)
    coming = home.directory / "next"
    coming.mkdir(exist_ok=True, mode=0o700)
    present = _present(home)
    if not message_keys:
        for name in ("message.key", "witness.key"):
            (coming / name).unlink(missing_ok=True)
    message = load_or_create_key(coming / "message.key") if message_keys else present.message
    witness = load_or_create_key(coming / "witness.key") if message_keys else home.witness_key()
    request = make_request(
        site=home.site,
        tls=_load_or_create_ec(coming / "tls.key", PrivateFormat.PKCS8),
        node=_load_or_create_ec(coming / "node.key", PrivateFormat.OpenSSH),
        message=message,
        witness=witness,
        software=software,
        time_s=int(now.timestamp()),
        before=present,
    )
    write_atomic(home.directory / REQUEST_NAME, format_request(request))
    return request


def set_keys_aside(home: SiteHome, *, now: datetime) -> Path | None:
    """Put all keys and the enrolment away, so that new ones are made; after a revocation, or a loss."""
    keys = home.directory / "keys"
    if not keys.is_dir():
        return None
    aside = home.directory / f"keys-until-{now:%Y%m%dT%H%M%S}"
    keys.rename(aside)
    for path in (home.directory / "enrolment.json", home.directory / REQUEST_NAME):
        path.unlink(missing_ok=True)
    shutil.rmtree(home.directory / "next", ignore_errors=True)
    return aside


def install_bundle(home: SiteHome, signed: SignedBundle) -> Enrolled:
    """Install the operator's bundle, first or renewed; the keys of a rotation take their place with it.

    Raises SignatureInvalid, EnrolmentInvalid for another site's, CertificateInvalid for other keys or another
    authority than the site has.
    """
    bundle = signed.bundle
    verify_bundle(signed, operator_key=home.operator_key)
    if bundle.site != home.site:
        raise EnrolmentInvalid(f"expected a bundle for site {home.site}, got one for {bundle.site}")
    certificate = _parse_certificate(bundle.certificate)
    authority = _parse_certificate(bundle.authority)
    known = authority_path(home)
    if known.is_file() and known.read_text() != bundle.authority:
        raise CertificateInvalid(f"{known}: expected this authority, got a bundle of another")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CertificateInvalid("expected a certificate of the bundle's authority, got another") from error
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise CertificateInvalid("expected a certificate of a P-384 key, got another kind")
    if key_sha256(public) != key_sha256(load_ec_key(tls_key_path(home)).public_key()):
        _take_next_keys(home, key_sha256(public))
    write_atomic(known, bundle.authority.encode())
    write_atomic(certificate_path(home), bundle.certificate.encode())
    value = {"consortium": bundle.consortium, "address": bundle.address, "issued_s": bundle.issued_s}
    write_atomic(home.directory / "enrolment.json", (json.dumps(value, indent=2) + "\n").encode())
    return read_enrolled(home)


def verify_operator(signed: SignedBundle, *, fingerprint_read_out: str) -> None:
    """Raise FingerprintMismatch unless the bundle's operator key is the one the operator read out."""
    verify_fingerprint(fingerprint_read_out, fingerprint(signed.bundle.operator_key), what="operator key")


def read_enrolled(home: SiteHome) -> Enrolled:
    """Read what was installed; raises SiteNotEnrolled."""
    path = home.directory / "enrolment.json"
    try:
        value = json.loads(path.read_text())
        consortium, address = str(value["consortium"]), str(value["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SiteNotEnrolled(
            f"{path}: expected the operator's bundle installed, got none; `fedrad-site enrol --bundle FILE`"
        ) from error
    certificate = _parse_certificate(certificate_path(home).read_text())
    return Enrolled(consortium, address, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def site_request(
    home: SiteHome,
    ask: Ask,
    *,
    argument: str = "",
    now: datetime,
    nonce: str,
    key: SigningKey | None = None,
) -> SignedSiteRequest:
    """Sign one question to the server, with `key` or the message key; `nonce` is 32 hex digits."""
    request = SiteRequest(
        site=home.site, ask=ask, argument=argument, time_s=int(now.timestamp()), nonce=nonce
    )
    return sign_site_request(request, key or home.message_key())


def renewal_request(home: SiteHome, *, now: datetime, nonce: str) -> SignedSiteRequest:
    """Ask for the next certificate of the present TLS key."""
    csr = make_csr(home.site, load_ec_key(tls_key_path(home)))
    return site_request(home, Ask.RENEW, argument=csr, now=now, nonce=nonce)


def rotation_answer_request(home: SiteHome, *, now: datetime, nonce: str) -> SignedSiteRequest | None:
    """Ask, with the keys that wait in `next/`, for their certificate; None where none wait.

    The server refuses it until the operator has taken the new keys for the old.
    """
    coming = home.directory / "next"
    if not (coming / "tls.key").is_file():
        return None
    changed = (coming / "message.key").is_file()
    key = load_key(coming / "message.key") if changed else home.message_key()
    csr = make_csr(home.site, load_ec_key(coming / "tls.key"))
    return site_request(home, Ask.RENEW, argument=csr, now=now, nonce=nonce, key=key)


def load_ec_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a P-384 key, PKCS#8 or OpenSSH PEM, of mode 0600; raises KeyFileInvalid."""
    try:
        verify_private(path)
        data = path.read_bytes()
        load = load_ssh_private_key if b"OPENSSH" in data[:64] else load_pem_private_key
        key = load(data, password=None)
    except OSError as error:
        raise KeyFileInvalid(f"{path}: expected a private key, got {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise KeyFileInvalid(f"{path}: expected an unencrypted P-384 key, got something else") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileInvalid(f"{path}: expected a P-384 key, got another kind")
    return key


# --- inside -----------------------------------------------------------------------------------------------


def _present(home: SiteHome) -> PresentKeys:
    message = home.message_key()
    body = Enrolment(
        site=home.site,
        message_key=message.public,
        witness_key=home.witness_key().public,
        tls_fingerprint=key_sha256(load_ec_key(tls_key_path(home)).public_key()),
        node_fingerprint=key_sha256(load_ec_key(node_key_path(home)).public_key()),
    )
    return PresentKeys(message, body)


def _take_next_keys(home: SiteHome, tls_sha256: str) -> None:
    """Put the keys of `next/` in the place of the old ones, when the certificate is for them."""
    coming = home.directory / "next"
    path = coming / "tls.key"
    if not path.is_file() or key_sha256(load_ec_key(path).public_key()) != tls_sha256:
        raise CertificateInvalid(
            f"expected a certificate for this site's TLS key, got one for {tls_sha256[:16]}…"
        )
    for name in _KEYS:
        if (coming / name).is_file() and home.key_file(name) != home.directory / "keys" / name:
            raise KeyFileInvalid(
                f"{home.key_file(name)}: expected no systemd credential for a key that changes, got one; "
                "take it out of the unit, install the bundle, then encrypt the new key"
            )
    for name in reversed(_KEYS):  # the TLS key last: until it moves, the same bundle can be installed again
        if (coming / name).is_file():
            (coming / name).replace(home.directory / "keys" / name)
    sync_directory(home.directory / "keys")
    shutil.rmtree(coming)


def _holds(
    body: Enrolment,
    *,
    tls: ec.EllipticCurvePrivateKey,
    node: ec.EllipticCurvePrivateKey,
    message: SigningKey,
    witness: SigningKey,
) -> bool:
    mine = (
        key_sha256(tls.public_key()),
        key_sha256(node.public_key()),
        message.public,
        witness.public,
    )
    return mine == (body.tls_fingerprint, body.node_fingerprint, body.message_key, body.witness_key)


def _load_or_create_ec(path: Path, form: PrivateFormat) -> ec.EllipticCurvePrivateKey:
    """Flower's SuperNode reads keys in OpenSSH's form only."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(Encoding.PEM, form, NoEncryption())
        write_atomic(path, pem, mode=0o600)
    return load_ec_key(path)


def _parse_certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise CertificateInvalid("expected a certificate in PEM, got something else") from error


def utc_now() -> datetime:
    return datetime.now(UTC)
