"""A site's machines of secure aggregation across restarts: the same step never gives two results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.masking import MaskedRounds
from client.secagg import SiteStage
from common.errors import SecondUpload, StageOutOfOrder
from common.identity import load_key
from common.model.lora import vector_size
from common.secagg.messages import KeySet, format_keys, format_reveal, format_shares, format_upload
from common.secagg.study_terms import round_terms
from server.secagg import ServerRound
from tests.simulator import SITES, Consortium, build

ADAPTER = hashlib.sha256(b"adapter").hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("masking"), mode="consortium")


Rounds = Callable[[str], MaskedRounds]


@pytest.fixture
def rounds(world: Consortium, tmp_path: Path) -> Rounds:
    """A site's rounds as a process that has just started finds them; its randomness is new each time."""
    count = iter(range(1 << 30))

    def make(site: str) -> MaskedRounds:
        return MaskedRounds(
            tmp_path / site, study=world.study, site=site,
            key=load_key(world.out / "sites" / site / "keys" / "message.key"),
            random_bytes=lambda size: hashlib.sha256(str(next(count)).encode()).digest()[:size],
        )  # fmt: skip

    return make


def dealt(world: Consortium, rounds: Rounds) -> tuple[ServerRound, KeySet]:
    """Bring all sites' machines of round 0 to OPENED, each through a restart after every step."""
    server = ServerRound(
        round_terms(world.study, round=0, attempt=1), {s.id: s.message_key for s in world.study.cohort.site}
    )
    for site in SITES:
        server.accept_keys(rounds(site).machine(0, 1).advertise())
    key_set = server.close_keys()
    for site in SITES:
        own = rounds(site)
        server.accept_shares(own.machine(0, 1).deal(key_set))
        own.store(0, 1)
    for site, opening in server.close_shares(adapter=ADAPTER).items():
        own = rounds(site)
        own.machine(0, 1).open(opening, adapter=ADAPTER)
        own.store(0, 1)
    return server, key_set


def vector(world: Consortium, seed: int = 1) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    size = vector_size(world.study.adapter.tensors)
    return np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)


def test_a_machine_is_durable_before_its_keys_are_sent(rounds: Rounds) -> None:
    first = format_keys(rounds("alpha").machine(0, 1).advertise())
    assert format_keys(rounds("alpha").machine(0, 1).advertise()) == first
    assert format_keys(rounds("alpha").machine(0, 2).advertise()) != first
    assert format_keys(rounds("alpha").machine(1, 1).advertise()) != first


def test_every_step_gives_the_same_bytes_after_a_restart(world: Consortium, rounds: Rounds) -> None:
    server, key_set = dealt(world, rounds)
    shares = format_shares(rounds("alpha").machine(0, 1).deal(key_set))
    assert format_shares(rounds("alpha").machine(0, 1).deal(key_set)) == shares
    total = np.zeros_like(vector(world))
    for number, site in enumerate(SITES):
        masked, again = vector(world, number), vector(world, number)
        upload = rounds(site).mask(0, 1, masked)
        assert format_upload(rounds(site).mask(0, 1, again)) == format_upload(upload)
        assert np.array_equal(masked, again)
        server.announce(upload)
        server.start_adding(site)
        server.add(masked, total)
    survivors = server.close_uploads()
    for site in SITES:
        own = rounds(site)
        reveal = own.machine(0, 1).reveal(survivors)
        own.store(0, 1)
        assert format_reveal(rounds(site).machine(0, 1).reveal(survivors)) == format_reveal(reveal)
        server.accept_reveal(reveal)
    out = np.empty_like(total)
    server.unmask(total, out)
    expected = sum((vector(world, n) for n in range(4)), np.zeros_like(total))
    assert np.array_equal(out, expected)


def test_a_second_vector_is_refused_also_after_a_restart(world: Consortium, rounds: Rounds) -> None:
    dealt(world, rounds)
    rounds("alpha").mask(0, 1, vector(world))
    with pytest.raises(SecondUpload):
        rounds("alpha").mask(0, 1, vector(world, 2))
    assert rounds("alpha").machine(0, 1).stage is SiteStage.MASKED


def test_a_vector_before_its_opening_is_refused(world: Consortium, rounds: Rounds) -> None:
    with pytest.raises(StageOutOfOrder):
        rounds("alpha").mask(0, 1, vector(world))


def test_machines_behind_are_erased_with_their_secrets(rounds: Rounds, tmp_path: Path) -> None:
    own = rounds("alpha")
    for round in range(3):
        own.machine(round, 1)
    own.forget_before(2)
    assert [path.name for path in (tmp_path / "alpha").iterdir()] == ["000002-1.json"]
    assert own.machine(1, 1).stage is SiteStage.ADVERTISED  # a new one: the old is gone


def test_secrets_are_readable_by_their_owner_only(rounds: Rounds, tmp_path: Path) -> None:
    rounds("alpha").machine(0, 1)
    assert (tmp_path / "alpha").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "alpha").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
