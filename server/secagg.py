"""One round of secure aggregation at the server: an I/O-free state machine that only moves forward.

    KEYS → DEALING → UPLOADS → REVEALS → DONE              (any → ABANDONED, with its reason)

The caller owns the one big array, `total` (uint32 zeros at first, best file-backed): uploads are added to it
one after another, and `unmask` writes the sum to a second array, so memory does not grow with the sites.
Guarantees: every message is checked before it counts; a rebuilt secret is used only if it is the advertised
one; below floor or threshold the round is abandoned. It learns the sum over the survivors and nothing else,
which is the sites' doing (`client.secagg`), not this code's. A site that masks wrongly spoils the sum unseen.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from common.errors import (
    CohortTooSmall,
    ContextDiffers,
    FedRadError,
    KeySetDiffers,
    MessageMalformed,
    RoundAbandoned,
    SecondKeySet,
    SecondUpload,
    SecretWrong,
    ShareWrong,
    SiteMissing,
    SiteUnknown,
    StageOutOfOrder,
    SumInterrupted,
    UploadCorrupted,
    VectorInvalid,
)
from common.secagg.context import (
    Terms,
    context_digest,
    seed_commitment,
    setup_digest,
    share_digest,
    survivor_set_digest,
    threshold,
    verify_cohort,
    verify_key_set,
    verify_keys,
    verify_receipt,
    verify_reveal,
)
from common.secagg.keys import exchange, public_key
from common.secagg.masking import (
    Mask,
    Vector,
    add_chunk,
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
    Reveal,
    Shares,
    SurvivorSet,
    Upload,
    format_keys,
    format_reveal,
    format_shares,
    format_upload,
    parse_keys,
    parse_reveal,
    parse_shares,
    parse_upload,
)
from common.secagg.sealing import unlock_reveals
from common.secagg.shamir import combine, lagrange_weights


class ServerStage(IntEnum):
    """What the server's round waits for."""

    KEYS = 0
    DEALING = 1
    UPLOADS = 2
    REVEALS = 3
    DONE = 4
    ABANDONED = 5


class ServerRound:
    """The server's side of one round; `identities` maps every invited site to its pinned public key (hex)."""

    def __init__(self, terms: Terms, identities: Mapping[str, str]) -> None:
        self.terms, self.stage = terms, ServerStage.KEYS
        self.reason: str | None = None
        self._identities = dict(identities)
        self._terms = terms.digest()
        self._keys: dict[str, AdvertisedKeys] = {}
        self._shares: dict[str, Shares] = {}
        self._setup = b""
        self._adapter = ""
        self._context = b""
        self._roster: tuple[str, ...] = ()
        self._uploads: dict[str, Upload] = {}
        self._added: list[str] = []
        self._adding: str | None = None
        self._survivors: SurvivorSet | None = None
        self._reveals: dict[str, Reveal] = {}

    # --- keys and shares ---------------------------------------------------------------------------------

    def accept_keys(self, keys: AdvertisedKeys) -> None:
        """Take a site's ephemeral keys; the same again is ignored."""
        self._at(ServerStage.KEYS)
        verify_keys(keys, terms=self._terms, identities=self._identities)
        if self._keys.setdefault(keys.site, keys) != keys:
            raise SecondKeySet(f"keys of {keys.site}: expected the ones it advertised first, got others")

    def close_keys(self) -> KeySet:
        """End the wait for keys and return what every site of the key set is to be sent.

        Raises CohortTooSmall, and the round is abandoned, with fewer sites than the floor.
        """
        self._at(ServerStage.KEYS)
        with _AbandonOnError(self):
            verify_cohort(len(self._keys), floor=self.terms.floor, quorum=1, what="keys")
            key_set = KeySet(tuple(self._keys[site] for site in sorted(self._keys)))
            verify_key_set(key_set, self.terms, self._identities)
        self._setup = setup_digest(self.terms, key_set)
        self.stage = ServerStage.DEALING
        return key_set

    def accept_shares(self, shares: Shares) -> None:
        """Take a site's sealed shares; the same again is ignored."""
        self._at(ServerStage.DEALING)
        self._known(shares.site, self._keys, "shares")
        if shares.setup != self._setup:
            raise KeySetDiffers(f"shares of {shares.site}: expected this key set's, got another's")
        if len(shares.seed_digests) != len(self._keys):
            raise MessageMalformed(f"shares of {shares.site}: expected {len(self._keys)}, got another count")
        if self._shares.setdefault(shares.site, shares) != shares:
            raise SecondKeySet(f"shares of {shares.site}: expected the ones it dealt first, got others")

    def close_shares(self, *, adapter: str) -> dict[str, Opening]:
        """Fix the roster and return each site's opening; `adapter`: SHA-256 of the global adapter, hex.

        Raises CohortTooSmall, and the round is abandoned, below the floor or the threshold.
        """
        self._at(ServerStage.DEALING)
        with _AbandonOnError(self):
            self._verify_cohort(len(self._shares), "shares")
        self._roster, self._adapter = tuple(sorted(self._shares)), adapter
        self._context = context_digest(self._setup, adapter=adapter, roster=self._roster)
        self.stage = ServerStage.UPLOADS
        return self.openings()

    def openings(self) -> dict[str, Opening]:
        """Return the openings again, for a resend."""
        sites = sorted(self._keys)
        openings = {}
        for holder in self._roster:
            boxes = []
            for dealer in self._roster:
                if dealer != holder:
                    at = [site for site in sites if site != dealer].index(holder)
                    boxes.append(self._shares[dealer].boxes[at])
            openings[holder] = Opening(self._context, self._roster, tuple(boxes))
        return openings

    # --- uploads -----------------------------------------------------------------------------------------

    def announce(self, upload: Upload) -> None:
        """Take the announcement of an upload, before its chunks; the same again is ignored."""
        self._at(ServerStage.UPLOADS)
        site = upload.receipt.site
        self._known(site, self._roster, "upload")
        if upload.context != self._context:
            raise ContextDiffers(f"upload of {site}: expected this round's context, got another")
        verify_receipt(upload.receipt, context=self._context, identities=self._identities)
        if upload.length != self.terms.length:
            raise VectorInvalid(f"upload of {site}: expected {self.terms.length} values, got {upload.length}")
        if upload.receipt.upload != upload_digest(upload.length, upload.chunk_digests):
            raise UploadCorrupted(f"upload of {site}: expected the chunk digests that it signed, got others")
        if self._uploads.setdefault(site, upload) != upload:
            raise SecondUpload(f"upload of {site}: expected the one it announced first, got another")

    def verify_chunk(self, site: str, index: int, chunk: Vector | memoryview | bytes) -> None:
        """Raise UploadCorrupted unless these are the bytes of the site's chunk `index`."""
        self._known(site, self._uploads, "chunk")
        digests = self._uploads[site].chunk_digests
        if not 0 <= index < len(digests) or chunk_digest(chunk) != digests[index]:
            raise UploadCorrupted(f"upload of {site}: expected chunk {index} as announced, got other bytes")

    def start_adding(self, site: str) -> None:
        """Mark that the site's upload is about to be added; store `to_json()` before `add`."""
        self._at(ServerStage.UPLOADS)
        self._known(site, self._uploads, "upload")
        if site in self._added or self._adding is not None:
            raise SecondUpload(f"upload of {site}: expected one that is not yet added, one at a time")
        self._adding = site

    def add(self, vector: Vector, total: Vector) -> None:
        """Check the upload started last, chunk by chunk, and add it to `total` modulo 2^32.

        Raises UploadCorrupted with `total` as it was; the site may then send again.
        """
        self._at(ServerStage.UPLOADS)
        if self._adding is None:
            raise StageOutOfOrder("expected `start_adding` first, got an upload to add")
        site = self._adding
        verify_vector(total, length=self.terms.length)
        if (vector.shape, vector.dtype) != (total.shape, total.dtype) or not vector.flags.c_contiguous:
            self._adding = None
            raise VectorInvalid(f"upload of {site}: expected {self.terms.length} uint32 values, got others")
        digests = self._uploads[site].chunk_digests
        pairs = list(zip(chunks(vector), chunks(total), digests, strict=True))
        for index, (chunk, target, digest) in enumerate(pairs):
            if add_chunk(chunk, target) != digest:
                for added, sums, _ in pairs[: index + 1]:
                    np.subtract(sums, added, out=sums)
                self._adding = None
                raise UploadCorrupted(
                    f"upload of {site}: expected chunk {index} as announced, got other bytes"
                )
        self._added.append(site)
        self._adding = None

    def close_uploads(self) -> SurvivorSet:
        """End the wait for uploads and return the survivor set to send to every survivor.

        Raises CohortTooSmall, and the round is abandoned, below the floor or the threshold.
        """
        self._at(ServerStage.UPLOADS)
        if self._adding is not None:
            raise StageOutOfOrder(f"expected the upload of {self._adding} to be added first, got the closing")
        with _AbandonOnError(self):
            self._verify_cohort(len(self._added), "uploads")
        survivors = tuple(self._uploads[site].receipt for site in sorted(self._added))
        dropped = tuple(site for site in self._roster if site not in self._added)
        self._survivors = SurvivorSet(self._context, survivors, dropped)
        self.stage = ServerStage.REVEALS
        return self._survivors

    # --- reveals and the sum -----------------------------------------------------------------------------

    def accept_reveal(self, reveal: Reveal) -> None:
        """Take a survivor's reveal; the same again is ignored."""
        self._at(ServerStage.REVEALS)
        survivors = self.survivor_set
        self._known(reveal.site, survivors.sites, "reveal")
        verify_reveal(reveal, context=self._context, identities=self._identities)
        if reveal.survivor_set != survivor_set_digest(survivors):
            raise ContextDiffers(f"reveal of {reveal.site}: expected this survivor set, got another")
        if len(reveal.locks) != len(survivors.survivors) or len(reveal.sealed) != self._sealed_bytes:
            raise MessageMalformed(f"reveal of {reveal.site}: expected a share per site, got another count")
        self._reveals.setdefault(reveal.site, reveal)

    @property
    def can_unmask(self) -> bool:
        """Whether as many survivors have revealed as the threshold asks."""
        return self.stage is ServerStage.REVEALS and len(self._reveals) >= self.quorum

    def unmask(self, total: Vector, out: Vector) -> None:
        """Write the survivors' sum to `out`, leaving `total` as it is, so that a crash can be repeated.

        Raises CohortTooSmall, ShareWrong or SecretWrong, and the round is abandoned, when too few reveals
        open, when too few shares are the dealt ones, or when a secret is not the advertised one.
        """
        self._at(ServerStage.REVEALS)
        verify_vector(total, length=self.terms.length)
        verify_vector(out, length=self.terms.length)
        if np.may_share_memory(total, out):
            raise VectorInvalid("expected another array for the sum, got the total itself")
        with _AbandonOnError(self):
            masks = self._masks()
        np.copyto(out, total)
        apply_masks(out, masks)
        self.stage = ServerStage.DONE

    def abandon(self, reason: str) -> None:
        """End the round without a sum."""
        if self.stage is ServerStage.DONE:
            raise StageOutOfOrder("expected a round without a sum, got one that has it")
        self.stage, self.reason = ServerStage.ABANDONED, reason

    # --- what the round knows ----------------------------------------------------------------------------

    @property
    def quorum(self) -> int:
        """How many sites must stay, given the key set."""
        return threshold(len(self._keys))

    @property
    def key_set(self) -> KeySet:
        """The key set, once keys are closed, for a resend."""
        if not self._setup:
            raise StageOutOfOrder("expected keys to be closed first, got a later step")
        return KeySet(tuple(self._keys[site] for site in sorted(self._keys)))

    @property
    def context(self) -> bytes:
        """The round's context digest, once the roster is fixed."""
        return self._context

    @property
    def roster(self) -> tuple[str, ...]:
        """The sites that dealt shares, once that is closed."""
        return self._roster

    @property
    def added(self) -> tuple[str, ...]:
        """The sites whose uploads are in the total."""
        return tuple(sorted(self._added))

    @property
    def revealed(self) -> tuple[str, ...]:
        """The survivors whose reveals have come."""
        return tuple(sorted(self._reveals))

    @property
    def survivor_set(self) -> SurvivorSet:
        """The survivor set, once uploads are closed."""
        if self._survivors is None:
            raise StageOutOfOrder("expected uploads to be closed first, got a later step")
        return self._survivors

    def to_json(self) -> dict[str, Any]:
        """Return all but the total as JSON values, to be stored after every step that must last."""
        return {
            "keys": [_text(format_keys(k)) for k in self._keys.values()],
            "keys_closed": self._setup != b"",
            "shares": [_text(format_shares(s)) for s in self._shares.values()],
            "adapter": self._adapter,
            "uploads": [_text(format_upload(u)) for u in self._uploads.values()],
            "added": list(self._added),
            "adding": self._adding,
            "uploads_closed": self._survivors is not None,
            "reveals": [_text(format_reveal(r)) for r in self._reveals.values()],
            "done": self.stage is ServerStage.DONE,
            "reason": self.reason,
        }

    @classmethod
    def from_json(
        cls, state: Mapping[str, Any], *, terms: Terms, identities: Mapping[str, str]
    ) -> ServerRound:
        """Rebuild a round from `to_json()`, checking every message again.

        A round stored between `start_adding` and the end of `add` comes back ABANDONED (SumInterrupted).
        """
        machine = cls(terms, identities)
        for text in state["keys"]:
            machine.accept_keys(parse_keys(b64decode(text)))
        if state["keys_closed"]:
            machine.close_keys()
        for text in state["shares"]:
            machine.accept_shares(parse_shares(b64decode(text)))
        if state["adapter"]:
            machine.close_shares(adapter=state["adapter"])
        for text in state["uploads"]:
            machine.announce(parse_upload(b64decode(text)))
        for site in state["added"]:
            machine.start_adding(site)
            machine._added.append(site)
            machine._adding = None
        if state["uploads_closed"]:
            machine.close_uploads()
        for text in state["reveals"]:
            machine.accept_reveal(parse_reveal(b64decode(text)))
        if state["done"]:
            machine.stage = ServerStage.DONE
        elif state["reason"] is not None:
            machine.abandon(state["reason"])
        elif state["adding"] is not None:
            machine.abandon(
                f"{SumInterrupted.__name__}: stopped while adding the upload of {state['adding']}"
            )
        return machine

    # --- the secrets -------------------------------------------------------------------------------------

    @property
    def _sealed_bytes(self) -> int:
        return 33 * len(self._roster) + 16

    def _masks(self) -> list[Mask]:
        survivors = self.survivor_set.sites
        opened = unlock_reveals(self._reveals, survivors, quorum=self.quorum)
        if len(opened) < self.quorum:
            silent = sorted(set(self._reveals) - set(opened))
            raise CohortTooSmall(f"expected {self.quorum} reveals that open, got {len(opened)}; not {silent}")
        weights: dict[tuple[int, ...], list[int]] = {}
        masks = []
        for owner in self._roster:
            secret = self._rebuild(owner, owner in survivors, opened, weights)
            if owner in survivors:
                masks.append(self_mask(secret, self._context, site=owner).opposite())
                continue
            for peer in survivors:
                shared = exchange(secret, self._keys[peer].mask_public)
                masks.append(pair_mask(shared, self._context, site=peer, peer=owner).opposite())
        return masks

    def _rebuild(
        self,
        owner: str,
        survived: bool,
        opened: Mapping[str, Sequence[bytes]],
        weights: dict[tuple[int, ...], list[int]],
    ) -> bytes:
        sites, kind = sorted(self._keys), "seed" if survived else "key"
        dealt = self._shares[owner].seed_digests if survived else self._shares[owner].key_digests
        good: dict[int, bytes] = {}
        for holder, shares in opened.items():
            share, at = shares[self._roster.index(owner)], sites.index(holder)
            if share_digest(share, self._setup, dealer=owner, holder=holder, kind=kind) == dealt[at]:
                good[at + 1] = share
            if len(good) == self.quorum:
                break
        if len(good) < self.quorum:
            liars = len(sites) - self.quorum  # so many holders may lie; with more, the dealer did
            raise ShareWrong(
                f"{kind} of {owner}: expected {self.quorum} shares as dealt, got {len(good)}",
                site=owner if len(opened) - len(good) > liars else "",
            )
        points = tuple(good)
        if points not in weights:
            weights[points] = lagrange_weights(points)
        secret = combine(good, weights[points])
        right = (
            seed_commitment(secret, self._terms, owner) == self._keys[owner].commitment
            if survived
            else public_key(secret) == self._keys[owner].mask_public
        )
        if not right:
            raise SecretWrong(
                f"{kind} of {owner}: expected the secret that it advertised, got another", site=owner
            )
        return secret

    # --- checks ------------------------------------------------------------------------------------------

    def _at(self, stage: ServerStage) -> None:
        if self.stage is ServerStage.ABANDONED:
            raise RoundAbandoned(f"round {self.terms.round} has ended without a sum: {self.reason}")
        if self.stage is not stage:
            raise StageOutOfOrder(f"expected a step of stage {self.stage.name}, got one of {stage.name}")

    def _known(self, site: str, sites: Mapping[str, Any] | Sequence[str], what: str) -> None:
        if site not in self._identities:
            raise SiteUnknown(f"{what}: expected a site that the manifest pins, got {site}")
        if site not in sites:
            raise SiteMissing(
                f"{what} of {site}: expected a site that took the step before, got one that did not"
            )

    def _verify_cohort(self, count: int, what: str) -> None:
        verify_cohort(count, floor=self.terms.floor, quorum=self.quorum, what=what)


class _AbandonOnError:
    """Abandons the round, with the error as reason, when a closing step fails; the error goes on."""

    def __init__(self, machine: ServerRound) -> None:
        self._machine = machine

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FedRadError):
            self._machine.abandon(f"{error.code}: {error}")


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")
