"""A site's side of enrolment: its keys, its request, the operator's bundle, renewal and rotation.

Below the site's directory (client/home.py):

    keys/tls.key  keys/node.key    P-384 (0600): TLS client and Flower node
    enrolment.json                 consortium, server address, when the certificate was issued
    tls/certificate.pem authority.pem
    tls/room                       what the next bundle takes on the disk, laid by before it is asked for
    next/                          keys of a rotation that the operator has not answered yet; with
                                   enrolment.json the whole answer, which `finish_rotation` puts in its place

Guarantees: private keys are made here and never leave; a bundle is installed only when it is for this site
and these keys and signed by the operator whose key this site holds; new keys and their certificate are taken
up together, after a kill or a power cut at the next occasion. It talks to nobody: `deploy/site` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
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
_ROOM_BYTES = 64 << 10  # a bundle's three files, the longest that it may hold


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
    finish_rotation(home)
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
    witness keys and refuse a site that changed them. Raises KeyFileInvalid for a key that could not change
    here: the operator's answer ends the old ones.
    """
    finish_rotation(home)
    read_enrolled(home)
    coming = home.directory / "next"
    _verify_replaceable(home, _KEYS if message_keys else _KEYS[:2])
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
    with contextlib.suppress(KeyFileInvalid):
        finish_rotation(home)
    keys = home.directory / "keys"
    if not keys.is_dir():
        return None
    shutil.rmtree(home.directory / "next", ignore_errors=True)
    aside = home.directory / f"keys-until-{now:%Y%m%dT%H%M%S}"
    keys.rename(aside)
    for path in (home.directory / "enrolment.json", home.directory / REQUEST_NAME):
        path.unlink(missing_ok=True)
    return aside


def install_bundle(home: SiteHome, signed: SignedBundle) -> Enrolled:
    """Install the operator's bundle, first or renewed; the keys of a rotation take their place with it.

    Raises SignatureInvalid, EnrolmentInvalid for another site's, CertificateInvalid for other keys or another
    authority than the site has, KeyFileInvalid for a key that cannot change here, OSError on a full disk.
    """
    finish_rotation(home)
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
    sha256 = _key_of(certificate)
    rotates = sha256 != key_sha256(load_ec_key(tls_key_path(home)).public_key())
    if rotates:
        _verify_next_keys(home, sha256)
    value = {"consortium": bundle.consortium, "address": bundle.address, "issued_s": bundle.issued_s}
    files = {
        "authority.pem": bundle.authority.encode(),
        "certificate.pem": bundle.certificate.encode(),
        "enrolment.json": (json.dumps(value, indent=2) + "\n").encode(),
    }
    places = _places(home)
    _room_path(home).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomic(home.directory / "next" / name if rotates else places[name], data)
    if rotates:
        finish_rotation(home)
    return read_enrolled(home)


def finish_rotation(home: SiteHome) -> None:
    """Put keys and certificate of an answered rotation in the place of the old ones, by renames alone.

    The answer counts once `enrolment.json` is in `next/`, the last to come and the last to go: what a kill or
    an OSError leaves is done when this is called again. Does nothing where no answer waits.
    """
    coming = home.directory / "next"
    if not (coming / "enrolment.json").is_file():
        return
    _verify_replaceable(home, _waiting(home))
    for name, place in _places(home).items():
        if name == "enrolment.json":
            sync_directory(home.directory / "keys")
            sync_directory(home.directory / "tls")
        if (coming / name).is_file():
            (coming / name).replace(place)
    sync_directory(home.directory)
    with contextlib.suppress(OSError):  # what a kill left of a file half-written
        for path in coming.glob(".*.partial"):
            path.unlink()
        coming.rmdir()


def reserve_room(home: SiteHome) -> None:
    """Lay by what a bundle takes on the disk before the server issues one; raises OSError if it is full."""
    path = _room_path(home)
    if not path.is_file():
        write_atomic(path, os.urandom(_ROOM_BYTES))  # no file system makes this smaller


def certificate_fits_key(home: SiteHome) -> bool:
    """Tell whether the certificate is for the TLS key that is here."""
    certificate = _parse_certificate(certificate_path(home).read_text())
    return _key_of(certificate) == key_sha256(load_ec_key(tls_key_path(home)).public_key())


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

    The server refuses it until the operator has taken the new keys for the old. Raises KeyFileInvalid where
    the answer could not be installed.
    """
    coming = home.directory / "next"
    if not (coming / "tls.key").is_file():
        return None
    _verify_replaceable(home, _waiting(home))
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


def _verify_next_keys(home: SiteHome, tls_sha256: str) -> None:
    """Raise CertificateInvalid unless the certificate is for the keys of `next/`, KeyFileInvalid as below."""
    path = home.directory / "next" / "tls.key"
    if not path.is_file() or key_sha256(load_ec_key(path).public_key()) != tls_sha256:
        raise CertificateInvalid(
            f"expected a certificate for this site's TLS key, got one for {tls_sha256[:16]}…"
        )
    _verify_replaceable(home, _waiting(home))


def _verify_replaceable(home: SiteHome, names: Sequence[str]) -> None:
    """Raise KeyFileInvalid unless these keys lie in `keys/`: systemd would go on with those it holds."""
    for name in names:
        path = home.directory / "keys" / name
        if home.key_file(name) != path or not path.is_file():
            raise KeyFileInvalid(
                f"{path}: expected the key that changes here and no systemd credential for it; put it back, "
                "take it out of the unit, let the new keys be taken up, then encrypt the new one"
            )


def _waiting(home: SiteHome) -> list[str]:
    return [name for name in _KEYS if (home.directory / "next" / name).is_file()]


def _places(home: SiteHome) -> dict[str, Path]:
    """Where the files of `next/` belong, in the order in which they are moved."""
    return {
        **{name: home.directory / "keys" / name for name in _KEYS},
        "authority.pem": authority_path(home),
        "certificate.pem": certificate_path(home),
        "enrolment.json": home.directory / "enrolment.json",
    }


def _room_path(home: SiteHome) -> Path:
    return home.directory / "tls" / "room"


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


def _key_of(certificate: x509.Certificate) -> str:
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise CertificateInvalid("expected a certificate of a P-384 key, got another kind")
    return key_sha256(public)


def utc_now() -> datetime:
    return datetime.now(UTC)
