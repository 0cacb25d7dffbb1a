"""The registry of sites: approve, renew, rotate, revoke; one file per site, every step in the ledger.

Guarantees: a site enters only with the fingerprint that a person compared; the ledger's entry is durable
before the registry changes; one site's file is written without touching another's; a revoked site gets no
certificate any more and is in the revocation list. A certificate is renewed for the registered TLS key only,
so a stolen message key alone moves nothing to another machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from common.certificates import Authority
from common.ec_keys import key_sha256, load_csr, load_node_key
from common.enrolment import (
    Bundle,
    EnrolmentRequest,
    SignedBundle,
    enrolment_body,
    fingerprint_of,
    sign_bundle,
    verify_fingerprint,
    verify_request,
    verify_rotations,
)
from common.errors import CertificateInvalid, EnrolmentInvalid, EntryInvalid, SiteNotEnrolled, SiteRevoked
from common.files import write_atomic
from common.ledger.entries import (
    NO_STUDY,
    OPERATOR,
    Body,
    Enrolment,
    Entry,
    EntrySignature,
    KeyUse,
    Revocation,
    RevocationReason,
)
from common.ledger.fields import build, hex64, plain, ranged, site_id, text
from common.ledger.statements import sign_entry, verify_entry_signature
from server.consortium import ServerHome
from server.log import Log

_MAX_TIME_S = 1 << 40
_MAX_LIVING = 60


class SiteState(StrEnum):
    APPROVED = "approved"
    REVOKED = "revoked"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate that was issued: serial number (hex), end, and when it was revoked (0: not)."""

    serial: str = text(r"[0-9a-f]{1,40}")
    not_after_s: int = ranged(0, _MAX_TIME_S)
    revoked_s: int = ranged(0, _MAX_TIME_S)


@dataclass(frozen=True, kw_only=True)
class RegisteredSite:
    """One site as the operator knows it; hashes are of SubjectPublicKeyInfo."""

    site: str = site_id()
    state: SiteState
    message_key: str = hex64()
    witness_key: str = hex64()
    tls_sha256: str = hex64()
    node_key: str = text(r"-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]{1,400}-----END PUBLIC KEY-----\n")
    certificates: tuple[Issued, ...]
    approved_s: int = ranged(0, _MAX_TIME_S)
    revoked_s: int = ranged(0, _MAX_TIME_S)
    reason: str = text(r"[a-z]{0,20}")

    @property
    def node_sha256(self) -> str:
        return key_sha256(load_node_key(self.node_key))

    @property
    def enrolled(self) -> Enrolment:
        """The ledger's view of the present keys."""
        return Enrolment(
            site=self.site,
            message_key=self.message_key,
            witness_key=self.witness_key,
            tls_fingerprint=self.tls_sha256,
            node_fingerprint=self.node_sha256,
        )

    @property
    def not_after_s(self) -> int:
        """When the newest certificate that counts ends; 0 when there is none."""
        return max((c.not_after_s for c in self.certificates if not c.revoked_s), default=0)


def read_site(home: ServerHome, site: str) -> RegisteredSite:
    """Read a site of the registry; raises SiteNotEnrolled."""
    path = home.sites / f"{site}.json"
    try:
        value = json.loads(path.read_text())
        found: RegisteredSite = build(RegisteredSite, value, str(path))
    except (OSError, ValueError, EntryInvalid) as error:
        raise SiteNotEnrolled(
            f"expected a site of this consortium, got {site!r}; `fedrad-server site list` shows them"
        ) from error
    return found


def read_sites(home: ServerHome) -> dict[str, RegisteredSite]:
    """Read the registry, revoked sites too."""
    if not home.sites.is_dir():
        return {}
    names = sorted(path.stem for path in home.sites.glob("*.json"))
    return {name: read_site(home, name) for name in names}


def approved_site(home: ServerHome, site: str) -> RegisteredSite:
    """Read a site that takes part; raises SiteNotEnrolled or SiteRevoked."""
    found = read_site(home, site)
    if found.state is not SiteState.APPROVED:
        raise SiteRevoked(f"site {site}: expected an approved site, got a revoked one ({found.reason})")
    return found


def approve(
    home: ServerHome,
    authority: Authority,
    request: EnrolmentRequest,
    *,
    fingerprint: str,
    now: datetime,
) -> SignedBundle:
    """Enter a new or formerly revoked site; raises FingerprintMismatch, EnrolmentInvalid."""
    verify_request(request)
    keys = request.keys
    verify_fingerprint(fingerprint, fingerprint_of(keys), what=f"site {keys.site}")
    with _registry(home):
        _verify_keys_free(home, request)
        path = home.sites / f"{keys.site}.json"
        before = read_site(home, keys.site) if path.exists() else None
        if before is not None and before.state is SiteState.APPROVED:
            if _same_keys(before, request):
                return _bundle(home, authority, before, request.keys.csr, now)
            raise EnrolmentInvalid(
                f"site {keys.site}: expected a site that is not enrolled, got one with other keys; "
                "use `fedrad-server site rotate`, or revoke it first"
            )
        body = enrolment_body(keys)
        if before is not None and _keys_of(before) & _keys_of_body(body):
            raise EnrolmentInvalid(
                f"site {keys.site}: expected new keys after the revocation, got one that was revoked; "
                "the site makes them with `fedrad-site enrol --new-keys`"
            )
        _log(home, [body], now, site_signature=EntrySignature(keys.site, keys.message_key, request.entry))
        entered = RegisteredSite(
            site=keys.site,
            state=SiteState.APPROVED,
            message_key=keys.message_key,
            witness_key=keys.witness_key,
            tls_sha256=body.tls_fingerprint,
            node_key=keys.node_key,
            certificates=before.certificates if before else (),
            approved_s=_seconds(now),
            revoked_s=0,
            reason="",
        )
        return _bundle(home, authority, entered, keys.csr, now)


def rotate(
    home: ServerHome,
    authority: Authority,
    request: EnrolmentRequest,
    *,
    fingerprint: str,
    now: datetime,
) -> SignedBundle:
    """Take a site's new keys for its old; the request is signed by the old message key too.

    Certificates of the old TLS key are revoked. Raises FingerprintMismatch, EnrolmentInvalid, SiteRevoked.
    """
    verify_request(request)
    keys = request.keys
    verify_fingerprint(fingerprint, fingerprint_of(keys), what=f"site {keys.site}")
    with _registry(home):
        before = approved_site(home, keys.site)
        verify_rotations(request, before.enrolled)
        _verify_keys_free(home, request)
        body = enrolment_body(keys)
        for rotation in request.rotations:
            signature = EntrySignature(keys.site, before.message_key, rotation.signature)
            _log(home, [rotation.body(keys.site)], now, site_signature=signature)
        certificates = before.certificates
        if before.tls_sha256 != body.tls_fingerprint:
            certificates = _revoked(certificates, now)
        after = replace(
            before,
            message_key=keys.message_key,
            witness_key=keys.witness_key,
            tls_sha256=body.tls_fingerprint,
            node_key=keys.node_key,
            certificates=certificates,
        )
        bundle = _bundle(home, authority, after, keys.csr, now)
        _write_crl(home, authority, now)
        return bundle


def renew(home: ServerHome, authority: Authority, site: str, csr: str, *, now: datetime) -> SignedBundle:
    """Issue the next certificate for a site's registered TLS key; raises SiteRevoked, CertificateInvalid."""
    with _registry(home):
        found = approved_site(home, site)
        if key_sha256(load_csr(csr, site=site)) != found.tls_sha256:
            raise EnrolmentInvalid(
                f"site {site}: expected a request by the registered TLS key, got another; "
                "a new key is a rotation"
            )
        grace = timedelta(days=home.policy.renewal_grace_days)
        if _seconds(now - grace) > found.not_after_s:
            raise CertificateInvalid(
                f"site {site}: expected a certificate that ended at most {home.policy.renewal_grace_days:g} "
                "days ago, got an older one; approve the site anew"
            )
        return _bundle(home, authority, found, csr, now)


def revoke(
    home: ServerHome, authority: Authority, site: str, *, reason: RevocationReason, now: datetime
) -> RegisteredSite:
    """End a site's part: all keys revoked in the ledger, all certificates in the revocation list."""
    with _registry(home):
        before = read_site(home, site)
        if before.state is SiteState.REVOKED:
            _write_crl(home, authority, now)
            return before
        uses = {
            KeyUse.MESSAGE: before.message_key,
            KeyUse.WITNESS: before.witness_key,
            KeyUse.TLS: before.tls_sha256,
            KeyUse.NODE: before.node_sha256,
        }
        _log(
            home, [Revocation(holder=site, use=use, key=key, reason=reason) for use, key in uses.items()], now
        )
        after = replace(
            before,
            state=SiteState.REVOKED,
            certificates=_revoked(before.certificates, now),
            revoked_s=_seconds(now),
            reason=reason.value,
        )
        _write(home, after)
        _write_crl(home, authority, now)
        return after


def refresh_crl(home: ServerHome, authority: Authority, *, now: datetime) -> None:
    """Sign the revocation list anew, so that it does not run out."""
    with _registry(home):
        _write_crl(home, authority, now)


# --- inside -----------------------------------------------------------------------------------------------


def _bundle(
    home: ServerHome, authority: Authority, site: RegisteredSite, csr: str, now: datetime
) -> SignedBundle:
    """Issue a certificate, enter it in the registry, and sign what the site receives.

    Raises CertificateInvalid where too many count already: each must fit on the revocation list.
    """
    kept = tuple(c for c in site.certificates if c.not_after_s >= _seconds(now - timedelta(days=1)))
    if len(kept) >= _MAX_LIVING:
        raise CertificateInvalid(
            f"site {site.site}: expected fewer than {_MAX_LIVING} certificates that have not ended, "
            f"got {len(kept)}; does something renew in a loop?"
        )
    certificate = authority.issue_site(
        site.site, load_csr(csr, site=site.site), now=now, lifetime=home.policy.lifetime
    )
    issued = Issued(
        serial=f"{certificate.serial_number:x}",
        not_after_s=_seconds(certificate.not_valid_after_utc),
        revoked_s=0,
    )
    last = max(site.certificates, key=lambda c: c.not_after_s, default=None)
    if last is not None and last not in kept:
        kept = (last, *kept)
    _write(home, replace(site, certificates=(*kept, issued)))
    bundle = Bundle(
        consortium=home.consortium,
        site=site.site,
        address=home.address,
        authority=authority.pem,
        certificate=certificate.public_bytes(Encoding.PEM).decode(),
        operator_key=home.message_key().public,
        issued_s=_seconds(now),
    )
    return sign_bundle(bundle, home.message_key())


def _verify_keys_free(home: ServerHome, request: EnrolmentRequest) -> None:
    """Raise EnrolmentInvalid when another site of the registry holds one of these keys."""
    site, mine = request.keys.site, _keys_of_body(enrolment_body(request.keys))
    for name, other in read_sites(home).items():
        if name != site and _keys_of(other) & mine:
            raise EnrolmentInvalid(f"site {site}: expected keys of its own, got one of site {name}")


def _keys_of(site: RegisteredSite) -> set[str]:
    return _keys_of_body(site.enrolled)


def _keys_of_body(body: Enrolment) -> set[str]:
    return {body.message_key, body.witness_key, body.tls_fingerprint, body.node_fingerprint}


def _same_keys(site: RegisteredSite, request: EnrolmentRequest) -> bool:
    body = enrolment_body(request.keys)
    mine = (site.message_key, site.witness_key, site.tls_sha256, site.node_key)
    theirs = (body.message_key, body.witness_key, body.tls_fingerprint, request.keys.node_key)
    return mine == theirs


def _revoked(certificates: tuple[Issued, ...], now: datetime) -> tuple[Issued, ...]:
    return tuple(one if one.revoked_s else replace(one, revoked_s=_seconds(now)) for one in certificates)


def _write_crl(home: ServerHome, authority: Authority, now: datetime) -> None:
    serials = [
        (int(one.serial, 16), datetime.fromtimestamp(one.revoked_s, UTC))
        for site in read_sites(home).values()
        for one in site.certificates
        if one.revoked_s
    ]
    write_atomic(home.crl, authority.revoke(serials, now=now))


def _write(home: ServerHome, site: RegisteredSite) -> None:
    home.sites.mkdir(exist_ok=True, mode=0o700)
    data: dict[str, Any] = plain(site)
    write_atomic(home.sites / f"{site.site}.json", (json.dumps(data, indent=2) + "\n").encode(), mode=0o600)


def _log(
    home: ServerHome,
    bodies: list[Body],
    now: datetime,
    *,
    site_signature: EntrySignature | None = None,
) -> None:
    """Append entries signed by the operator (and the site, where it signed) under a new checkpoint."""
    if not bodies:
        return
    operator = home.message_key()
    with Log(home.ledger, origin=home.log_origin, private_key=operator.private) as book:
        time_s = max(_seconds(now), book.last_time_s)
        entries = []
        for body in bodies:
            entry = sign_entry(Entry(time_s, NO_STUDY, body), signer=OPERATOR, key=operator)
            if site_signature is not None:
                verify_entry_signature(entry, site_signature)
                entry = replace(entry, signatures=(*entry.signatures, site_signature))
            entries.append(entry)
        book.append(entries)
        book.checkpoint()


@contextlib.contextmanager
def _registry(home: ServerHome) -> Iterator[None]:
    """Hold the registry: commands and the running server change it one at a time."""
    path: Path = home.directory / ".registry.lock"
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _seconds(when: datetime) -> int:
    return int(when.timestamp())
