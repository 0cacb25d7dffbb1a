"""Shares on their way: sealed from dealer to holder, and the locks that tie a reveal to one survivor set.

A survivor seals its reveal under a fresh key, shares that key among the survivors, and seals each share
under a key that only itself and the share's holder can derive, *for this survivor set*. Every survivor hands
out its keys for the set that it was shown. So the server opens a reveal only if `threshold` sites were shown
the same survivor set; since a site reveals once and the threshold is above two thirds, at most one survivor
set can ever be opened, unless more than a third of the sites collude. That replaces the extra consistency
exchange of Bonawitz et al. 2017 (CCS) §6.2.
Guarantees: a box or lock opens only in its place (dealer, holder, key set or context, survivor set).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import ShareUnreadable
from common.secagg.keys import derive, framed, seal, unseal
from common.secagg.messages import Reveal
from common.secagg.shamir import COEFFICIENT_BYTES, SHARE_BYTES, combine, split


def seal_shares(
    shared: bytes, setup: bytes, seed_share: bytes, key_share: bytes, *, dealer: str, holder: str
) -> bytes:
    """Seal a dealer's two shares for one holder; `shared` is the secret of their share keys. 82 bytes."""
    place = framed("box", setup, dealer.encode(), holder.encode())
    return seal(_box_key(shared, setup, dealer, holder), seed_share + key_share, place)


def open_shares(shared: bytes, setup: bytes, *, dealer: str, holder: str, box: bytes) -> tuple[bytes, bytes]:
    """Return (seed share, key share) of a box; raises ShareUnreadable."""
    place = framed("box", setup, dealer.encode(), holder.encode())
    both = unseal(_box_key(shared, setup, dealer, holder), box, place)
    return both[:SHARE_BYTES], both[SHARE_BYTES:]


def lock_key(shared: bytes, context: bytes, survivor_set: bytes, *, dealer: str, holder: str) -> bytes:
    """Derive the key of the lock that `dealer` makes for `holder` in one survivor set."""
    return derive(shared, context, "lock", survivor_set, dealer.encode(), holder.encode())


def lock_randomness(quorum: int) -> int:
    """Return how many random bytes `lock_reveal` takes for a threshold."""
    return 32 + (quorum - 1) * COEFFICIENT_BYTES


def lock_reveal(
    shares: Sequence[bytes],
    context: bytes,
    survivor_set: bytes,
    *,
    site: str,
    lock_keys: Sequence[bytes],
    quorum: int,
    randomness: bytes,
) -> tuple[bytes, tuple[bytes, ...]]:
    """Seal a survivor's shares, and lock their key for each survivor in order; returns (sealed, locks)."""
    place = framed("reveal", context, survivor_set, site.encode())
    key_shares = split(randomness[:32], threshold=quorum, count=len(lock_keys), randomness=randomness[32:])
    locks = tuple(seal(key, share, place) for key, share in zip(lock_keys, key_shares, strict=True))
    return seal(derive(randomness[:32], context, "reveal"), b"".join(shares), place), locks


def unlock_reveals(
    reveals: Mapping[str, Reveal], survivors: Sequence[str], *, quorum: int
) -> dict[str, tuple[bytes, ...]]:
    """Open every reveal whose lock opens at `quorum` holders; returns site → its shares in roster order.

    All reveals must name the same survivor set, whose sites `survivors` lists in order.
    """
    opened = {}
    for site, reveal in reveals.items():
        place = framed("reveal", reveal.context, reveal.survivor_set, site.encode())
        mine = survivors.index(site)
        key_shares: dict[int, bytes] = {}
        for holder, theirs in reveals.items():
            at = survivors.index(holder)
            try:
                key_shares[at + 1] = unseal(theirs.lock_keys[mine], reveal.locks[at], place)
            except ShareUnreadable:
                continue
            if len(key_shares) == quorum:
                break
        if len(key_shares) < quorum:
            continue
        try:
            flat = unseal(derive(combine(key_shares), reveal.context, "reveal"), reveal.sealed, place)
        except ShareUnreadable:
            continue
        opened[site] = tuple(flat[i : i + SHARE_BYTES] for i in range(0, len(flat), SHARE_BYTES))
    return opened


def _box_key(shared: bytes, setup: bytes, dealer: str, holder: str) -> bytes:
    return derive(shared, setup, "box", dealer.encode(), holder.encode())
