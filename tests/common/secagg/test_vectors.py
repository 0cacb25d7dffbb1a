"""The published vectors: the project's code gives them, and a second implementation reads and repeats them.

The second implementation follows docs/protocol/secagg.md and uses nothing of the project: HKDF from `hmac`,
hashes from `hashlib`, the curve, the signature, the cipher and the box from `cryptography`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common import errors
from common.secagg import messages
from tests.common.secagg.vectors import FILES, FOLDER, text

PRIME = 2**256 + 297


@pytest.mark.parametrize("name", FILES)
def test_the_code_gives_the_published_vectors(name: str) -> None:
    assert text(FILES[name]()) == (FOLDER / name).read_text()


def test_every_refused_message_is_refused_by_its_name() -> None:
    for case in json.loads((FOLDER / "refused.json").read_text()):
        parse = getattr(messages, f"parse_{case['message']}")
        with pytest.raises(getattr(errors, case["refusal"])):
            parse(bytes.fromhex(case["bytes"]))


def frame(label: str, *fields: bytes) -> bytes:
    parts = [b"fedrad/v1/secagg/" + label.encode(), *fields]
    return b"".join(len(p).to_bytes(4, "big") + p for p in parts)


def digest(label: str, *fields: bytes) -> bytes:
    return hashlib.sha256(frame(label, *fields)).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    key = hmac.digest(salt, secret, "sha256")
    out, block, counter = b"", b"", 1
    while len(out) < size:
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out, counter = out + block, counter + 1
    return out[:size]


def dh(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def stream(key: bytes, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    cipher = Cipher(algorithms.AES128(key[:16]), modes.CTR(key[16:])).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * length)), "<u4")


def interpolate(shares: dict[int, int]) -> bytes:
    total = 0
    for x, y in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        total += y * weight
    return (total % PRIME).to_bytes(32, "big")


class Vector:
    """The published round, with its messages cut into fields by hand."""

    def __init__(self) -> None:
        self.all: dict[str, Any] = json.loads((FOLDER / "round.json").read_text())
        self.sites: dict[str, Any] = self.all["sites"]
        self.names = sorted(self.sites)
        self.survivors = [s for s in self.names if "masked" in self.sites[s]]
        self.context = bytes.fromhex(self.all["context_digest"])
        self.setup = bytes.fromhex(self.all["setup_digest"])
        self.publics: dict[str, tuple[bytes, bytes, bytes, bytes]] = {}
        for name in self.names:
            body = bytes.fromhex(self.sites[name]["keys"])[6 + 32 + 8 :]
            self.publics[name] = (body[:32], body[32:64], body[64:96], body[96:])

    def secret(self, site: str, field: str) -> bytes:
        return bytes.fromhex(self.sites[site][field])


def test_digests_follow_from_the_specification() -> None:
    v = Vector()
    place = (7).to_bytes(8, "big") + (0).to_bytes(4, "big")
    sizes = (9).to_bytes(4, "big") + b"\x03"
    hashes = [bytes.fromhex(v.all[k]) for k in ("study", "configuration", "adapter")]
    terms = digest("terms", hashes[0], hashes[1], place, sizes)
    assert terms.hex() == v.all["terms_digest"]
    setup = digest("setup", terms, b"\x04", bytes.fromhex(v.all["key_set"]))
    assert setup == v.setup
    assert digest("context", setup, hashes[2], *(s.encode() for s in v.names)) == v.context
    named = digest("survivor-set", bytes.fromhex(v.all["survivor_set"]))
    assert named.hex() == v.all["survivor_set_digest"]


def test_keys_follow_from_the_seeds_and_are_signed() -> None:
    v = Vector()
    terms = bytes.fromhex(v.all["terms_digest"])
    for site in v.names:
        labels = {"mask_private": "mask-key", "share_private": "share-key", "self_seed": "self-mask"}
        for field, label in labels.items():
            info = frame(f"site-{label}", site.encode())
            assert hkdf(v.secret(site, "round_seed"), terms, info) == v.secret(site, field)
        mask, share, commitment, signature = v.publics[site]
        for private, public in (("mask_private", mask), ("share_private", share)):
            key = X25519PrivateKey.from_private_bytes(v.secret(site, private)).public_key()
            assert key.public_bytes_raw() == public
        assert digest("seed-commitment", v.secret(site, "self_seed"), terms, site.encode()) == commitment
        message = frame("sign-keys", terms, site.encode(), mask + share + commitment)
        identity = Ed25519PrivateKey.from_private_bytes(v.secret(site, "identity_seed"))
        assert identity.sign(message) == signature


def test_masked_vectors_follow_from_the_secrets() -> None:
    v = Vector()
    for site in v.survivors:
        masked = np.array(v.sites[site]["vector"], np.uint32)
        info = frame("self-mask", site.encode())
        masked += stream(hkdf(v.secret(site, "self_seed"), v.context, info), 9)
        for peer in v.names:
            if peer != site:
                low, high = sorted((site, peer))
                shared = dh(v.secret(site, "mask_private"), v.publics[peer][0])
                mask = stream(hkdf(shared, v.context, frame("pair-mask", low.encode(), high.encode())), 9)
                masked = masked + mask if site == low else masked - mask
        assert masked.tolist() == v.sites[site]["masked"]
        chunk = hashlib.sha256(masked.astype("<u4").tobytes()).digest()
        upload = digest("upload", (9).to_bytes(4, "big"), chunk)
        signature = bytes.fromhex(v.sites[site]["upload"])[6 + 32 + 8 + 32 :][:64]
        identity = Ed25519PublicKey.from_public_bytes(v.secret(site, "identity_public"))
        identity.verify(signature, frame("sign-upload", v.context, site.encode(), upload))


def open_boxes(v: Vector) -> dict[tuple[str, str], bytes]:
    """Open every dealt box with its holder's key; returns (dealer, holder) → both shares."""
    shares = {}
    for dealer in v.names:
        body = bytes.fromhex(v.sites[dealer]["shares"])[6 + 32 + 8 + 1 :]
        for at, holder in enumerate(s for s in v.names if s != dealer):
            shared = dh(v.secret(holder, "share_private"), v.publics[dealer][1])
            place = (dealer.encode(), holder.encode())
            key = hkdf(shared, v.setup, frame("box", *place))
            box = body[82 * at : 82 * at + 82]
            opened = ChaCha20Poly1305(key).decrypt(bytes(12), box, frame("box", v.setup, *place))
            shares[dealer, holder] = opened
            for kind, half, skip in (("seed", opened[:33], 0), ("key", opened[33:], 5)):
                dealt = body[82 * 4 + 32 * (skip + v.names.index(holder)) :][:32]
                assert digest("share", half, v.setup, *place, kind.encode()) == dealt
    return shares


def test_any_four_sealed_shares_rebuild_each_secret() -> None:
    v = Vector()
    shares = open_boxes(v)
    for dealer in v.names:
        points = {v.names.index(h) + 1: shares[dealer, h] for h in v.names if h != dealer}
        seed = interpolate({x: int.from_bytes(s[:33], "big") for x, s in points.items()})
        key = interpolate({x: int.from_bytes(s[33:], "big") for x, s in points.items()})
        assert seed == v.secret(dealer, "self_seed") and key == v.secret(dealer, "mask_private")


def test_reveals_open_for_their_survivor_set_and_give_the_sum() -> None:
    v = Vector()
    named = bytes.fromhex(v.all["survivor_set_digest"])
    parts: dict[str, dict[str, Any]] = {}
    for site in v.survivors:
        raw = bytes.fromhex(v.sites[site]["reveal"])
        identity = Ed25519PublicKey.from_public_bytes(v.secret(site, "identity_public"))
        identity.verify(raw[-64:], frame("sign-reveal", raw[6:-64]))
        assert raw[6:38] == v.context and raw[46:78] == named and raw[78] == 5
        sealed, rest = raw[79 : 79 + 5 * 33 + 16], raw[79 + 5 * 33 + 16 : -64]
        assert rest[0] == 4
        locks = [rest[1 + 49 * i : 50 + 49 * i] for i in range(4)]
        keys = [rest[1 + 49 * 4 + 32 * i :][:32] for i in range(4)]
        parts[site] = {"sealed": sealed, "locks": locks, "keys": keys}
    revealed: dict[str, list[bytes]] = {}
    for dealer, part in parts.items():
        mine = v.survivors.index(dealer)
        place = frame("reveal", v.context, named, dealer.encode())
        shares = {}
        for at, holder in enumerate(v.survivors):
            share = ChaCha20Poly1305(parts[holder]["keys"][mine]).decrypt(bytes(12), part["locks"][at], place)
            shares[at + 1] = int.from_bytes(share, "big")
        key = hkdf(interpolate(shares), v.context, frame("reveal"))
        flat = ChaCha20Poly1305(key).decrypt(bytes(12), part["sealed"], place)
        revealed[dealer] = [flat[33 * i : 33 * i + 33] for i in range(5)]
    total = np.array(v.all["total"], np.uint32)
    for at, owner in enumerate(v.names):
        points = {v.names.index(h) + 1: int.from_bytes(revealed[h][at], "big") for h in v.survivors}
        secret = interpolate(points)
        if owner in v.survivors:
            assert secret == v.secret(owner, "self_seed")
            total -= stream(hkdf(secret, v.context, frame("self-mask", owner.encode())), 9)
            continue
        assert secret == v.secret(owner, "mask_private")
        for peer in v.survivors:
            low, high = sorted((owner, peer))
            info = frame("pair-mask", low.encode(), high.encode())
            mask = stream(hkdf(dh(secret, v.publics[peer][0]), v.context, info), 9)
            total = total - mask if peer == low else total + mask
    plain = np.zeros(9, np.uint32)
    for site in v.survivors:
        plain += np.array(v.sites[site]["vector"], np.uint32)
    assert total.tolist() == plain.tolist() == v.all["sum"]
