"""A site against a hostile server: every attempt ends in its own named refusal, and none opens a secret."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.secagg import SiteRound, SiteStage
from common.errors import (
    BothSecretsAsked,
    CohortTooSmall,
    ContextDiffers,
    KeysForged,
    KeysRepeated,
    OwnKeysAltered,
    PublicKeyInvalid,
    RoundAbandoned,
    SecondKeySet,
    SecondOpening,
    SecondSurvivorSet,
    SecondUpload,
    ShareUnreadable,
    SiteMissing,
    SiteUnknown,
    StageOutOfOrder,
    TermsDiffer,
    UploadForged,
    VectorInvalid,
)
from common.secagg import messages as m
from common.secagg.context import context_digest, keys_message, threshold
from common.secagg.keys import exchange
from common.secagg.masking import apply_masks, pair_mask
from common.secagg.sealing import unlock_reveals
from common.secagg.shamir import combine
from tests.common.secagg.consortium import ADAPTER, OTHER_ADAPTER, Consortium, Round, consortium, exact_sum

ME, PEER = "site-00", "site-01"


def signed(world: Consortium, keys: m.AdvertisedKeys) -> m.AdvertisedKeys:
    """Let the site that the keys name sign them, as a colluding site would."""
    return replace(keys, signature=world.signers[keys.site](keys_message(keys)))


def with_keys(key_set: m.KeySet, keys: m.AdvertisedKeys) -> m.KeySet:
    return m.KeySet(tuple(keys if k.site == keys.site else k for k in key_set.keys))


def advertised(world: Consortium) -> tuple[Round, m.KeySet]:
    round = Round.start(world)
    return round, round.keys(world.sites)


def opened(world: Consortium) -> tuple[Round, m.KeySet, dict[str, m.Opening]]:
    round, key_set = advertised(world)
    return round, key_set, round.deal(key_set, world.sites)


def uploaded(world: Consortium, *, gone: int = 0) -> tuple[Round, m.SurvivorSet]:
    round, _, openings = opened(world)
    return round, round.upload(openings, world.sites[: len(world.sites) - gone])


# --- the key set -------------------------------------------------------------------------------------------


def test_key_substituted_for_a_peer_is_refused() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    mine = X25519PrivateKey.generate().public_key().public_bytes_raw()
    substituted = replace(key_set.keys[1], share_public=mine)
    with pytest.raises(KeysForged):
        round.sites[ME].deal(with_keys(key_set, substituted))
    assert round.sites[ME].stage is SiteStage.ADVERTISED


def test_keys_signed_by_another_site_are_refused() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    forged = replace(key_set.keys[1], signature=world.signers["site-02"](keys_message(key_set.keys[1])))
    with pytest.raises(KeysForged):
        round.sites[ME].deal(with_keys(key_set, forged))


def test_all_zero_point_is_refused() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    for zero in (
        replace(key_set.keys[1], mask_public=bytes(32)),
        replace(key_set.keys[1], share_public=bytes(32)),
    ):
        with pytest.raises(PublicKeyInvalid):
            round.sites[ME].deal(with_keys(key_set, signed(world, zero)))


def test_equal_keys_within_one_site_are_refused() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    equal = signed(world, replace(key_set.keys[1], share_public=key_set.keys[1].mask_public))
    with pytest.raises(KeysRepeated):
        round.sites[ME].deal(with_keys(key_set, equal))


def test_peer_that_advertises_this_sites_own_key_is_refused() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    copied = signed(world, replace(key_set.keys[1], mask_public=key_set.keys[0].mask_public))
    with pytest.raises(KeysRepeated):
        round.sites[ME].deal(with_keys(key_set, copied))


def test_one_identity_under_two_names_is_refused() -> None:
    world = consortium(4)
    doubled = dict(world.identities) | {"site-03": world.identities["site-02"]}
    signers = dict(world.signers) | {"site-03": world.signers["site-02"]}
    world = Consortium(world.terms, signers, doubled)
    key_set = m.KeySet(tuple(world.site(site).advertise() for site in world.sites))
    with pytest.raises(KeysRepeated, match="identity"):
        world.site(ME).deal(key_set)


def test_site_that_the_manifest_does_not_pin_is_refused() -> None:
    world, wider = consortium(4), consortium(5)
    key_set = m.KeySet(tuple(wider.site(site).advertise() for site in wider.sites))
    with pytest.raises(SiteUnknown):
        world.site(ME).deal(key_set)


def test_own_keys_altered_or_left_out_are_refused() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    altered = replace(key_set.keys[0], commitment=bytes(32))
    with pytest.raises(OwnKeysAltered):
        round.sites[ME].deal(with_keys(key_set, altered))
    with pytest.raises(SiteMissing):
        round.sites[ME].deal(m.KeySet(key_set.keys[1:]))


def test_keys_of_another_round_are_refused() -> None:
    world, other = consortium(4), consortium(4, round=8)
    key_set = m.KeySet(tuple((world if site == ME else other).site(site).advertise() for site in world.sites))
    with pytest.raises(TermsDiffer):
        world.site(ME).deal(key_set)


def test_manifest_swapped_between_rounds_is_refused() -> None:
    world = consortium(4)
    swapped = replace(world.terms, configuration="ab" * 32)
    key_set = m.KeySet(
        tuple(world.site(s, terms=world.terms if s == ME else swapped).advertise() for s in world.sites)
    )
    with pytest.raises(TermsDiffer):
        world.site(ME).deal(key_set)


def test_cohort_shrunk_below_the_floor_is_refused() -> None:
    world = consortium(5, floor=4)
    round = Round.start(world)
    key_set = m.KeySet(tuple(round.sites[site].advertise() for site in world.sites[:3]))
    with pytest.raises(CohortTooSmall):
        round.sites[ME].deal(key_set)


def test_second_key_set_is_refused_and_the_same_one_gives_the_same_shares() -> None:
    world = consortium(4)
    round, key_set = advertised(world)
    shares = round.sites[ME].deal(key_set)
    assert round.sites[ME].deal(key_set) == shares
    with pytest.raises(SecondKeySet):
        round.sites[ME].deal(m.KeySet(key_set.keys[:3]))


# --- the opening -------------------------------------------------------------------------------------------


def test_opening_on_another_adapter_is_refused() -> None:
    round, _, openings = opened(consortium(4))
    with pytest.raises(ContextDiffers):
        round.sites[ME].open(openings[ME], adapter=OTHER_ADAPTER)
    assert round.sites[ME].stage is SiteStage.DEALT


def test_roster_shrunk_below_threshold_or_floor_is_refused() -> None:
    for world, keep in ((consortium(7), 4), (consortium(6, floor=6), 5)):
        round, _, openings = opened(world)
        whole = openings[ME]
        roster, boxes = whole.roster[:keep], whole.boxes[: keep - 1]
        context = context_digest(round.server._setup, adapter=ADAPTER, roster=roster)
        with pytest.raises(CohortTooSmall):
            round.sites[ME].open(m.Opening(context, roster, boxes), adapter=ADAPTER)


def test_roster_without_this_site_or_with_a_stranger_is_refused() -> None:
    round, _, openings = opened(consortium(5))
    whole = openings[ME]
    with pytest.raises(SiteMissing):
        round.sites[ME].open(replace(whole, roster=whole.roster[1:], boxes=whole.boxes[1:]), adapter=ADAPTER)
    with pytest.raises(SiteUnknown):
        stranger = replace(whole, roster=(*whole.roster[:4], "stranger"))
        round.sites[ME].open(stranger, adapter=ADAPTER)


def test_shares_swapped_damaged_or_meant_for_another_are_refused() -> None:
    round, _, openings = opened(consortium(4))
    mine, theirs = openings[ME], openings[PEER]
    swapped = (mine.boxes[1], mine.boxes[0], mine.boxes[2])
    damaged = (bytes([mine.boxes[0][0] ^ 1]) + mine.boxes[0][1:], *mine.boxes[1:])
    for boxes in (swapped, damaged, theirs.boxes):
        with pytest.raises(ShareUnreadable):
            round.sites[ME].open(replace(mine, boxes=boxes), adapter=ADAPTER)
    round.sites[ME].open(mine, adapter=ADAPTER)


def test_round_replayed_with_another_adapter_or_roster_is_refused() -> None:
    round, _, openings = opened(consortium(5))
    site, whole = round.sites[ME], openings[ME]
    site.open(whole, adapter=ADAPTER)
    site.open(whole, adapter=ADAPTER)
    other = context_digest(round.server._setup, adapter=OTHER_ADAPTER, roster=whole.roster)
    with pytest.raises(SecondOpening):
        site.open(replace(whole, context=other), adapter=OTHER_ADAPTER)
    with pytest.raises(SecondOpening):
        site.open(replace(whole, roster=whole.roster[:4], boxes=whole.boxes[:3]), adapter=ADAPTER)


def test_one_site_shown_another_adapter_spoils_the_sum_instead_of_exposing_it() -> None:
    world = consortium(4, length=1000)
    round, key_set, openings = opened(world)
    odd = round.vectors[ME].copy()
    other = context_digest(round.server._setup, adapter=OTHER_ADAPTER, roster=openings[ME].roster)
    for site in world.sites:
        vector = odd if site == ME else round.vectors[site].copy()
        if site == ME:
            round.sites[site].open(replace(openings[site], context=other), adapter=OTHER_ADAPTER)
        else:
            round.sites[site].open(openings[site], adapter=ADAPTER)
        upload = round.sites[site].mask(vector)
        if site == ME:
            with pytest.raises(ContextDiffers):
                round.server.announce(upload)
        else:
            round.server.announce(upload)
            round.server.start_adding(site)
            round.server.add(vector, round.total)
    out = round.reveal(round.server.close_uploads(), world.sites[1:])
    np.testing.assert_array_equal(out, exact_sum(round.vectors, world.sites[1:]))
    # A dishonest server that adds the odd upload, and takes off the pair masks that it can rebuild since
    # the others believe that the odd site dropped out, still has masks from another context on it.
    private = round.sites[ME]._mask_private
    publics = {keys.site: keys.mask_public for keys in key_set.keys}
    for peer in world.sites[1:]:
        shared = exchange(private, publics[peer])
        apply_masks(odd, [pair_mask(shared, openings[ME].context, site=ME, peer=peer).opposite()])
    assert np.count_nonzero(odd == round.vectors[ME]) < 5
    assert np.count_nonzero(out + odd == exact_sum(round.vectors, world.sites)) < 5


# --- the upload --------------------------------------------------------------------------------------------


def test_second_vector_is_refused() -> None:
    round, _, openings = opened(consortium(3))
    round.sites[ME].open(openings[ME], adapter=ADAPTER)
    round.sites[ME].mask(np.zeros(5, np.uint32))
    with pytest.raises(SecondUpload):
        round.sites[ME].mask(np.ones(5, np.uint32))


def test_vector_of_another_length_is_refused_unmasked() -> None:
    round, _, openings = opened(consortium(3))
    round.sites[ME].open(openings[ME], adapter=ADAPTER)
    vector = np.zeros(6, np.uint32)
    with pytest.raises(VectorInvalid):
        round.sites[ME].mask(vector)
    assert not vector.any() and round.sites[ME].stage is SiteStage.OPENED


# --- the survivor set --------------------------------------------------------------------------------------


def test_both_secrets_of_one_peer_are_refused() -> None:
    round, survivor_set = uploaded(consortium(4))
    with pytest.raises(BothSecretsAsked):
        round.sites[ME].reveal(replace(survivor_set, dropped=(PEER,)))
    assert round.sites[ME].stage is SiteStage.MASKED


def test_second_survivor_set_is_refused_and_the_same_one_gives_the_same_reveal() -> None:
    world = consortium(5)
    round, survivor_set = uploaded(world)
    reveal = round.sites[ME].reveal(survivor_set)
    assert round.sites[ME].reveal(survivor_set) == reveal
    shrunk = replace(survivor_set, survivors=survivor_set.survivors[:4], dropped=("site-04",))
    with pytest.raises(SecondSurvivorSet):
        round.sites[ME].reveal(shrunk)


def test_survivor_set_below_the_threshold_is_refused() -> None:
    world = consortium(5)
    round, survivor_set = uploaded(world)
    shrunk = m.SurvivorSet(survivor_set.context, survivor_set.survivors[:3], ("site-03", "site-04"))
    with pytest.raises(CohortTooSmall):
        round.sites[ME].reveal(shrunk)


def test_survivor_set_below_the_floor_is_refused() -> None:
    world = consortium(6, floor=6)
    round, survivor_set = uploaded(world)
    with pytest.raises(CohortTooSmall):
        round.sites[ME].reveal(m.SurvivorSet(survivor_set.context, survivor_set.survivors[:5], ("site-05",)))


def test_survivor_set_must_cover_the_roster_and_nobody_else() -> None:
    world = consortium(5)
    round, survivor_set = uploaded(world)
    site = round.sites[ME]
    with pytest.raises(SiteMissing):
        site.reveal(replace(survivor_set, survivors=survivor_set.survivors[:4]))
    with pytest.raises(SiteMissing):
        site.reveal(replace(survivor_set, survivors=survivor_set.survivors[1:], dropped=(ME,)))
    with pytest.raises(SiteUnknown):
        site.reveal(replace(survivor_set, dropped=("stranger",)))


def test_survivor_without_a_valid_receipt_is_refused() -> None:
    round, survivor_set = uploaded(consortium(4))
    receipts = list(survivor_set.survivors)
    receipts[1] = replace(receipts[1], upload=bytes(32))
    with pytest.raises(UploadForged):
        round.sites[ME].reveal(replace(survivor_set, survivors=tuple(receipts)))


def test_receipt_of_an_earlier_round_is_refused() -> None:
    _, earlier = uploaded(consortium(4, round=6))
    round, survivor_set = uploaded(consortium(4))
    receipts = (survivor_set.survivors[0], earlier.survivors[1], *survivor_set.survivors[2:])
    with pytest.raises(UploadForged):
        round.sites[ME].reveal(replace(survivor_set, survivors=receipts))


def test_survivor_set_with_another_upload_of_this_site_is_refused() -> None:
    round, survivor_set = uploaded(consortium(4))
    altered = (replace(survivor_set.survivors[0], upload=bytes(32)), *survivor_set.survivors[1:])
    with pytest.raises(SecondUpload):
        round.sites[ME].reveal(replace(survivor_set, survivors=altered))


def test_survivor_set_of_another_context_is_refused() -> None:
    round, survivor_set = uploaded(consortium(4))
    with pytest.raises(ContextDiffers):
        round.sites[ME].reveal(replace(survivor_set, context=bytes(32)))


def test_survivor_sets_that_differ_per_site_open_nothing() -> None:
    world = consortium(7)
    round, everyone = uploaded(world)
    without_last = replace(everyone, survivors=everyone.survivors[:6], dropped=(world.sites[6],))
    quorum = threshold(7)
    shown = {site: everyone if i % 2 else without_last for i, site in enumerate(world.sites[:6])}
    reveals = {site: round.sites[site].reveal(survivor_set) for site, survivor_set in shown.items()}
    for survivor_set in (everyone, without_last):
        backers = {s: r for s, r in reveals.items() if shown[s] is survivor_set}
        assert len(backers) == 3 < quorum
        assert unlock_reveals(backers, survivor_set.sites, quorum=quorum) == {}
        # Nor do the keys that the others handed out for their own survivor set open these locks.
        relabelled = {
            s: replace(r, survivor_set=backers[next(iter(backers))].survivor_set) for s, r in reveals.items()
        }
        assert unlock_reveals(relabelled, survivor_set.sites, quorum=quorum) == {}


def test_lone_site_shown_another_survivor_set_keeps_its_reveal_locked() -> None:
    world = consortium(7)
    round, everyone = uploaded(world)
    receipts = everyone.survivors
    without_7th = replace(everyone, survivors=receipts[:6], dropped=("site-06",))
    without_6th = replace(everyone, survivors=(*receipts[:5], receipts[6]), dropped=("site-05",))
    reveals = {site: round.sites[site].reveal(without_7th) for site in world.sites[1:6]}
    odd = {ME: round.sites[ME].reveal(without_6th)}
    opened_reveals = unlock_reveals(reveals | odd, without_7th.sites, quorum=threshold(7))
    assert set(opened_reveals) == set(reveals)


def test_below_the_threshold_no_contribution_can_be_recovered() -> None:
    world = consortium(7)
    round, survivor_set = uploaded(world, gone=2)
    quorum = threshold(7)
    assert quorum == 5
    reveals = {site: round.sites[site].reveal(survivor_set) for site in survivor_set.sites[: quorum - 1]}
    assert unlock_reveals(reveals, survivor_set.sites, quorum=quorum) == {}
    assert unlock_reveals(reveals, survivor_set.sites, quorum=quorum - 1) == {}
    # Even with every share that four sites hold in the open, no seed and no key comes out.
    for owner in world.sites:
        for kind, secret in ((0, round.sites[owner]._self_seed), (1, round.sites[owner]._mask_private)):
            held = {i + 1: round.sites[s]._held[owner][kind] for i, s in enumerate(survivor_set.sites)}
            assert combine(held) == secret
            del held[5]
            try:
                assert combine(held) != secret
            except Exception as error:
                assert type(error).__name__ == "SecretWrong"


# --- order, crash and end ----------------------------------------------------------------------------------


def test_steps_out_of_order_are_refused() -> None:
    world = consortium(4)
    round, _, openings = opened(world)
    other, survivor_set = uploaded(world)
    fresh = world.site(ME)
    with pytest.raises(StageOutOfOrder):
        fresh.open(openings[ME], adapter=ADAPTER)
    with pytest.raises(StageOutOfOrder):
        fresh.mask(np.zeros(5, np.uint32))
    with pytest.raises(StageOutOfOrder):
        fresh.reveal(survivor_set)
    with pytest.raises(StageOutOfOrder):
        round.sites[ME].reveal(survivor_set)
    assert other.sites[ME].stage is SiteStage.MASKED


def revived(world: Consortium, site: SiteRound) -> SiteRound:
    """Restart: the snapshot goes through a file as JSON."""
    snapshot = json.loads(json.dumps(site.snapshot()))
    return SiteRound.restore(
        snapshot, terms=world.terms, identities=world.identities, sign=world.signers[site.site]
    )


def test_site_restarted_after_every_step_answers_with_the_same_bytes() -> None:
    world = consortium(4)
    straight, survivors = uploaded(world)
    round, key_set, openings = opened(world)
    site = revived(world, world.site(ME))
    assert site.advertise() == straight.sites[ME].advertise()
    assert site.deal(key_set) == straight.sites[ME].deal(key_set)
    site = revived(world, site)
    assert site.stage is SiteStage.DEALT
    site.open(openings[ME], adapter=ADAPTER)
    site = revived(world, site)
    assert site.stage is SiteStage.OPENED
    vector = round.vectors[ME].copy()
    upload = site.mask(vector)
    np.testing.assert_array_equal(vector, straight.masked[ME])
    site = revived(world, site)
    assert site.stage is SiteStage.MASKED and site.upload == upload == straight.sites[ME].upload
    with pytest.raises(SecondUpload):
        site.mask(vector)
    reveal = site.reveal(survivors)
    assert reveal == straight.sites[ME].reveal(survivors)
    site = revived(world, site)
    assert site.stage is SiteStage.REVEALED and site.reveal(survivors) == reveal


def test_snapshot_of_a_tampered_past_is_refused() -> None:
    world = consortium(4)
    round, _, openings = opened(world)
    round.sites[ME].open(openings[ME], adapter=ADAPTER)
    snapshot = round.sites[ME].snapshot() | {"adapter": OTHER_ADAPTER}
    with pytest.raises(ContextDiffers):
        SiteRound.restore(snapshot, terms=world.terms, identities=world.identities, sign=world.signers[ME])


def test_abandoned_round_forgets_its_secrets_and_refuses_every_step() -> None:
    world = consortium(4)
    round, survivor_set = uploaded(world)
    site = round.sites[ME]
    seed = site.snapshot()["seed"]
    site.abandon()
    assert seed not in json.dumps(site.snapshot())
    for machine in (site, revived(world, site)):
        for step in (machine.advertise, lambda: machine.reveal(survivor_set)):  # noqa: B023
            with pytest.raises(RoundAbandoned):
                step()


def test_seed_of_another_size_is_refused() -> None:
    world = consortium(3)
    with pytest.raises(ValueError, match="32 bytes"):
        SiteRound(bytes(16), terms=world.terms, site=ME, identities=world.identities, sign=world.signers[ME])
