"""Seeds, keystreams and the draw of patients."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.errors import GeneratorReused, SamplingInvalid, TestRandomness
from common.privacy import sampling
from common.privacy.sampling import Csprng, Keystream, poisson_sample, studies_of
from tests.common.privacy import checks

PEOPLE = [f"p{i:05d}" for i in range(2000)]


def test_draws_are_poisson() -> None:
    checks.check_draws_are_poisson(lambda s, people, rate: poisson_sample(Csprng.for_test(s), people, rate))


def test_keystream_is_aes_256_ctr() -> None:
    """Counter blocks 0 and 1, big-endian, through the bare block cipher."""
    key = bytes(range(32))
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    expected = block.update(bytes(16)) + block.update((1).to_bytes(16, "big"))
    assert Keystream(key).words(4).tobytes() == expected


def test_streams_are_the_same_on_every_machine_and_differ_by_seed_and_purpose() -> None:
    words = {
        (seed, purpose): Csprng(bytes([seed]) * 32).stream(purpose).words(2).tobytes().hex()
        for seed in (0, 1)
        for purpose in ("patients", "noise")
    }
    assert len(set(words.values())) == 4
    assert words[0, "patients"] == KNOWN


KNOWN = "e30bf6393dcc71f3cfbdee3f67169c61"


def test_a_purpose_is_drawn_once() -> None:
    checks.check_a_purpose_is_drawn_once(sampling)


def test_one_generator_draws_patients_once() -> None:
    csprng = Csprng.for_test(0)
    poisson_sample(csprng, PEOPLE, 0.1)
    with pytest.raises(GeneratorReused, match="patients"):
        poisson_sample(csprng, PEOPLE, 0.1)


def test_one_generator_chooses_a_patients_studies_once() -> None:
    csprng = Csprng.for_test(0)
    studies_of(csprng, ["a", "b", "c"], 2)
    studies_of(csprng, ["d", "e", "f"], 2)
    with pytest.raises(GeneratorReused):
        studies_of(csprng, ["a", "b", "c"], 2)


def test_a_generator_cannot_be_copied_pickled_or_derived_twice() -> None:
    csprng = Csprng.for_test(0)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(GeneratorReused):
            duplicate(csprng)
    child = csprng.child("step 1")
    assert child.stream("noise").words(1) != csprng.stream("noise").words(1)
    with pytest.raises(GeneratorReused):
        csprng.child("step 1")


def test_randomness_seeded_for_a_test_is_not_releasable_nor_are_its_children() -> None:
    Csprng.from_os().verify_releasable()
    with pytest.raises(TestRandomness):
        Csprng.for_test(0).verify_releasable()
    with pytest.raises(TestRandomness):
        Csprng.for_test(0).child("step 1").verify_releasable()


def test_two_generators_of_the_operating_system_differ() -> None:
    assert Csprng.from_os().stream("x").words(4).tobytes() != Csprng.from_os().stream("x").words(4).tobytes()


@given(st.integers(0, 2**32), st.floats(1e-6, 1.0))
def test_the_same_seed_draws_the_same_patients_in_order(seed: int, rate: float) -> None:
    first = poisson_sample(Csprng.for_test(seed), PEOPLE, rate)
    assert first == poisson_sample(Csprng.for_test(seed), PEOPLE, rate)
    assert first == sorted(set(first) & set(PEOPLE))


def test_rate_one_draws_everyone_and_a_tiny_rate_no_one() -> None:
    assert poisson_sample(Csprng.for_test(0), PEOPLE, 1.0) == PEOPLE
    assert poisson_sample(Csprng.for_test(0), PEOPLE, 1e-18) == []
    assert poisson_sample(Csprng.for_test(0), [], 0.5) == []


def test_the_threshold_is_exact_to_two_to_the_minus_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word below rate * 2^64 draws, one at it does not."""
    import numpy as np

    threshold = 3 << 61  # 0.375
    words = np.array([threshold - 1, threshold, 0, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(Keystream, "words", lambda self, count: words[:count])
    assert poisson_sample(Csprng.for_test(0), ["a", "b", "c", "d"], 0.375) == ["a", "c"]


@pytest.mark.parametrize("people", [["b", "a"], ["a", "a"]])
def test_unsorted_or_repeated_patients_are_refused(people: list[str]) -> None:
    with pytest.raises(SamplingInvalid, match="sorted"):
        poisson_sample(Csprng.for_test(0), people, 0.5)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(rate: float) -> None:
    with pytest.raises(SamplingInvalid, match="rate"):
        poisson_sample(Csprng.for_test(0), PEOPLE, rate)


def test_a_seed_of_another_length_is_refused() -> None:
    with pytest.raises(SamplingInvalid, match="32 bytes"):
        Csprng(b"short")


def test_every_choice_of_studies_is_equally_likely() -> None:
    studies = ["a", "b", "c", "d"]
    choices = list(itertools.combinations(studies, 2))
    counts = dict.fromkeys(choices, 0)
    for seed in range(3000):
        counts[tuple(studies_of(Csprng.for_test(seed), studies, 2))] += 1  # type: ignore[index]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-9


def test_few_studies_are_all_taken_and_wrong_calls_refused() -> None:
    assert studies_of(Csprng.for_test(0), ["b", "a"], 2) == ["b", "a"]
    with pytest.raises(SamplingInvalid, match="at least 1"):
        studies_of(Csprng.for_test(0), ["a"], 0)
    with pytest.raises(SamplingInvalid, match="repeats"):
        studies_of(Csprng.for_test(0), ["a", "a"], 1)


@given(st.integers(1, 2**64))
def test_integers_stay_below_their_bound(bound: int) -> None:
    stream = Csprng.for_test(bound).stream("x")
    assert all(0 <= stream.below(bound) < bound for _ in range(3))
