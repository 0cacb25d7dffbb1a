"""Discrete Gaussian noise against its exact distribution."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import GeneratorReused, NoiseInvalid
from common.privacy import noise
from common.privacy.noise import discrete_gaussian, discrete_gaussian_chunks
from common.privacy.sampling import Csprng
from tests.common.privacy import checks


def probabilities(sigma: float, reach: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.7, 64.0])
def test_small_widths_match_the_exact_probabilities(sigma: float) -> None:
    size = 400_000
    values = discrete_gaussian(Csprng.for_test(int(sigma * 10)), sigma=sigma, size=size)
    reach = max(2, math.ceil(3.5 * sigma))
    expected = probabilities(sigma, 4 * reach)[3 * reach : 5 * reach + 1] * size
    counts = np.array([(values == k).sum() for k in range(-reach, reach + 1)], dtype=np.float64)
    rest = size - counts.sum(), size - expected.sum()
    keep = expected > 20
    statistic = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
    assert stats.chi2.sf(statistic, df=int(keep.sum())) > 1e-9
    assert abs(rest[0] - rest[1]) < 8 * math.sqrt(max(rest[1], 1)) + 8


@pytest.mark.parametrize("sigma", [2048.0, 2049.0, 2.0**18, 2.0**20, 2.0**26])
def test_large_widths_pass_chi_square_and_kolmogorov_smirnov(sigma: float) -> None:
    size = 300_000
    values = discrete_gaussian(Csprng.for_test(7), sigma=sigma, size=size).astype(np.float64)
    edges = stats.norm.ppf(np.linspace(0, 1, 257)[1:-1]) * sigma
    counts = np.bincount(np.searchsorted(np.floor(edges), values, side="right"), minlength=256)
    exact = np.diff(np.concatenate([[0.0], stats.norm.cdf((np.floor(edges) - 0.5) / sigma), [1.0]]))
    assert stats.chisquare(counts, exact / exact.sum() * size).pvalue > 1e-9
    assert stats.kstest(values / sigma, "norm").pvalue > 1e-9
    for modulus in (256, max(2, noise._parts(sigma).factor)):  # the lattice of the two parts leaves no trace
        rest = np.bincount((values % modulus).astype(int), minlength=modulus)
        assert stats.chisquare(rest).pvalue > 1e-9


@pytest.mark.parametrize("sigma", [0.3, 64.0, 2.0**20])
def test_width_and_shape_of_a_vector(sigma: float) -> None:
    if sigma >= 64:
        checks.check_noise_width(
            lambda zeros: discrete_gaussian(Csprng.for_test(3), sigma=sigma, size=zeros.size), sigma
        )
    else:
        values = discrete_gaussian(Csprng.for_test(3), sigma=sigma, size=200_000)
        exact = float((np.arange(-9, 10) ** 2 * probabilities(sigma, 9)).sum())
        assert values.var() == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("sigma", [0.37, 5.25, 93.1, 2100.0])
def test_table_thresholds_are_right_to_128_bits(sigma: float) -> None:
    table = noise._table(sigma)
    with mpmath.workprec(400):
        width = mpmath.mpf(sigma)
        weights = [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * width**2)) for k in range(table.reach + 1)]
        total = weights[0] + 2 * mpmath.fsum(weights[1:])
        below = mpmath.mpf(0)
        for i, k in enumerate(range(-table.reach, table.reach)):
            below += weights[abs(k)] / total
            if i % 97 == 0 or abs(k) < 20:
                got = (int(table.high[i]) << 64) + int(table.low[i])
                assert abs(got - below * 2**128) <= 2
        tail = mpmath.erfc(mpmath.mpf(table.reach) / (width * mpmath.sqrt(2)))
        assert tail < mpmath.mpf(2) ** -125


def test_exponential_in_fixed_point_is_right_to_300_bits() -> None:
    for x in (Fraction(1, 10**9), Fraction(1, 3), Fraction(7, 2), Fraction(200)):
        with mpmath.workprec(500):
            exact = mpmath.exp(-mpmath.mpf(x.numerator) / x.denominator)
            assert abs(noise._exp_negative(x) - exact * mpmath.mpf(2) ** noise._FRACTION_BITS) < 2**20


def test_two_tables_together_are_one_discrete_gaussian() -> None:
    """The exact distribution of x + K*y, summed out, against the discrete Gaussian it stands for."""
    sigma, factor = 300.0, 8
    inner = 4.2 * factor
    outer = math.sqrt(sigma**2 - inner**2) / factor
    y_reach = math.ceil(13.5 * outer)
    y = probabilities(outer, y_reach)
    z = np.arange(-1500, 1501)
    total = np.zeros(z.size)
    for k, p in zip(range(-y_reach, y_reach + 1), y, strict=True):
        total += p * np.exp(-((z - factor * k) ** 2) / (2 * inner**2))
    total /= np.exp(-(np.arange(-3000, 3001) ** 2) / (2 * inner**2)).sum()
    exact = probabilities(sigma, 4000)[2500:5501]
    assert np.abs(total / exact - 1).max() < 1e-11


def test_a_word_on_a_threshold_is_decided_by_64_more_bits() -> None:
    class Fixed:
        def __init__(self, word: int) -> None:
            self.word = word

        def words(self, count: int) -> np.ndarray:
            return np.full(count, self.word, dtype=np.uint64)

    table = noise._table(5.0)
    for i in (table.reach, table.reach + 3, table.reach - 20):
        word, low = table.high[i : i + 1], int(table.low[i])
        assert noise._draw(table, word, Fixed(low))[0] == i + 1 - table.reach  # type: ignore[arg-type]
        assert noise._draw(table, word, Fixed(low - 1))[0] == i - table.reach  # type: ignore[arg-type]
        assert noise._draw(table, word - np.uint64(1), Fixed(0))[0] == i - table.reach  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 200_000), st.sampled_from([1.5, 2.0**20]))
def test_streamed_noise_is_the_same_noise(size: int, sigma: float) -> None:
    whole = discrete_gaussian(Csprng.for_test(size), sigma=sigma, size=size)
    parts = list(discrete_gaussian_chunks(Csprng.for_test(size), sigma=sigma, size=size))
    assert whole.dtype == np.int32
    assert np.array_equal(whole, np.concatenate([*parts, np.empty(0, np.int32)]))


def test_values_are_the_same_on_every_machine() -> None:
    values = discrete_gaussian(Csprng(bytes(32)), sigma=2.0**20, size=70_000)
    assert hashlib.sha256(values.astype("<i4").tobytes()).hexdigest() == KNOWN


KNOWN = "f48b4be52e7b7d1605a4d58a87fcc43d650ec7359c9bc1dcc40a6fb1aa2baafa"


def test_one_generator_gives_noise_once_per_purpose() -> None:
    csprng = Csprng.for_test(0)
    first = discrete_gaussian(csprng, sigma=5.0, size=100)
    with pytest.raises(GeneratorReused):
        discrete_gaussian(csprng, sigma=5.0, size=100)
    second = discrete_gaussian(csprng, sigma=5.0, size=100, purpose="server noise")
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("sigma", [0.0, 0.05, -1.0, 2.0**28, float("nan"), float("inf")])
def test_a_width_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(NoiseInvalid, match="width"):
        discrete_gaussian(Csprng.for_test(0), sigma=sigma, size=1)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(NoiseInvalid, match="size"):
        list(discrete_gaussian_chunks(Csprng.for_test(0), sigma=1.0, size=-1))


def hockey_stick_discrete(sigma: float, shift: int, epsilon: float) -> float:
    k = np.arange(-40 * math.ceil(sigma), 40 * math.ceil(sigma))
    total = np.exp(-(k**2) / (2 * sigma**2)).sum()
    p, q = (np.exp(-((k - s) ** 2) / (2 * sigma**2)) / total for s in (shift, 0))
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def hockey_stick_continuous(sigma: float, shift: int, epsilon: float) -> float:
    mu = shift / sigma
    return float(
        stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    )


@pytest.mark.parametrize("sigma", [10.0, 64.0])
@pytest.mark.parametrize("multiplier", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
def test_discrete_noise_is_as_private_as_the_continuous_noise_it_is_accounted_as(
    sigma: float, multiplier: float, epsilon: float
) -> None:
    """delta(epsilon) of the integers is at most that of the reals with 16 units^2 less variance."""
    shift = round(sigma / multiplier)
    accounted = hockey_stick_continuous(math.sqrt(sigma**2 - 16), shift, epsilon)
    assert hockey_stick_discrete(sigma, shift, epsilon) <= accounted + 1e-14
