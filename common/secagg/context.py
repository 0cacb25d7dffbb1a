"""What one round's cryptography is bound to, and the signatures of sites on it.

Three digests, each holding the one before: *terms* (study, configuration, round, attempt, vector length,
floor), *setup* (terms, threshold and everyone's ephemeral keys) and *context* (setup, global adapter and
roster). Keys are signed over the terms, shares sealed over the setup, masks derived from the context, so a
server that shows two sites different adapters, rosters or keys gets masks that do not cancel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import (
    CohortTooSmall,
    ContextDiffers,
    KeysForged,
    KeysRepeated,
    RevealForged,
    SiteUnknown,
    TermsDiffer,
    UploadForged,
)
from common.secagg.keys import digest, framed, verify_public_key, verify_signature
from common.secagg.masking import MAX_LENGTH
from common.secagg.messages import (
    MAX_SITES,
    AdvertisedKeys,
    KeySet,
    Receipt,
    Reveal,
    SurvivorSet,
    format_key_set,
    format_survivor_set,
    reveal_body,
)

MIN_SITES = 2


@dataclass(frozen=True)
class Terms:
    """What both sides know about a round before its keys: hashes as 64 hex digits, `length` in uint32 values.

    `floor` is the fewest survivors that the study allows, whatever the threshold.
    """

    study: str
    configuration: str
    round: int
    attempt: int
    length: int
    floor: int

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_LENGTH or not MIN_SITES <= self.floor <= MAX_SITES:
            raise ValueError(f"expected 1 ≤ length ≤ {MAX_LENGTH} and {MIN_SITES} ≤ floor ≤ {MAX_SITES}")

    def digest(self) -> bytes:
        """Hash the terms to 32 bytes."""
        place = self.round.to_bytes(8, "big") + self.attempt.to_bytes(4, "big")
        sizes = self.length.to_bytes(4, "big") + bytes([self.floor])
        return digest("terms", _hash_bytes(self.study), _hash_bytes(self.configuration), place, sizes)


def threshold(sites: int) -> int:
    """Return how many sites of a key set must stay: the least number above two thirds."""
    return 2 * sites // 3 + 1


def setup_digest(terms: Terms, key_set: KeySet) -> bytes:
    """Hash the terms, the threshold and everyone's signed keys."""
    quorum = bytes([threshold(len(key_set.keys))])
    return digest("setup", terms.digest(), quorum, format_key_set(key_set))


def context_digest(setup: bytes, *, adapter: str, roster: Sequence[str]) -> bytes:
    """Hash the setup, the global adapter (64 hex digits) and the ordered roster."""
    return digest("context", setup, _hash_bytes(adapter), *(site.encode() for site in roster))


def survivor_set_digest(survivor_set: SurvivorSet) -> bytes:
    """Hash a survivor set with its receipts and its context."""
    return digest("survivor-set", format_survivor_set(survivor_set))


def seed_commitment(seed: bytes, terms: bytes, site: str) -> bytes:
    """Hash a self-mask seed; 256 uniform bits make it hiding."""
    return digest("seed-commitment", seed, terms, site.encode())


def share_digest(share: bytes, setup: bytes, *, dealer: str, holder: str, kind: str) -> bytes:
    """Hash one share (kind `seed` or `key`) so that a wrong one is told from the dealt one."""
    return digest("share", share, setup, dealer.encode(), holder.encode(), kind.encode())


def keys_message(keys: AdvertisedKeys) -> bytes:
    """Return what the signature on advertised keys covers."""
    publics = keys.mask_public + keys.share_public + keys.commitment
    return framed("sign-keys", keys.terms, keys.site.encode(), publics)


def receipt_message(context: bytes, *, site: str, upload: bytes) -> bytes:
    """Return what the signature on an upload's receipt covers."""
    return framed("sign-upload", context, site.encode(), upload)


def reveal_message(reveal: Reveal) -> bytes:
    """Return what the signature on a reveal covers: the survivor set by its digest, and the reveal."""
    return framed("sign-reveal", reveal_body(reveal))


def verify_keys(keys: AdvertisedKeys, *, terms: bytes, identities: Mapping[str, str]) -> None:
    """Raise unless a known site signed these keys for these terms and they are two good, different points."""
    identity = _identity(keys.site, identities)
    if keys.terms != terms:
        raise TermsDiffer(f"keys of {keys.site}: expected those of this round, got another round's")
    verify_signature(
        identity, keys.signature, keys_message(keys), error=KeysForged, what=f"keys of {keys.site}"
    )
    verify_public_key(keys.mask_public)
    verify_public_key(keys.share_public)


def verify_key_set(key_set: KeySet, terms: Terms, identities: Mapping[str, str]) -> None:
    """Raise unless all keys are good, no two are equal, and the sites are at least floor and threshold."""
    sites = len(key_set.keys)
    if sites < terms.floor:
        raise CohortTooSmall(f"expected keys of at least {terms.floor} sites, got {sites}")
    digest_of_terms = terms.digest()
    for keys in key_set.keys:
        verify_keys(keys, terms=digest_of_terms, identities=identities)
    points = [p for keys in key_set.keys for p in (keys.mask_public, keys.share_public)]
    if len(set(points)) != len(points):
        raise KeysRepeated("expected all ephemeral keys to differ, got two equal ones")
    pinned = [identities[site] for site in key_set.sites]
    if len(set(pinned)) != len(pinned):
        raise KeysRepeated("expected every site to have its own identity key, got one key under two names")


def verify_receipt(receipt: Receipt, *, context: bytes, identities: Mapping[str, str]) -> None:
    """Raise UploadForged unless the site signed this upload's digest in this context."""
    message = receipt_message(context, site=receipt.site, upload=receipt.upload)
    identity = _identity(receipt.site, identities)
    what = f"upload of {receipt.site}"
    verify_signature(identity, receipt.signature, message, error=UploadForged, what=what)


def verify_reveal(reveal: Reveal, *, context: bytes, identities: Mapping[str, str]) -> None:
    """Raise unless the site signed this reveal in this context."""
    if reveal.context != context:
        raise ContextDiffers(f"reveal of {reveal.site}: expected this round's context, got another")
    identity = _identity(reveal.site, identities)
    what = f"reveal of {reveal.site}"
    verify_signature(identity, reveal.signature, reveal_message(reveal), error=RevealForged, what=what)


def verify_cohort(count: int, *, floor: int, quorum: int, what: str) -> None:
    """Raise CohortTooSmall unless `count` sites reach both the floor and the threshold."""
    if count < max(floor, quorum):
        raise CohortTooSmall(f"{what}: expected at least {max(floor, quorum)} sites, got {count}")


def _identity(site: str, identities: Mapping[str, str]) -> str:
    if site not in identities:
        raise SiteUnknown(f"expected a site that the manifest pins, got {site}")
    return identities[site]


def _hash_bytes(value: str) -> bytes:
    raw = bytes.fromhex(value)
    if len(raw) != 32 or raw.hex() != value:
        raise ValueError("expected a SHA-256 as 64 lower-case hex digits")
    return raw
