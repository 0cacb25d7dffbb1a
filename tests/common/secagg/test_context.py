"""What a round is bound to: every part of it changes the digests, and impossible terms are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.secagg.context import Terms, context_digest, setup_digest, threshold
from common.secagg.masking import MAX_LENGTH
from common.secagg.messages import KeySet
from tests.common.secagg.consortium import ADAPTER, OTHER_ADAPTER, consortium


def test_every_term_changes_the_digest() -> None:
    terms = consortium(3).terms
    changed = [
        replace(terms, study="ab" * 32),
        replace(terms, configuration="ab" * 32),
        replace(terms, round=8),
        replace(terms, attempt=1),
        replace(terms, length=6),
        replace(terms, floor=3),
    ]
    assert len({t.digest() for t in (terms, *changed)}) == 7


def test_keys_adapter_and_roster_change_the_context() -> None:
    world = consortium(4)
    keys = tuple(world.site(site).advertise() for site in world.sites)
    setups = [setup_digest(world.terms, KeySet(k)) for k in (keys, keys[:3], keys[1:])]
    contexts = [context_digest(setup, adapter=ADAPTER, roster=world.sites[:3]) for setup in setups]
    contexts.append(context_digest(setups[0], adapter=OTHER_ADAPTER, roster=world.sites[:3]))
    contexts.append(context_digest(setups[0], adapter=ADAPTER, roster=world.sites))
    assert len(set(contexts)) == 5


@pytest.mark.parametrize("sites", range(2, 65))
def test_threshold_is_the_least_number_above_two_thirds(sites: int) -> None:
    assert 3 * threshold(sites) > 2 * sites >= 3 * (threshold(sites) - 1)
    colluding = (sites + 1) // 3
    assert 2 * threshold(sites) > sites + colluding


@pytest.mark.parametrize(("length", "floor"), [(0, 2), (MAX_LENGTH + 1, 2), (5, 1), (5, 65)])
def test_impossible_terms_are_refused(length: int, floor: int) -> None:
    with pytest.raises(ValueError, match="length"):
        replace(consortium(3).terms, length=length, floor=floor)


@pytest.mark.parametrize("value", ["ab" * 31, "AB" * 32, "ab" * 33, "zz" * 32])
def test_hashes_in_another_form_are_refused(value: str) -> None:
    terms: Terms = replace(consortium(3).terms, study=value)
    with pytest.raises(ValueError):
        terms.digest()
