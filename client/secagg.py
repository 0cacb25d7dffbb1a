"""One round of secure aggregation at a site: an I/O-free state machine that only moves forward.

    ADVERTISED → DEALT → OPENED → MASKED → REVEALED        (any → ABANDONED)

Guarantees: whatever the server asks, in whatever order, a site masks one vector and reveals for one
survivor set; of each peer it reveals one kind of secret; asking the same thing again gives the same bytes,
asking another thing is refused by name. Everything secret comes from the round's seed, so a machine rebuilt
from its snapshot goes on where it stopped. A snapshot holds secrets; the caller stores it (mode 0600), and
does so *before* it sends what a step returned: otherwise a crash would let the step be taken twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from common.errors import (
    BothSecretsAsked,
    ContextDiffers,
    MessageMalformed,
    OwnKeysAltered,
    RoundAbandoned,
    SecondKeySet,
    SecondOpening,
    SecondSurvivorSet,
    SecondUpload,
    SiteMissing,
    SiteUnknown,
    StageOutOfOrder,
)
from common.secagg.context import (
    Terms,
    context_digest,
    keys_message,
    receipt_message,
    reveal_message,
    seed_commitment,
    setup_digest,
    share_digest,
    survivor_set_digest,
    threshold,
    verify_cohort,
    verify_key_set,
    verify_receipt,
)
from common.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, Sign, derive, exchange, public_key
from common.secagg.masking import (
    Vector,
    apply_masks,
    chunk_digest,
    chunks,
    pair_mask,
    self_mask,
    upload_digest,
    verify_vector,
)
from common.secagg.messages import (
    AdvertisedKeys,
    KeySet,
    Opening,
    Receipt,
    Reveal,
    Shares,
    SurvivorSet,
    Upload,
    format_key_set,
    format_opening,
    format_survivor_set,
    format_upload,
    parse_key_set,
    parse_opening,
    parse_survivor_set,
    parse_upload,
)
from common.secagg.sealing import lock_key, lock_randomness, lock_reveal, open_shares, seal_shares
from common.secagg.shamir import COEFFICIENT_BYTES, split


class SiteStage(IntEnum):
    """How far a site's round has come."""

    ADVERTISED = 0
    DEALT = 1
    OPENED = 2
    MASKED = 3
    REVEALED = 4
    ABANDONED = 5


class SiteRound:
    """A site's side of one round.

    `identities`: site → Ed25519 public key as 64 hex digits, all pinned by the manifest; `sign` signs with
    this site's own. `seed`: 32 fresh random bytes, never used for another round.
    """

    def __init__(
        self, seed: bytes, *, terms: Terms, site: str, identities: Mapping[str, str], sign: Sign
    ) -> None:
        if len(seed) != KEY_BYTES:
            raise ValueError(f"expected a seed of {KEY_BYTES} bytes, got {len(seed)}")
        self.terms, self.site, self.stage = terms, site, SiteStage.ADVERTISED
        self._seed, self._identities, self._sign = seed, dict(identities), sign
        self._terms = terms.digest()
        self._mask_private = self._random("mask-key")
        self._share_private = self._random("share-key")
        self._self_seed = self._random("self-mask")
        self._key_set: KeySet | None = None
        self._opening: Opening | None = None
        self._adapter = ""
        self._upload: Upload | None = None
        self._survivor_set: SurvivorSet | None = None
        self._setup = b""
        self._dealt: dict[str, tuple[bytes, bytes]] = {}
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self._shared: dict[str, bytes] = {}

    def advertise(self) -> AdvertisedKeys:
        """Return this site's signed ephemeral keys; the same every time."""
        self._reach(SiteStage.ADVERTISED)
        unsigned = AdvertisedKeys(
            terms=self._terms,
            site=self.site,
            mask_public=public_key(self._mask_private),
            share_public=public_key(self._share_private),
            commitment=seed_commitment(self._self_seed, self._terms, self.site),
            signature=bytes(SIGNATURE_BYTES),
        )
        return AdvertisedKeys(
            unsigned.terms,
            unsigned.site,
            unsigned.mask_public,
            unsigned.share_public,
            unsigned.commitment,
            self._sign(keys_message(unsigned)),
        )

    def deal(self, key_set: KeySet) -> Shares:
        """Check everyone's keys and return this site's sealed shares for them; the same every time."""
        self._reach(SiteStage.ADVERTISED)
        if self._key_set is None:
            self._check_key_set(key_set)
            self._key_set, self._setup = key_set, setup_digest(self.terms, key_set)
            self._deal_shares()
            self.stage = SiteStage.DEALT
        elif key_set != self._key_set:
            raise SecondKeySet("expected the key set that shares were dealt to, got another")
        boxes, seed_digests, key_digests = [], [], []
        for holder, (seed_share, key_share) in self._dealt.items():
            place = {"dealer": self.site, "holder": holder}
            seed_digests.append(share_digest(seed_share, self._setup, **place, kind="seed"))
            key_digests.append(share_digest(key_share, self._setup, **place, kind="key"))
            if holder != self.site:
                shared = self._shared[holder]
                boxes.append(seal_shares(shared, self._setup, seed_share, key_share, **place))
        return Shares(self._setup, self.site, tuple(boxes), tuple(seed_digests), tuple(key_digests))

    def open(self, opening: Opening, *, adapter: str) -> None:
        """Check the roster, the context and the shares before any data is touched.

        `adapter`: SHA-256 of the global adapter that this site was given and verified, 64 hex digits.
        """
        self._reach(SiteStage.DEALT)
        if self._opening is not None:
            if (opening, adapter) != (self._opening, self._adapter):
                raise SecondOpening(
                    "expected the adapter and roster that the round was opened on, got others"
                )
            return
        sites = self._keys.sites
        unknown = sorted(set(opening.roster) - set(sites))
        if unknown:
            raise SiteUnknown(f"roster: expected sites of the key set, got {unknown[0]}")
        if self.site not in opening.roster:
            raise SiteMissing(f"roster: expected {self.site} itself in it, got it left out")
        verify_cohort(len(opening.roster), floor=self.terms.floor, quorum=self._quorum, what="roster")
        if opening.context != context_digest(self._setup, adapter=adapter, roster=opening.roster):
            raise ContextDiffers("expected the context of this adapter, key set and roster, got another")
        others = [peer for peer in opening.roster if peer != self.site]
        held = {self.site: self._dealt[self.site]}
        for dealer, box in zip(others, opening.boxes, strict=True):
            place = {"dealer": dealer, "holder": self.site}
            held[dealer] = open_shares(self._shared[dealer], self._setup, **place, box=box)
        self._opening, self._adapter, self._held = opening, adapter, held
        self.stage = SiteStage.OPENED

    def mask(self, vector: Vector) -> Upload:
        """Mask a vector in place, once, and return its announcement; send both only after a snapshot."""
        self._reach(SiteStage.OPENED)
        if self._upload is not None:
            raise SecondUpload("expected one vector in a round, got a second")
        verify_vector(vector, length=self.terms.length)
        context, roster = self._opened.context, self._opened.roster
        publics = {keys.site: keys.mask_public for keys in self._keys.keys}
        masks = [self_mask(self._self_seed, context, site=self.site)]
        for peer in roster:
            if peer != self.site:
                shared = exchange(self._mask_private, publics[peer])
                masks.append(pair_mask(shared, context, site=self.site, peer=peer))
        apply_masks(vector, masks)
        digests = tuple(chunk_digest(chunk) for chunk in chunks(vector))
        upload = upload_digest(vector.size, digests)
        signature = self._sign(receipt_message(context, site=self.site, upload=upload))
        self._upload = Upload(context, Receipt(self.site, upload, signature), vector.size, digests)
        self.stage = SiteStage.MASKED
        return self._upload

    def reveal(self, survivor_set: SurvivorSet) -> Reveal:
        """Check a survivor set and reveal for it, once; the same set gives the same bytes again."""
        self._reach(SiteStage.MASKED)
        if self._survivor_set is None:
            self._check_survivor_set(survivor_set)
            self._survivor_set = survivor_set
            self.stage = SiteStage.REVEALED
        elif survivor_set != self._survivor_set:
            raise SecondSurvivorSet("expected the survivor set that was revealed for, got another")
        context, survivors = self._opened.context, survivor_set.sites
        named = survivor_set_digest(survivor_set)
        held = [self._held[site][0 if site in survivors else 1] for site in self._opened.roster]
        mine, theirs = [], []
        own_key = self._random("own-lock", context, named)
        for peer in survivors:
            shared = self._shared.get(peer, own_key)
            mine.append(lock_key(shared, context, named, dealer=self.site, holder=peer))
            theirs.append(lock_key(shared, context, named, dealer=peer, holder=self.site))
        randomness = self._random("lock", context, named, size=lock_randomness(self._quorum))
        sealed, locks = lock_reveal(
            held,
            context,
            named,
            site=self.site,
            lock_keys=mine,
            quorum=self._quorum,
            randomness=randomness,
        )
        unsigned = Reveal(context, self.site, named, sealed, locks, tuple(theirs), bytes(SIGNATURE_BYTES))
        signature = self._sign(reveal_message(unsigned))
        return Reveal(context, self.site, named, sealed, locks, tuple(theirs), signature)

    def abandon(self) -> None:
        """End the round for good and forget its secrets; every later step is refused."""
        self.stage = SiteStage.ABANDONED
        self._seed = self._mask_private = self._share_private = self._self_seed = b""
        self._dealt, self._held, self._shared = {}, {}, {}

    def snapshot(self) -> dict[str, Any]:
        """Return the machine's seed and accepted inputs as JSON values; secret."""
        return {
            "site": self.site,
            "seed": self._seed.hex(),
            "abandoned": self.stage is SiteStage.ABANDONED,
            "key_set": format_key_set(self._key_set).hex() if self._key_set else None,
            "opening": format_opening(self._opening).hex() if self._opening else None,
            "adapter": self._adapter,
            "upload": format_upload(self._upload).hex() if self._upload else None,
            "survivor_set": format_survivor_set(self._survivor_set).hex() if self._survivor_set else None,
        }

    @classmethod
    def restore(
        cls, snapshot: Mapping[str, Any], *, terms: Terms, identities: Mapping[str, str], sign: Sign
    ) -> SiteRound:
        """Rebuild a machine from `snapshot()`, checking every input again.

        One that was OPENED comes back OPENED: nothing masked has left the site, so it may mask afresh.
        """
        if snapshot["abandoned"]:
            ended = cls(
                bytes(KEY_BYTES), terms=terms, site=snapshot["site"], identities=identities, sign=sign
            )
            ended.abandon()
            return ended
        seed = bytes.fromhex(snapshot["seed"])
        machine = cls(seed, terms=terms, site=snapshot["site"], identities=identities, sign=sign)
        if snapshot["key_set"] is not None:
            machine.deal(parse_key_set(bytes.fromhex(snapshot["key_set"])))
        if snapshot["opening"] is not None:
            machine.open(parse_opening(bytes.fromhex(snapshot["opening"])), adapter=snapshot["adapter"])
        if snapshot["upload"] is not None:
            machine._reach(SiteStage.OPENED)
            machine._upload = parse_upload(bytes.fromhex(snapshot["upload"]))
            machine.stage = SiteStage.MASKED
        if snapshot["survivor_set"] is not None:
            machine.reveal(parse_survivor_set(bytes.fromhex(snapshot["survivor_set"])))
        return machine

    @property
    def upload(self) -> Upload | None:
        """The announcement of the masked vector, once there is one."""
        return self._upload

    @property
    def _keys(self) -> KeySet:
        if self._key_set is None:
            raise StageOutOfOrder("expected a key set first, got a later step")
        return self._key_set

    @property
    def _opened(self) -> Opening:
        if self._opening is None:
            raise StageOutOfOrder("expected the round to be opened first, got a later step")
        return self._opening

    @property
    def _quorum(self) -> int:
        return threshold(len(self._keys.keys))

    def _reach(self, stage: SiteStage) -> None:
        if self.stage is SiteStage.ABANDONED:
            raise RoundAbandoned(f"round {self.terms.round}: expected no further step, got one")
        if self.stage < stage:
            raise StageOutOfOrder(f"expected stage {stage.name} first, got a step at {self.stage.name}")

    def _random(self, label: str, *fields: bytes, size: int = KEY_BYTES) -> bytes:
        return derive(self._seed, self._terms, f"site-{label}", self.site.encode(), *fields, size=size)

    def _check_key_set(self, key_set: KeySet) -> None:
        if self.site not in key_set.sites:
            raise SiteMissing(f"key set: expected {self.site} itself in it, got it left out")
        if self.advertise() not in key_set.keys:
            raise OwnKeysAltered(f"key set: expected the keys that {self.site} advertised, got others")
        verify_key_set(key_set, self.terms, self._identities)

    def _deal_shares(self) -> None:
        sites = self._keys.sites
        size = (self._quorum - 1) * COEFFICIENT_BYTES
        dealt = []
        for secret, label in ((self._self_seed, "deal-seed"), (self._mask_private, "deal-key")):
            randomness = self._random(label, self._setup, size=size)
            dealt.append(split(secret, threshold=self._quorum, count=len(sites), randomness=randomness))
        self._dealt = dict(zip(sites, zip(*dealt, strict=True), strict=True))
        for keys in self._keys.keys:
            if keys.site != self.site:
                self._shared[keys.site] = exchange(self._share_private, keys.share_public)

    def _check_survivor_set(self, survivor_set: SurvivorSet) -> None:
        if survivor_set.context != self._opened.context:
            raise ContextDiffers("survivor set: expected this round's context, got another")
        survivors, dropped = set(survivor_set.sites), set(survivor_set.dropped)
        both = sorted(survivors & dropped)
        if both:
            raise BothSecretsAsked(
                f"expected each peer to have survived or dropped out, got both for {both[0]}"
            )
        roster = set(self._opened.roster)
        strange = sorted((survivors | dropped) - roster)
        if strange:
            raise SiteUnknown(f"survivor set: expected sites of the roster, got {strange[0]}")
        missing = sorted(roster - survivors - dropped)
        if missing:
            raise SiteMissing(f"survivor set: expected the whole roster in it, got {missing[0]} left out")
        if self.site not in survivors:
            raise SiteMissing(f"survivor set: expected {self.site} itself to survive, got it as dropped out")
        verify_cohort(len(survivors), floor=self.terms.floor, quorum=self._quorum, what="survivor set")
        if self._upload is None:
            raise MessageMalformed("survivor set: expected an upload of this site, got none")
        for receipt in survivor_set.survivors:
            if receipt.site == self.site and receipt != self._upload.receipt:
                raise SecondUpload(f"survivor set: expected the upload that {self.site} made, got another")
            verify_receipt(receipt, context=survivor_set.context, identities=self._identities)
