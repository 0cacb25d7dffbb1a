"""The messages of secure aggregation: frozen values and their one canonical encoding.

A message is `FRSA`, a version byte, a type byte, then fixed-size fields, and lists with a one-byte count;
integers are big-endian, site names carry a one-byte length. Lists of sites ascend strictly.
Guarantees: `parse_x(format_x(m)) == m`, `format_x(parse_x(b)) == b`, at most 64 KiB, every field of its
size; all else raises MessageMalformed, SiteRepeated, NotCanonical or BodyTooLarge. Signatures and digests
are checked elsewhere (`context`), meaning by the two state machines. Layout: docs/protocol/secagg.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import BodyTooLarge, MessageMalformed, NotCanonical, SiteRepeated
from common.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from common.secagg.masking import MAX_LENGTH, chunk_count
from common.secagg.shamir import SHARE_BYTES

MAGIC = b"FRSA\x01"
MAX_SITES = 64
MAX_MESSAGE_BYTES = 1 << 16
BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES
LOCK_BYTES = SHARE_BYTES + TAG_BYTES
DIGEST_BYTES = 32
_SITE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_KEYS, _KEY_SET, _SHARES, _OPENING, _UPLOAD, _SURVIVORS, _REVEAL = range(1, 8)


@dataclass(frozen=True)
class AdvertisedKeys:
    """A site's ephemeral X25519 keys of one round and the commitment to its self-mask seed, signed."""

    terms: bytes
    site: str
    mask_public: bytes
    share_public: bytes
    commitment: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.terms, self.commitment)
        _check_sizes(KEY_BYTES, self.mask_public, self.share_public)
        _check_sizes(SIGNATURE_BYTES, self.signature)
        _check_sites((self.site,))


@dataclass(frozen=True)
class KeySet:
    """Server to sites: everyone's keys of one round. Deal your shares to these."""

    keys: tuple[AdvertisedKeys, ...]

    def __post_init__(self) -> None:
        _check_sites([k.site for k in self.keys])

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(k.site for k in self.keys)


@dataclass(frozen=True)
class Shares:
    """A site's sealed shares for every other site of the key set, and digests of all, its own included."""

    setup: bytes
    site: str
    boxes: tuple[bytes, ...]
    seed_digests: tuple[bytes, ...]
    key_digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.setup, *self.seed_digests, *self.key_digests)
        _check_sizes(BOX_BYTES, *self.boxes)
        _check_sites((self.site,))
        count = len(self.seed_digests)
        if count > MAX_SITES or len(self.key_digests) != count or len(self.boxes) != count - 1:
            raise MessageMalformed(
                "expected one box per other site and two digests per site, got other counts"
            )


@dataclass(frozen=True)
class Opening:
    """Server to one site: the round's roster, its context, and the boxes that the others sealed for the site.

    `boxes` follow the roster without the recipient.
    """

    context: bytes
    roster: tuple[str, ...]
    boxes: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.context)
        _check_sizes(BOX_BYTES, *self.boxes)
        _check_sites(self.roster)
        if len(self.boxes) != len(self.roster) - 1:
            raise MessageMalformed("expected one box per other site of the roster, got another count")


@dataclass(frozen=True)
class Receipt:
    """A site's signature on the digest of its masked upload."""

    site: str
    upload: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.upload)
        _check_sizes(SIGNATURE_BYTES, self.signature)
        _check_sites((self.site,))


@dataclass(frozen=True)
class Upload:
    """A site's announcement of its masked vector, which travels beside it in chunks of 2^20 values."""

    context: bytes
    receipt: Receipt
    length: int
    chunk_digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.context, *self.chunk_digests)
        if not 1 <= self.length <= MAX_LENGTH or len(self.chunk_digests) != chunk_count(self.length):
            raise MessageMalformed(f"expected 1 to {MAX_LENGTH} values and a digest per chunk, got others")


@dataclass(frozen=True)
class SurvivorSet:
    """Server to survivors: who uploaded, each with its receipt, and who dropped out. Reveal accordingly."""

    context: bytes
    survivors: tuple[Receipt, ...]
    dropped: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.context)
        _check_sites(self.sites)
        if self.dropped:
            _check_sites(self.dropped)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(r.site for r in self.survivors)


@dataclass(frozen=True)
class Reveal:
    """A survivor's secrets, locked so that only `threshold` reveals for one survivor set open them.

    `sealed`: its shares of every roster site's seed or key, under a key that is itself shared;
    `locks`: that key's shares, one per survivor, each sealed for its holder and the survivor set;
    `lock_keys`: the keys to the locks that every survivor made for this site, its own among them.
    """

    context: bytes
    site: str
    survivor_set: bytes
    sealed: bytes
    locks: tuple[bytes, ...]
    lock_keys: tuple[bytes, ...]
    signature: bytes

    def __post_init__(self) -> None:
        _check_sizes(DIGEST_BYTES, self.context, self.survivor_set)
        _check_sizes(LOCK_BYTES, *self.locks)
        _check_sizes(KEY_BYTES, *self.lock_keys)
        _check_sizes(SIGNATURE_BYTES, self.signature)
        _check_sites((self.site,))
        shares, rest = divmod(len(self.sealed) - TAG_BYTES, SHARE_BYTES)
        if rest or not 1 <= shares <= MAX_SITES:
            raise MessageMalformed("expected 1 to 64 sealed shares of 33 bytes, got another size")
        if not 1 <= len(self.locks) <= shares or len(self.lock_keys) != len(self.locks):
            raise MessageMalformed("expected a lock and a key per survivor, got another count")


def format_keys(keys: AdvertisedKeys) -> bytes:
    return _head(_KEYS) + _keys_body(keys)


def parse_keys(data: bytes) -> AdvertisedKeys:
    """Read AdvertisedKeys; raises as the module says."""
    reader = _Reader(data, _KEYS)
    keys = reader.keys()
    reader.finish()
    return keys


def format_key_set(key_set: KeySet) -> bytes:
    return _head(_KEY_SET) + _count(key_set.keys) + b"".join(_keys_body(k) for k in key_set.keys)


def parse_key_set(data: bytes) -> KeySet:
    """Read a KeySet; raises as the module says."""
    reader = _Reader(data, _KEY_SET)
    keys = tuple(reader.keys() for _ in range(reader.byte()))
    reader.finish()
    return KeySet(keys)


def format_shares(shares: Shares) -> bytes:
    parts = (shares.setup, _name(shares.site), _count(shares.seed_digests))
    return _head(_SHARES) + b"".join((*parts, *shares.boxes, *shares.seed_digests, *shares.key_digests))


def parse_shares(data: bytes) -> Shares:
    """Read Shares; raises as the module says."""
    reader = _Reader(data, _SHARES)
    setup, site, count = reader.take(DIGEST_BYTES), reader.name(), reader.byte()
    boxes = reader.list(BOX_BYTES, count - 1)
    shares = Shares(setup, site, boxes, reader.list(DIGEST_BYTES, count), reader.list(DIGEST_BYTES, count))
    reader.finish()
    return shares


def format_opening(opening: Opening) -> bytes:
    names = b"".join(_name(site) for site in opening.roster)
    return _head(_OPENING) + opening.context + _count(opening.roster) + names + b"".join(opening.boxes)


def parse_opening(data: bytes) -> Opening:
    """Read an Opening; raises as the module says."""
    reader = _Reader(data, _OPENING)
    context, count = reader.take(DIGEST_BYTES), reader.byte()
    roster = tuple(reader.name() for _ in range(count))
    opening = Opening(context, roster, reader.list(BOX_BYTES, count - 1))
    reader.finish()
    return opening


def format_upload(upload: Upload) -> bytes:
    length = upload.length.to_bytes(4, "big")
    digests = b"".join(upload.chunk_digests)
    return _head(_UPLOAD) + upload.context + _receipt_body(upload.receipt) + length + digests


def parse_upload(data: bytes) -> Upload:
    """Read an Upload; raises as the module says."""
    reader = _Reader(data, _UPLOAD)
    context, receipt = reader.take(DIGEST_BYTES), reader.receipt()
    length = int.from_bytes(reader.take(4), "big")
    if not 1 <= length <= MAX_LENGTH:
        raise MessageMalformed(f"expected 1 to {MAX_LENGTH} values, got {length}")
    upload = Upload(context, receipt, length, reader.list(DIGEST_BYTES, chunk_count(length)))
    reader.finish()
    return upload


def format_survivor_set(survivor_set: SurvivorSet) -> bytes:
    receipts = b"".join(_receipt_body(r) for r in survivor_set.survivors)
    dropped = b"".join(_name(site) for site in survivor_set.dropped)
    counts = _count(survivor_set.survivors), _count(survivor_set.dropped)
    return _head(_SURVIVORS) + survivor_set.context + counts[0] + receipts + counts[1] + dropped


def parse_survivor_set(data: bytes) -> SurvivorSet:
    """Read a SurvivorSet; raises as the module says."""
    reader = _Reader(data, _SURVIVORS)
    context = reader.take(DIGEST_BYTES)
    survivors = tuple(reader.receipt() for _ in range(reader.byte()))
    dropped = tuple(reader.name() for _ in range(reader.byte()))
    reader.finish()
    return SurvivorSet(context, survivors, dropped)


def format_reveal(reveal: Reveal) -> bytes:
    return _head(_REVEAL) + reveal_body(reveal) + reveal.signature


def parse_reveal(data: bytes) -> Reveal:
    """Read a Reveal; raises as the module says."""
    reader = _Reader(data, _REVEAL)
    context, site, survivor_set = reader.take(DIGEST_BYTES), reader.name(), reader.take(DIGEST_BYTES)
    sealed = reader.take(reader.byte() * SHARE_BYTES + TAG_BYTES)
    count = reader.byte()
    locks, lock_keys = reader.list(LOCK_BYTES, count), reader.list(KEY_BYTES, count)
    reveal = Reveal(context, site, survivor_set, sealed, locks, lock_keys, reader.take(SIGNATURE_BYTES))
    reader.finish()
    return reveal


def reveal_body(reveal: Reveal) -> bytes:
    """Encode all of a reveal but its signature: what the signature covers."""
    shares = (len(reveal.sealed) - TAG_BYTES) // SHARE_BYTES
    parts = (reveal.context, _name(reveal.site), reveal.survivor_set, bytes([shares]), reveal.sealed)
    return b"".join((*parts, _count(reveal.locks), *reveal.locks, *reveal.lock_keys))


class _Reader:
    """Takes fields off the front of a message; every method raises MessageMalformed at the end of it."""

    def __init__(self, data: bytes, kind: int) -> None:
        if len(data) > MAX_MESSAGE_BYTES:
            raise BodyTooLarge(f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}")
        if data[:6] != _head(kind):
            raise MessageMalformed(f"expected a secure aggregation message of type {kind}, got another")
        self._data, self._at = data, 6

    def take(self, size: int) -> bytes:
        field = self._data[self._at : self._at + size]
        if len(field) != size:
            raise MessageMalformed(f"expected {size} more bytes, got {len(field)}")
        self._at += size
        return field

    def byte(self) -> int:
        return self.take(1)[0]

    def list(self, size: int, count: int) -> tuple[bytes, ...]:
        return tuple(self.take(size) for _ in range(count))

    def name(self) -> str:
        return self.take(self.byte()).decode("latin-1")

    def keys(self) -> AdvertisedKeys:
        terms, site = self.take(DIGEST_BYTES), self.name()
        publics = self.take(KEY_BYTES), self.take(KEY_BYTES)
        return AdvertisedKeys(terms, site, *publics, self.take(DIGEST_BYTES), self.take(SIGNATURE_BYTES))

    def receipt(self) -> Receipt:
        return Receipt(self.name(), self.take(DIGEST_BYTES), self.take(SIGNATURE_BYTES))

    def finish(self) -> None:
        if self._at != len(self._data):
            raise MessageMalformed(f"expected the message's end, got {len(self._data) - self._at} more bytes")


def _keys_body(keys: AdvertisedKeys) -> bytes:
    publics = keys.mask_public + keys.share_public + keys.commitment
    return keys.terms + _name(keys.site) + publics + keys.signature


def _receipt_body(receipt: Receipt) -> bytes:
    return _name(receipt.site) + receipt.upload + receipt.signature


def _head(kind: int) -> bytes:
    return MAGIC + bytes([kind])


def _count(items: Sequence[object]) -> bytes:
    return bytes([len(items)])


def _name(site: str) -> bytes:
    return bytes([len(site)]) + site.encode("ascii")


def _check_sizes(size: int, *fields: bytes) -> None:
    for field in fields:
        if len(field) != size:
            raise MessageMalformed(f"expected a field of {size} bytes, got {len(field)}")


def _check_sites(sites: Sequence[str]) -> None:
    if not 1 <= len(sites) <= MAX_SITES:
        raise MessageMalformed(f"expected 1 to {MAX_SITES} sites, got {len(sites)}")
    if not all(_SITE.fullmatch(site) for site in sites):
        raise MessageMalformed("expected site names of a-z, 0-9 and -, got another")
    if len(set(sites)) != len(sites):
        raise SiteRepeated("expected every site once in a list, got one twice")
    if list(sites) != sorted(sites):
        raise NotCanonical("expected sites in ascending order, got another order")
