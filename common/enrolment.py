"""What crosses between a site and the operator when keys are introduced: request, bundle, site request.

An enrolment request names a site's four public keys and is signed by each of them (proof of possession); its
fingerprint is what the two sides read to each other on the telephone. A bundle is the operator's answer:
certificate, authority, server address, signed by the operator. A site request is what an enrolled site asks
later (renewal, studies, approval), signed by its message key.

Guarantees: `parse_x(format_x(v)) == v` and no other byte sequence parses; `verify_x` raises. Who may be
enrolled is decided by people: nothing here trusts a request by itself.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.ec_keys import key_sha256, load_csr, load_node_key, make_csr, public_pem
from common.errors import EnrolmentInvalid, EntryInvalid, FedRadError, FingerprintMismatch
from common.identity import Purpose, SigningKey, verify_signature
from common.ledger.entries import NO_STUDY, Enrolment, Entry, KeyUse, Rotation, signed_bytes
from common.ledger.fields import build, hex64, plain, ranged, site_id, text

VERSION = 1
MAX_REQUEST_BYTES = 64 << 10
MAX_BUNDLE_BYTES = 256 << 10
_PEM = r"-----BEGIN [A-Z ]{1,40}-----\n[A-Za-z0-9+/=\n]{1,16000}-----END [A-Z ]{1,40}-----\n"
_SIGNATURE = r"[0-9a-f]{128}"
_ADDRESS = r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9a-f:]{2,45}\]):[0-9]{1,5}"
_CONSORTIUM = r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?"
_SOFTWARE = r"[a-z][a-z0-9-]{0,39} [0-9A-Za-z][0-9A-Za-z.+-]{0,39}"
_MAX_TIME_S = 1 << 40


@dataclass(frozen=True, kw_only=True)
class SiteKeySet:
    """A site's public keys: TLS (as a signing request), Flower node, messages, witness."""

    site: str = site_id()
    csr: str = text(_PEM)
    node_key: str = text(_PEM)
    message_key: str = hex64()
    witness_key: str = hex64()
    software: str = text(_SOFTWARE)
    time_s: int = ranged(0, _MAX_TIME_S)


@dataclass(frozen=True, kw_only=True)
class SignedRotation:
    """A key that follows another, signed as the ledger's rotation entry by the message key of before."""

    use: KeyUse
    old: str = hex64()
    new: str = hex64()
    signature: str = text(_SIGNATURE)

    def body(self, site: str) -> Rotation:
        return Rotation(holder=site, use=self.use, old=self.old, new=self.new)


@dataclass(frozen=True, kw_only=True)
class EnrolmentRequest:
    """A key set with a signature by each key.

    `entry` is the site's signature of the ledger's enrolment entry, so that operator and site both sign it;
    `rotations`, of a site that is enrolled, name each key that changes, signed by the message key it had.
    """

    keys: SiteKeySet
    message: str = text(_SIGNATURE)
    witness: str = text(_SIGNATURE)
    node: str = text(r"[A-Za-z0-9+/=]{64,200}")
    entry: str = text(_SIGNATURE)
    rotations: tuple[SignedRotation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What the operator hands a site: its certificate, whom to trust, and where the server is."""

    consortium: str = text(_CONSORTIUM)
    site: str = site_id()
    address: str = text(_ADDRESS)
    authority: str = text(_PEM)
    certificate: str = text(_PEM)
    operator_key: str = hex64()
    issued_s: int = ranged(0, _MAX_TIME_S)


@dataclass(frozen=True, kw_only=True)
class SignedBundle:
    bundle: Bundle
    signature: str = text(_SIGNATURE)


class Ask(StrEnum):
    """What an enrolled site may ask of the server."""

    RENEW = "renew"
    STUDIES = "studies"
    APPROVAL = "approval"


@dataclass(frozen=True, kw_only=True)
class SiteRequest:
    """One signed question of an enrolled site; `argument` depends on `ask`.

    renew: a certificate signing request; studies: empty; approval: `SHA256 SIGNATURE`, or `SHA256 -` to
    withdraw.
    """

    site: str = site_id()
    ask: Ask
    argument: str = text(r"[0-9A-Za-z+/=\n -]{0,16000}")
    time_s: int = ranged(0, _MAX_TIME_S)
    nonce: str = text(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class SignedSiteRequest:
    request: SiteRequest
    signature: str = text(_SIGNATURE)


@dataclass(frozen=True)
class PresentKeys:
    """What an enrolled site holds when it rotates: its message key and the hashes in the ledger."""

    message: SigningKey
    enrolled: Enrolment


# --- making -----------------------------------------------------------------------------------------------


def make_request(
    *,
    site: str,
    tls: ec.EllipticCurvePrivateKey,
    node: ec.EllipticCurvePrivateKey,
    message: SigningKey,
    witness: SigningKey,
    software: str,
    time_s: int,
    before: PresentKeys | None = None,
) -> EnrolmentRequest:
    """Name and sign a site's keys; `before` are those of a site that is enrolled already."""
    keys = SiteKeySet(
        site=site,
        csr=make_csr(site, tls),
        node_key=public_pem(node.public_key()),
        message_key=message.public,
        witness_key=witness.public,
        software=software,
        time_s=time_s,
    )
    covered = _covered(keys)
    request = EnrolmentRequest(
        keys=keys,
        message=message.sign(Purpose.ENROLMENT, covered).hex(),
        witness=witness.sign(Purpose.ENROLMENT, covered).hex(),
        node=base64.b64encode(node.sign(covered, ec.ECDSA(hashes.SHA384()))).decode(),
        entry=message.sign(Purpose.ENTRY, signed_bytes(Entry(0, NO_STUDY, enrolment_body(keys)))).hex(),
        rotations=_rotations(enrolment_body(keys), before) if before else (),
    )
    return parse_request(format_request(request))


def sign_bundle(bundle: Bundle, operator: SigningKey) -> SignedBundle:
    signature = operator.sign(Purpose.ENROLMENT, canonical_json(plain(bundle))).hex()
    return SignedBundle(bundle=bundle, signature=signature)


def sign_site_request(request: SiteRequest, key: SigningKey) -> SignedSiteRequest:
    signature = key.sign(Purpose.SITE_REQUEST, canonical_json(plain(request))).hex()
    return SignedSiteRequest(request=request, signature=signature)


# --- checking ---------------------------------------------------------------------------------------------


def verify_request(request: EnrolmentRequest) -> None:
    """Raise EnrolmentInvalid unless every key of the request signed it, and the four are different."""
    keys = request.keys
    covered = _covered(keys)
    try:
        verify_signature(keys.message_key, Purpose.ENROLMENT, covered, bytes.fromhex(request.message))
        verify_signature(keys.witness_key, Purpose.ENROLMENT, covered, bytes.fromhex(request.witness))
        entry = Entry(0, NO_STUDY, enrolment_body(keys))
        verify_signature(keys.message_key, Purpose.ENTRY, signed_bytes(entry), bytes.fromhex(request.entry))
        node = load_node_key(keys.node_key)
        node.verify(base64.b64decode(request.node, validate=True), covered, ec.ECDSA(hashes.SHA384()))
    except (FedRadError, InvalidSignature, binascii.Error) as error:
        raise EnrolmentInvalid(
            f"site {keys.site}: expected the request signed by each of its keys, got one that is not: {error}"
        ) from error
    tls = load_csr(keys.csr, site=keys.site)
    if keys.message_key == keys.witness_key or key_sha256(tls) == key_sha256(node):
        raise EnrolmentInvalid(f"site {keys.site}: expected four different keys, got one used twice")


def verify_rotations(request: EnrolmentRequest, before: Enrolment) -> None:
    """Raise EnrolmentInvalid unless the message key of before signed exactly the keys that change."""
    site = request.keys.site
    changes = _changes(before, enrolment_body(request.keys))
    if [(r.use, r.old, r.new) for r in request.rotations] != changes:
        raise EnrolmentInvalid(
            f"site {site}: expected a rotation of {', '.join(use.value for use, _, _ in changes) or 'a key'} "
            "from the registered keys, got another; a site that lost its keys is revoked and approved anew"
        )
    for rotation in request.rotations:
        entry = Entry(0, NO_STUDY, rotation.body(site))
        try:
            verify_signature(
                before.message_key, Purpose.ENTRY, signed_bytes(entry), bytes.fromhex(rotation.signature)
            )
        except FedRadError as error:
            raise EnrolmentInvalid(
                f"site {site}: expected a rotation signed by the present message key, got none"
            ) from error


def verify_bundle(signed: SignedBundle, *, operator_key: str) -> None:
    """Raise SignatureInvalid unless this operator signed the bundle."""
    body = canonical_json(plain(signed.bundle))
    verify_signature(operator_key, Purpose.ENROLMENT, body, bytes.fromhex(signed.signature))


def verify_site_request(signed: SignedSiteRequest, *, message_key: str) -> None:
    """Raise SignatureInvalid unless the site's enrolled message key signed the request."""
    body = canonical_json(plain(signed.request))
    verify_signature(message_key, Purpose.SITE_REQUEST, body, bytes.fromhex(signed.signature))


def fingerprint_of(keys: SiteKeySet) -> str:
    """Format what both sides read to each other: 8 groups of 4 hex digits over site and public keys."""
    digest = sha256_hex(_covered(keys))[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def verify_fingerprint(expected: str, got: str, *, what: str) -> None:
    """Raise FingerprintMismatch unless the two agree, spaces and case aside."""

    def bare(value: str) -> str:
        return re.sub(r"[\s:-]", "", value).lower()

    if bare(expected) != bare(got):
        raise FingerprintMismatch(
            f"{what}: expected the fingerprint read out on the telephone, {expected!r}, got {got!r}; "
            "do not go on: someone may have changed the file on its way"
        )


def enrolment_body(keys: SiteKeySet) -> Enrolment:
    """Return the ledger's entry of these keys."""
    return Enrolment(
        site=keys.site,
        message_key=keys.message_key,
        witness_key=keys.witness_key,
        tls_fingerprint=key_sha256(load_csr(keys.csr, site=keys.site)),
        node_fingerprint=key_sha256(load_node_key(keys.node_key)),
    )


# --- encoding ---------------------------------------------------------------------------------------------

T = TypeVar("T")


def format_request(request: EnrolmentRequest) -> bytes:
    return _format("enrolment-request", request)


def parse_request(data: bytes) -> EnrolmentRequest:
    """Parse an enrolment request; raises EnrolmentInvalid. No signature is verified."""
    return _parse("enrolment-request", EnrolmentRequest, data, MAX_REQUEST_BYTES)


def format_bundle(bundle: SignedBundle) -> bytes:
    return _format("enrolment-bundle", bundle)


def parse_bundle(data: bytes) -> SignedBundle:
    """Parse an enrolment bundle; raises EnrolmentInvalid. No signature is verified."""
    return _parse("enrolment-bundle", SignedBundle, data, MAX_BUNDLE_BYTES)


def format_site_request(request: SignedSiteRequest) -> bytes:
    return _format("site-request", request)


def parse_site_request(data: bytes) -> SignedSiteRequest:
    """Parse a site request; raises EnrolmentInvalid. No signature is verified."""
    return _parse("site-request", SignedSiteRequest, data, MAX_REQUEST_BYTES)


def _format(kind: str, value: Any) -> bytes:
    return canonical_json({"fedrad": kind, "v": VERSION, "value": plain(value)}) + b"\n"


def _parse(kind: str, annotation: Callable[..., T], data: bytes, limit: int) -> T:
    try:
        value = parse_canonical(data.removesuffix(b"\n"), max_bytes=limit)
        if not isinstance(value, dict) or value.keys() != {"fedrad", "v", "value"}:
            raise EntryInvalid("expected fedrad, v and value")
        if value["fedrad"] != kind or value["v"] != VERSION:
            raise EntryInvalid(f"expected {kind} of version {VERSION}, got {str(value['fedrad'])[:40]!r}")
        parsed: T = build(annotation, value["value"], kind)
    except FedRadError as error:
        raise EnrolmentInvalid(f"{kind}: {error}") from error
    return parsed


def _changes(before: Enrolment, after: Enrolment) -> list[tuple[KeyUse, str, str]]:
    """List what changes, the message key last: it signs the others."""
    pairs = [
        (KeyUse.TLS, before.tls_fingerprint, after.tls_fingerprint),
        (KeyUse.NODE, before.node_fingerprint, after.node_fingerprint),
        (KeyUse.WITNESS, before.witness_key, after.witness_key),
        (KeyUse.MESSAGE, before.message_key, after.message_key),
    ]
    return [change for change in pairs if change[1] != change[2]]


def _rotations(after: Enrolment, present: PresentKeys) -> tuple[SignedRotation, ...]:
    signed = []
    for use, old, new in _changes(present.enrolled, after):
        body = Rotation(holder=after.site, use=use, old=old, new=new)
        value = present.message.sign(Purpose.ENTRY, signed_bytes(Entry(0, NO_STUDY, body))).hex()
        signed.append(SignedRotation(use=use, old=old, new=new, signature=value))
    return tuple(signed)


def _covered(keys: SiteKeySet) -> bytes:
    return canonical_json(plain(keys))
