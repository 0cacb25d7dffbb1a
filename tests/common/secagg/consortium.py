"""Sites and a server of secure aggregation in memory: the real state machines, bytes in between."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.secagg import SiteRound
from common.secagg import messages as m
from common.secagg.context import Terms
from common.secagg.keys import Sign
from common.secagg.masking import Vector
from server.secagg import ServerRound

ADAPTER = hashlib.sha256(b"global adapter").hexdigest()
OTHER_ADAPTER = hashlib.sha256(b"another adapter").hexdigest()


class Drop(IntEnum):
    """When a site falls silent."""

    BEFORE_KEYS = 0
    BEFORE_SHARES = 1
    BEFORE_UPLOAD = 2
    BEFORE_REVEAL = 3
    NEVER = 4


@dataclass(frozen=True)
class Consortium:
    """Terms of one round and the sites' identities."""

    terms: Terms
    signers: Mapping[str, Sign]
    identities: Mapping[str, str]

    @property
    def sites(self) -> list[str]:
        return sorted(self.identities)

    def site(self, site: str, *, terms: Terms | None = None) -> SiteRound:
        seed = hashlib.sha256(f"seed of {site}".encode()).digest()
        return SiteRound(
            seed,
            terms=terms or self.terms,
            site=site,
            identities=self.identities,
            sign=self.signers[site],
        )

    def server(self) -> ServerRound:
        return ServerRound(self.terms, self.identities)

    def vectors(self, seed: int = 7) -> dict[str, Vector]:
        generator = np.random.default_rng(seed)
        return {s: generator.integers(0, 2**32, self.terms.length, dtype=np.uint32) for s in self.sites}


def consortium(count: int, *, length: int = 5, floor: int = 2, round: int = 7) -> Consortium:
    """Make `count` sites named site-00, site-01, …"""
    keys = {f"site-{i:02d}": Ed25519PrivateKey.from_private_bytes(bytes([i + 1]) * 32) for i in range(count)}
    terms = Terms(
        study=hashlib.sha256(b"study").hexdigest(),
        configuration=hashlib.sha256(b"configuration").hexdigest(),
        round=round,
        attempt=0,
        length=length,
        floor=floor,
    )
    identities = {site: key.public_key().public_bytes_raw().hex() for site, key in keys.items()}
    return Consortium(terms, {site: key.sign for site, key in keys.items()}, identities)


def exact_sum(vectors: Mapping[str, Vector], sites: Sequence[str]) -> Vector:
    """Add vectors modulo 2^32 in the clear."""
    total = np.zeros_like(next(iter(vectors.values())))
    for site in sites:
        total += vectors[site]
    return total


@dataclass
class Round:
    """A round under way: sites, server and total, advanced stage by stage."""

    world: Consortium
    sites: dict[str, SiteRound]
    server: ServerRound
    total: Vector
    vectors: dict[str, Vector]
    masked: dict[str, Vector]

    @classmethod
    def start(cls, world: Consortium) -> Round:
        total = np.zeros(world.terms.length, np.uint32)
        return cls(world, {s: world.site(s) for s in world.sites}, world.server(), total, world.vectors(), {})

    def keys(self, sites: Sequence[str]) -> m.KeySet:
        for site in sites:
            self.server.accept_keys(m.parse_keys(m.format_keys(self.sites[site].advertise())))
        return m.parse_key_set(m.format_key_set(self.server.close_keys()))

    def deal(self, key_set: m.KeySet, sites: Sequence[str]) -> dict[str, m.Opening]:
        for site in sites:
            self.server.accept_shares(m.parse_shares(m.format_shares(self.sites[site].deal(key_set))))
        openings = self.server.close_shares(adapter=ADAPTER)
        return {s: m.parse_opening(m.format_opening(o)) for s, o in openings.items()}

    def upload(self, openings: Mapping[str, m.Opening], sites: Sequence[str]) -> m.SurvivorSet:
        for site in sites:
            self.sites[site].open(openings[site], adapter=ADAPTER)
            self.masked[site] = self.vectors[site].copy()
            upload = self.sites[site].mask(self.masked[site])
            self.server.announce(m.parse_upload(m.format_upload(upload)))
            self.server.start_adding(site)
            self.server.add(self.masked[site], self.total)
        return m.parse_survivor_set(m.format_survivor_set(self.server.close_uploads()))

    def reveal(self, survivor_set: m.SurvivorSet, sites: Sequence[str]) -> Vector:
        for site in sites:
            reveal = self.sites[site].reveal(survivor_set)
            self.server.accept_reveal(m.parse_reveal(m.format_reveal(reveal)))
        out = np.empty_like(self.total)
        self.server.unmask(self.total, out)
        return out


def run_round(world: Consortium, drops: Mapping[str, Drop] | None = None) -> tuple[Round, Vector]:
    """Run a whole round with sites that fall silent; returns it and the unmasked sum."""
    drops = drops or {}

    def alive(stage: Drop) -> list[str]:
        return [site for site in world.sites if drops.get(site, Drop.NEVER) > stage]

    round = Round.start(world)
    key_set = round.keys(alive(Drop.BEFORE_KEYS))
    openings = round.deal(key_set, alive(Drop.BEFORE_SHARES))
    survivor_set = round.upload(openings, alive(Drop.BEFORE_UPLOAD))
    return round, round.reveal(survivor_set, alive(Drop.BEFORE_REVEAL))
