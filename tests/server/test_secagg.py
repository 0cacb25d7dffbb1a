"""The server against hostile or failing sites, and against its own crashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import (
    CohortTooSmall,
    ContextDiffers,
    KeySetDiffers,
    KeysForged,
    KeysRepeated,
    MessageMalformed,
    RevealForged,
    RoundAbandoned,
    SecondKeySet,
    SecondUpload,
    SecretWrong,
    ShareWrong,
    SiteMissing,
    SiteUnknown,
    StageOutOfOrder,
    TermsDiffer,
    UploadCorrupted,
    UploadForged,
    VectorInvalid,
)
from common.secagg import messages as m
from common.secagg.context import keys_message, receipt_message, reveal_message
from common.secagg.masking import CHUNK_VALUES, upload_digest
from server.secagg import ServerRound, ServerStage
from tests.common.secagg.consortium import ADAPTER, Consortium, Round, consortium, exact_sum

ME = "site-00"


def opened(world: Consortium) -> Round:
    round = Round.start(world)
    openings = round.deal(round.keys(world.sites), world.sites)
    for site in world.sites:
        round.sites[site].open(openings[site], adapter=ADAPTER)
        round.masked[site] = round.vectors[site].copy()
        round.sites[site].mask(round.masked[site])
    return round


def add(round: Round, site: str) -> None:
    upload = round.sites[site].upload
    assert upload is not None
    round.server.announce(upload)
    round.server.start_adding(site)
    round.server.add(round.masked[site], round.total)


def uploaded(world: Consortium) -> tuple[Round, m.SurvivorSet]:
    round = opened(world)
    for site in world.sites:
        add(round, site)
    return round, round.server.close_uploads()


# --- keys and shares ---------------------------------------------------------------------------------------


def test_keys_that_are_forged_foreign_or_of_another_round_are_refused() -> None:
    world = consortium(4)
    keys = world.site(ME).advertise()
    cases: list[tuple[m.AdvertisedKeys, type[Exception]]] = [
        (replace(keys, signature=bytes(64)), KeysForged),
        (replace(keys, commitment=bytes(32)), KeysForged),
        (replace(keys, site="site-01"), KeysForged),
        (consortium(5).site("site-04").advertise(), SiteUnknown),
        (consortium(4, round=8).site(ME).advertise(), TermsDiffer),
    ]
    for bad, error in cases:
        with pytest.raises(error):
            world.server().accept_keys(bad)


def test_second_keys_of_a_site_are_refused_and_the_same_ones_ignored() -> None:
    world = consortium(4)
    server, keys = world.server(), world.site(ME).advertise()
    server.accept_keys(keys)
    server.accept_keys(keys)
    changed = replace(keys, commitment=bytes(32))
    changed = replace(changed, signature=world.signers[ME](keys_message(changed)))
    with pytest.raises(SecondKeySet):
        server.accept_keys(changed)


def test_equal_keys_end_the_round() -> None:
    world = consortium(4)
    round = Round.start(world)
    stolen = replace(round.sites["site-01"].advertise(), mask_public=round.sites[ME].advertise().mask_public)
    round.server.accept_keys(replace(stolen, signature=world.signers["site-01"](keys_message(stolen))))
    round.server.accept_keys(round.sites[ME].advertise())
    with pytest.raises(KeysRepeated):
        round.server.close_keys()
    assert round.server.stage is ServerStage.ABANDONED
    assert round.server.reason is not None and round.server.reason.startswith("KeysRepeated")


def test_too_few_keys_or_shares_end_the_round_with_the_reason_named() -> None:
    world = consortium(5, floor=4)
    round = Round.start(world)
    with pytest.raises(CohortTooSmall):
        round.keys(world.sites[:3])
    with pytest.raises(RoundAbandoned, match="CohortTooSmall"):
        round.server.accept_keys(round.sites["site-04"].advertise())
    round = Round.start(world)
    key_set = round.keys(world.sites)
    with pytest.raises(CohortTooSmall):
        round.deal(key_set, world.sites[:3])
    assert round.server.stage is ServerStage.ABANDONED


def test_shares_for_another_key_set_from_strangers_or_twice_are_refused() -> None:
    world = consortium(4)
    round = Round.start(world)
    key_set = round.keys(world.sites[:3])
    shares = round.sites[ME].deal(key_set)
    everyone = m.KeySet(tuple(world.site(site).advertise() for site in world.sites))
    with pytest.raises(KeySetDiffers):
        round.server.accept_shares(world.site("site-01").deal(everyone))
    with pytest.raises(SiteMissing):
        round.server.accept_shares(replace(shares, site="site-03"))
    with pytest.raises(SiteUnknown):
        round.server.accept_shares(replace(shares, site="stranger"))
    with pytest.raises(MessageMalformed):
        cut = (shares.boxes[:1], shares.seed_digests[:2], shares.key_digests[:2])
        round.server.accept_shares(m.Shares(shares.setup, ME, *cut))
    round.server.accept_shares(shares)
    round.server.accept_shares(shares)
    with pytest.raises(SecondKeySet):
        round.server.accept_shares(replace(shares, seed_digests=shares.key_digests))


# --- uploads -----------------------------------------------------------------------------------------------


def test_upload_that_is_forged_of_another_context_or_length_is_refused() -> None:
    world = consortium(4)
    round = opened(world)
    upload = round.sites[ME].upload
    assert upload is not None
    context = round.server.context

    def signed(length: int, digests: tuple[bytes, ...]) -> m.Upload:
        digest = upload_digest(length, digests)
        signature = world.signers[ME](receipt_message(context, site=ME, upload=digest))
        return m.Upload(context, m.Receipt(ME, digest, signature), length, digests)

    cases: list[tuple[m.Upload, type[Exception]]] = [
        (replace(upload, context=bytes(32)), ContextDiffers),
        (replace(upload, receipt=replace(upload.receipt, signature=bytes(64))), UploadForged),
        (replace(upload, receipt=replace(upload.receipt, site="site-01")), UploadForged),
        (replace(upload, receipt=replace(upload.receipt, site="stranger")), SiteUnknown),
        (signed(6, upload.chunk_digests), VectorInvalid),
        (replace(upload, chunk_digests=(bytes(32),)), UploadCorrupted),
    ]
    for bad, error in cases:
        with pytest.raises(error):
            round.server.announce(bad)
    round.server.announce(upload)
    round.server.announce(upload)
    with pytest.raises(SecondUpload):
        round.server.announce(signed(5, (bytes(32),)))


def test_corrupted_upload_leaves_the_total_as_it_was_and_may_be_sent_again() -> None:
    world = consortium(3, length=2 * CHUNK_VALUES + 5)
    round = opened(world)
    add(round, "site-01")
    before = round.total.copy()
    damaged = round.masked[ME].copy()
    damaged[-1] ^= 1
    upload = round.sites[ME].upload
    assert upload is not None
    round.server.announce(upload)
    round.server.start_adding(ME)
    with pytest.raises(UploadCorrupted):
        round.server.add(damaged, round.total)
    np.testing.assert_array_equal(round.total, before)
    with pytest.raises(UploadCorrupted):
        round.server.verify_chunk(ME, 2, damaged[2 * CHUNK_VALUES :])
    for index in (-1, 3):
        with pytest.raises(UploadCorrupted):
            round.server.verify_chunk(ME, index, damaged[:5])
    round.server.verify_chunk(ME, 0, damaged[:CHUNK_VALUES].tobytes())
    round.server.start_adding(ME)
    round.server.add(round.masked[ME], round.total)
    np.testing.assert_array_equal(round.total, before + round.masked[ME])


def test_same_upload_is_not_added_twice_nor_two_at_once() -> None:
    round = opened(consortium(4))
    add(round, ME)
    with pytest.raises(SecondUpload):
        round.server.start_adding(ME)
    for site in ("site-01", "site-02"):
        upload = round.sites[site].upload
        assert upload is not None
        round.server.announce(upload)
    round.server.start_adding("site-01")
    with pytest.raises(SecondUpload):
        round.server.start_adding("site-02")
    with pytest.raises(StageOutOfOrder):
        round.server.close_uploads()


def test_upload_that_was_not_announced_is_refused() -> None:
    round = opened(consortium(3))
    with pytest.raises(SiteMissing):
        round.server.start_adding(ME)
    with pytest.raises(StageOutOfOrder):
        round.server.add(round.masked[ME], round.total)


def test_arrays_of_another_shape_are_refused() -> None:
    round = opened(consortium(3))
    upload = round.sites[ME].upload
    assert upload is not None
    round.server.announce(upload)
    round.server.start_adding(ME)
    with pytest.raises(VectorInvalid):
        round.server.add(round.masked[ME], np.zeros(6, np.uint32))
    with pytest.raises(VectorInvalid):
        round.server.add(round.masked[ME][:3], round.total)
    round.server.start_adding(ME)  # a wrong shape keeps nobody from being added after it
    with pytest.raises(VectorInvalid):
        round.server.add(np.repeat(round.masked[ME], 2)[::2], round.total)
    round.server.start_adding(ME)
    round.server.add(round.masked[ME], round.total)


# --- reveals -----------------------------------------------------------------------------------------------


def test_reveal_that_is_forged_or_for_another_survivor_set_is_refused() -> None:
    world = consortium(4)
    round, survivor_set = uploaded(world)
    reveal = round.sites[ME].reveal(survivor_set)

    def resigned(changed: m.Reveal) -> m.Reveal:
        return replace(changed, signature=world.signers[ME](reveal_message(changed)))

    cases: list[tuple[m.Reveal, type[Exception]]] = [
        (replace(reveal, signature=bytes(64)), RevealForged),
        (replace(reveal, site="site-01"), RevealForged),
        (replace(reveal, site="stranger"), SiteUnknown),
        (replace(reveal, context=bytes(32)), ContextDiffers),
        (resigned(replace(reveal, survivor_set=bytes(32))), ContextDiffers),
        (resigned(replace(reveal, locks=reveal.locks[:3], lock_keys=reveal.lock_keys[:3])), MessageMalformed),
        (resigned(replace(reveal, sealed=bytes(33 * 5 + 16))), MessageMalformed),
    ]
    for bad, error in cases:
        with pytest.raises(error):
            round.server.accept_reveal(bad)
    round.server.accept_reveal(reveal)
    round.server.accept_reveal(reveal)
    assert round.server.revealed == (ME,)


def test_dropped_site_cannot_reveal() -> None:
    world = consortium(4)
    round = opened(world)
    for site in world.sites[:3]:
        add(round, site)
    survivor_set = round.server.close_uploads()
    reveal = round.sites[ME].reveal(survivor_set)
    with pytest.raises(SiteMissing):
        round.server.accept_reveal(replace(reveal, site="site-03"))


def test_unmasking_below_the_threshold_ends_the_round() -> None:
    world = consortium(4)
    round, survivor_set = uploaded(world)
    for site in world.sites[:2]:
        round.server.accept_reveal(round.sites[site].reveal(survivor_set))
    assert not round.server.can_unmask
    with pytest.raises(CohortTooSmall):
        round.server.unmask(round.total, np.empty_like(round.total))
    assert round.server.stage is ServerStage.ABANDONED


@pytest.mark.parametrize("lie", ["shares", "lock keys", "locks", "sealed"])
def test_one_survivor_that_lies_in_its_reveal_does_not_spoil_the_sum(lie: str) -> None:
    world = consortium(5)
    round, survivor_set = uploaded(world)
    liar = round.sites[ME]
    if lie == "shares":
        liar._held = {site: (key, seed) for site, (seed, key) in liar._held.items()}
    reveal = liar.reveal(survivor_set)
    if lie == "lock keys":
        reveal = replace(reveal, lock_keys=(bytes(32),) * 5)
    if lie == "locks":
        reveal = replace(reveal, locks=reveal.locks[::-1])
    if lie == "sealed":
        reveal = replace(reveal, sealed=bytes(len(reveal.sealed)))
    round.server.accept_reveal(replace(reveal, signature=world.signers[ME](reveal_message(reveal))))
    out = round.reveal(survivor_set, world.sites[1:])
    np.testing.assert_array_equal(out, exact_sum(round.vectors, world.sites))


def test_dealer_whose_shares_are_not_those_it_announced_ends_the_round() -> None:
    world = consortium(4)
    round = Round.start(world)
    key_set = round.keys(world.sites)
    dealer = round.sites[ME]
    shares = dealer.deal(key_set)
    round.server.accept_shares(replace(shares, seed_digests=shares.key_digests))
    openings = round.deal(key_set, world.sites[1:])
    survivor_set = round.upload(openings, world.sites)
    with pytest.raises(ShareWrong, match="seed of site-00") as caught:
        round.reveal(survivor_set, world.sites)
    assert round.server.stage is ServerStage.ABANDONED
    assert caught.value.site == ME, "more shares are wrong than holders can be liars"


def test_a_liar_and_a_silent_site_do_not_lay_their_lies_at_a_dealers_door() -> None:
    world = consortium(4)
    round, survivor_set = uploaded(world)
    liar, silent = round.sites["site-02"], "site-03"
    liar._held = {site: (key, seed) for site, (seed, key) in liar._held.items()}
    with pytest.raises(ShareWrong) as caught:
        round.reveal(survivor_set, [site for site in world.sites if site != silent])
    assert caught.value.site == ""


@pytest.mark.parametrize("secret", ["seed", "key"])
def test_dealer_that_shares_another_secret_than_it_advertised_ends_the_round(secret: str) -> None:
    world = consortium(4)
    round = Round.start(world)
    key_set = round.keys(world.sites)
    dealer, other = round.sites[ME], Round.start(world).sites["site-01"]
    dealer.deal(key_set)
    other.deal(key_set)
    dealer._dealt = dict(other._dealt)
    openings = round.deal(key_set, world.sites)
    survivor_set = round.upload(openings, world.sites if secret == "seed" else world.sites[1:])
    with pytest.raises(SecretWrong, match=f"{secret} of site-00"):
        round.reveal(survivor_set, survivor_set.sites)


def test_the_sum_is_written_beside_the_total_not_over_it() -> None:
    world = consortium(3)
    round, survivor_set = uploaded(world)
    for site in world.sites:
        round.server.accept_reveal(round.sites[site].reveal(survivor_set))
    with pytest.raises(VectorInvalid):
        round.server.unmask(round.total, round.total)
    before, out = round.total.copy(), np.empty_like(round.total)
    round.server.unmask(round.total, out)
    np.testing.assert_array_equal(round.total, before)
    np.testing.assert_array_equal(out, exact_sum(round.vectors, world.sites))


# --- crash and end -----------------------------------------------------------------------------------------


def revived(world: Consortium, server: ServerRound) -> ServerRound:
    """Restart: the state goes through a file as JSON."""
    state = json.loads(json.dumps(server.to_json()))
    return ServerRound.from_json(state, terms=world.terms, identities=world.identities)


def test_server_restarted_after_every_step_gives_the_same_sum(tmp_path: Path) -> None:
    world = consortium(5, length=100)
    round = Round.start(world)
    round.total = np.memmap(tmp_path / "total", np.uint32, "w+", shape=(100,))

    def restart() -> None:
        stage = round.server.stage
        round.server = revived(world, round.server)
        assert round.server.stage is stage

    def restarting(accept: Callable[[], None]) -> None:
        restart()
        accept()
        restart()

    for site in world.sites:
        restarting(lambda site=site: round.server.accept_keys(round.sites[site].advertise()))  # type: ignore[misc]
    key_set = round.server.close_keys()
    for site in world.sites:
        restarting(lambda site=site: round.server.accept_shares(round.sites[site].deal(key_set)))  # type: ignore[misc]
    openings = round.server.close_shares(adapter=ADAPTER)
    restart()
    assert round.server.openings() == openings
    for site in world.sites[:4]:
        round.sites[site].open(openings[site], adapter=ADAPTER)
        round.masked[site] = round.vectors[site].copy()
        round.sites[site].mask(round.masked[site])
        restarting(lambda site=site: add(round, site))  # type: ignore[misc]
    survivor_set = round.server.close_uploads()
    restart()
    assert round.server.survivor_set == survivor_set
    for site in world.sites[:4]:
        reveal = round.sites[site].reveal(survivor_set)
        restarting(lambda reveal=reveal: round.server.accept_reveal(reveal))  # type: ignore[misc]
    assert round.server.can_unmask
    out = np.empty(100, np.uint32)
    round.server.unmask(round.total, out)
    np.testing.assert_array_equal(out, exact_sum(round.vectors, world.sites[:4]))
    restart()
    assert round.server.stage is ServerStage.DONE


def test_crash_while_adding_abandons_the_round_by_name() -> None:
    world = consortium(3)
    round = opened(world)
    upload = round.sites[ME].upload
    assert upload is not None
    round.server.announce(upload)
    round.server.start_adding(ME)
    server = revived(world, round.server)
    assert server.stage is ServerStage.ABANDONED
    with pytest.raises(RoundAbandoned, match="SumInterrupted"):
        server.close_uploads()
    assert revived(world, server).reason == server.reason


def test_crash_while_unmasking_is_repeated_from_the_total() -> None:
    world = consortium(4)
    round, survivor_set = uploaded(world)
    for site in world.sites:
        round.server.accept_reveal(round.sites[site].reveal(survivor_set))
    stored, half_written = revived(world, round.server), np.full_like(round.total, 7)
    round.server.unmask(round.total, half_written)
    half_written[::2] = 9
    stored.unmask(round.total, half_written)
    np.testing.assert_array_equal(half_written, exact_sum(round.vectors, world.sites))


def test_steps_out_of_order_are_refused() -> None:
    world = consortium(3)
    server = world.server()
    with pytest.raises(StageOutOfOrder):
        server.close_shares(adapter=ADAPTER)
    with pytest.raises(StageOutOfOrder):
        server.close_uploads()
    with pytest.raises(StageOutOfOrder):
        server.unmask(np.zeros(5, np.uint32), np.zeros(5, np.uint32))
    with pytest.raises(StageOutOfOrder):
        _ = server.survivor_set
    round, survivor_set = uploaded(world)
    round.reveal(survivor_set, world.sites)
    with pytest.raises(StageOutOfOrder):
        round.server.abandon("too late")
