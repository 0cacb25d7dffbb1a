"""Enrolment's formats: what parses, what is signed, what a telephone call can tell apart."""

from __future__ import annotations

import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.canonical import canonical_json
from common.ec_keys import load_csr, load_node_key, make_csr, public_pem
from common.enrolment import (
    Ask,
    Bundle,
    EnrolmentRequest,
    PresentKeys,
    SiteRequest,
    enrolment_body,
    fingerprint_of,
    format_bundle,
    format_request,
    format_site_request,
    make_request,
    parse_bundle,
    parse_request,
    parse_site_request,
    sign_bundle,
    sign_site_request,
    verify_bundle,
    verify_fingerprint,
    verify_request,
    verify_rotations,
    verify_site_request,
)
from common.errors import EnrolmentInvalid, FingerprintMismatch, SignatureInvalid
from common.identity import SigningKey


def new_tls() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@dataclasses.dataclass
class Keys:
    tls: ec.EllipticCurvePrivateKey = dataclasses.field(default_factory=new_tls)
    node: ec.EllipticCurvePrivateKey = dataclasses.field(default_factory=new_tls)
    message: SigningKey = dataclasses.field(default_factory=SigningKey.generate)
    witness: SigningKey = dataclasses.field(default_factory=SigningKey.generate)

    def request(self, site: str = "north", before: PresentKeys | None = None) -> EnrolmentRequest:
        return make_request(
            site=site,
            tls=self.tls,
            node=self.node,
            message=self.message,
            witness=self.witness,
            software="fedrad 0.1.0",
            time_s=1_800_000_000,
            before=before,
        )


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys()


def test_a_request_is_the_same_after_encoding_and_is_accepted(keys: Keys) -> None:
    request = keys.request()
    assert parse_request(format_request(request)) == request
    verify_request(request)


@pytest.mark.parametrize("part", ["message", "witness", "entry"])
def test_a_request_that_one_key_did_not_sign_is_refused(keys: Keys, part: str) -> None:
    request = keys.request()
    value = getattr(request, part)
    forged = dataclasses.replace(request, **{part: ("0" if value[0] != "0" else "1") + value[1:]})
    with pytest.raises(EnrolmentInvalid, match="signed by each"):
        verify_request(forged)


def test_a_request_without_possession_of_the_node_key_is_refused(keys: Keys) -> None:
    stolen = public_pem(new_tls().public_key())
    request = keys.request()
    forged = dataclasses.replace(request, keys=dataclasses.replace(request.keys, node_key=stolen))
    with pytest.raises(EnrolmentInvalid, match="signed by each"):
        verify_request(forged)


def test_a_signing_request_for_another_name_is_refused(keys: Keys) -> None:
    with pytest.raises(EnrolmentInvalid, match="CN=north"):
        load_csr(make_csr("south", keys.tls), site="north")


def test_a_signing_request_of_another_curve_is_refused() -> None:
    weak = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(EnrolmentInvalid, match="P-384"):
        load_csr(make_csr("north", weak), site="north")
    with pytest.raises(EnrolmentInvalid, match="P-384"):
        load_node_key(public_pem(weak.public_key()))


def test_one_key_for_two_uses_is_refused(keys: Keys) -> None:
    twice = Keys(tls=keys.tls, node=keys.tls, message=keys.message, witness=keys.witness)
    with pytest.raises(EnrolmentInvalid, match="four different keys"):
        verify_request(twice.request())


def test_every_changed_key_changes_the_fingerprint(keys: Keys) -> None:
    prints = {fingerprint_of(keys.request().keys)}
    for name, new in (
        ("tls", new_tls()),
        ("node", new_tls()),
        ("message", SigningKey.generate()),
        ("witness", SigningKey.generate()),
    ):
        other = Keys(**{**vars(keys), name: new})
        prints.add(fingerprint_of(other.request().keys))
    prints.add(fingerprint_of(keys.request(site="south").keys))
    assert len(prints) == 6
    assert all(len(p.split(" ")) == 8 for p in prints)


def test_a_fingerprint_is_compared_without_spaces_and_case() -> None:
    verify_fingerprint("ABCD 1234", "abcd1234", what="x")
    with pytest.raises(FingerprintMismatch, match="telephone"):
        verify_fingerprint("abcd 1235", "abcd1234", what="x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: {**v, "more": 1},
        lambda v: {**v, "v": 2},
        lambda v: {**v, "fedrad": "enrolment-bundle"},
        lambda v: {**v, "value": {**v["value"], "node": 1}},
        lambda v: {**v, "value": {k: x for k, x in v["value"].items() if k != "entry"}},
    ],
)
def test_anything_but_a_request_is_refused(keys: Keys, damage: object) -> None:
    value = json.loads(format_request(keys.request()))
    with pytest.raises(EnrolmentInvalid):
        parse_request(canonical_json(damage(value)))  # type: ignore[operator]


def test_too_long_a_request_is_refused() -> None:
    with pytest.raises(EnrolmentInvalid, match="at most"):
        parse_request(b"[" + b" " * 70_000 + b"]")


def test_a_rotation_is_signed_by_the_present_message_key(keys: Keys) -> None:
    enrolled = enrolment_body(keys.request().keys)
    new = Keys(message=keys.message, witness=keys.witness)
    request = new.request(before=PresentKeys(keys.message, enrolled))
    assert [r.use.value for r in request.rotations] == ["tls", "node"]
    verify_rotations(parse_request(format_request(request)), enrolled)
    everything = Keys().request(before=PresentKeys(keys.message, enrolled))
    assert [r.use.value for r in everything.rotations] == ["tls", "node", "witness", "message"]
    verify_rotations(everything, enrolled)


def test_a_rotation_by_somebody_else_is_refused(keys: Keys) -> None:
    enrolled = enrolment_body(keys.request().keys)
    thief = Keys()
    request = thief.request(before=PresentKeys(thief.message, enrolled))
    with pytest.raises(EnrolmentInvalid, match="present message key"):
        verify_rotations(request, enrolled)
    with pytest.raises(EnrolmentInvalid, match="from the registered keys"):
        verify_rotations(thief.request(), enrolled)


def test_a_bundle_counts_only_from_the_operator(keys: Keys) -> None:
    operator = SigningKey.generate()
    bundle = Bundle(
        consortium="lab",
        site="north",
        address="server.example:8443",
        authority=public_pem(keys.tls.public_key()),
        certificate=public_pem(keys.node.public_key()),
        operator_key=operator.public,
        issued_s=1,
    )
    signed = sign_bundle(bundle, operator)
    assert parse_bundle(format_bundle(signed)) == signed
    verify_bundle(signed, operator_key=operator.public)
    with pytest.raises(SignatureInvalid):
        verify_bundle(signed, operator_key=keys.message.public)
    moved = dataclasses.replace(signed, bundle=dataclasses.replace(bundle, address="evil.example:8443"))
    with pytest.raises(SignatureInvalid):
        verify_bundle(moved, operator_key=operator.public)


def test_a_site_request_counts_only_with_the_sites_key(keys: Keys) -> None:
    request = SiteRequest(
        site="north", ask=Ask.RENEW, argument=make_csr("north", keys.tls), time_s=5, nonce="ab" * 16
    )
    signed = sign_site_request(request, keys.message)
    assert parse_site_request(format_site_request(signed)) == signed
    verify_site_request(signed, message_key=keys.message.public)
    with pytest.raises(SignatureInvalid):
        verify_site_request(signed, message_key=keys.witness.public)
    other = dataclasses.replace(signed, request=dataclasses.replace(request, site="south"))
    with pytest.raises(SignatureInvalid):
        verify_site_request(other, message_key=keys.message.public)
