"""Discrete Gaussian noise on integers, from the AES-CTR keystream, fast enough for every trainable weight.

Small widths are drawn by inverting a table of the cumulative distribution with 128-bit thresholds: 64 bits
decide, 64 more are drawn on a tie. Large widths are a sum x + K*y of two table draws (Micciancio & Walter,
CRYPTO 2017), with sigma_x^2 + K^2 sigma_y^2 = sigma^2 and sigma_x >= 4.2 K.

Guarantees: the statistical distance of one value from the discrete Gaussian is at most 2^-108: table rounding
and the tail beyond 13.5 sigma give 2^-109 for the two tables together (support below 2^20 each), the sum
gives 4*exp(-2 pi^2 * 4^2) < 2^-450. For 2^26 values in each of 2^12 rounds that is 2^-70 in total, which
delta has to spare. The same keystream gives the same values on every machine.

It does not run in constant time: a co-resident observer of the cache could learn about the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import NoiseInvalid
from common.privacy.sampling import Csprng, Keystream

BLOCK_VALUES = 1 << 16
MAX_SIGMA = float(1 << 27)
_TABLE_SIGMA = 2048.0  # up to here one table is enough
_CUT = 13.5  # the tail beyond 13.5 sigma weighs less than 2^-130
_INDEX_BITS = 20
_FRACTION_BITS = 320
_AMBIGUOUS = np.iinfo(np.int32).min


class _Table(NamedTuple):
    """Cumulative distribution of a discrete Gaussian on [-reach, reach], in units of 2^-128."""

    reach: int
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    values: NDArray[np.int32]  # by the first 20 bits: the value, or _AMBIGUOUS


class _Parts(NamedTuple):
    """How one width is drawn: x, or x + factor * y."""

    x: _Table
    y: _Table | None
    factor: int


def discrete_gaussian(
    csprng: Csprng, *, sigma: float, size: int, purpose: str = "noise"
) -> NDArray[np.int32]:
    """Draw `size` independent integers with P(k) proportional to exp(-k^2 / (2 sigma^2)).

    sigma in integer units, 0.1 <= sigma <= 2^27 -> int32 [size]. Raises NoiseInvalid and GeneratorReused.
    """
    out = np.empty(size, dtype=np.int32)
    start = 0
    for chunk in discrete_gaussian_chunks(csprng, sigma=sigma, size=size, purpose=purpose):
        out[start : start + chunk.size] = chunk
        start += chunk.size
    return out


def discrete_gaussian_chunks(
    csprng: Csprng, *, sigma: float, size: int, purpose: str = "noise"
) -> Iterator[NDArray[np.int32]]:
    """The values of `discrete_gaussian` in blocks of 65,536, for vectors that are streamed."""
    if not 0.1 <= sigma <= MAX_SIGMA:
        raise NoiseInvalid(f"noise width must be between 0.1 and 2^27 units, got {sigma}")
    if size < 0:
        raise NoiseInvalid(f"size must not be negative, got {size}")
    parts = _parts(sigma)
    words, ties = csprng.stream(f"{purpose}:words"), csprng.stream(f"{purpose}:ties")
    return _blocks(parts, words, ties, size)


def _blocks(parts: _Parts, words: Keystream, ties: Keystream, size: int) -> Iterator[NDArray[np.int32]]:
    for start in range(0, size, BLOCK_VALUES):
        count = min(BLOCK_VALUES, size - start)
        values = _draw(parts.x, words.words(count), ties)
        if parts.y is not None:
            values += np.int32(parts.factor) * _draw(parts.y, words.words(count), ties)
        yield values


def _draw(table: _Table, words: NDArray[np.uint64], ties: Keystream) -> NDArray[np.int32]:
    values: NDArray[np.int32] = table.values[(words >> np.uint64(64 - _INDEX_BITS)).astype(np.intp)]
    unsure = np.flatnonzero(values == _AMBIGUOUS)
    if unsure.size:
        drawn = words[unsure]
        found = np.searchsorted(table.high, drawn, side="right")
        for i in np.flatnonzero((found > 0) & (table.high[np.maximum(found - 1, 0)] == drawn)):
            # The word equals a threshold's upper half: 64 more bits say on which side of it.
            more = ties.words(1)[0]
            while found[i] > 0 and table.high[found[i] - 1] == drawn[i] and table.low[found[i] - 1] > more:
                found[i] -= 1
        values[unsure] = found - table.reach
    return values


@lru_cache(maxsize=8)
def _parts(sigma: float) -> _Parts:
    if sigma <= _TABLE_SIGMA:
        return _Parts(_table(sigma), None, 0)
    factor = round(math.sqrt(sigma / 4.2))
    inner = 4.2 * factor
    return _Parts(_table(inner), _table(math.sqrt(sigma * sigma - inner * inner) / factor), factor)


def _table(sigma: float) -> _Table:
    reach = math.ceil(_CUT * sigma) + 2
    weights = _weights(sigma, reach)
    total = weights[0] + 2 * sum(weights[1:])
    high, low, below = [], [], 0
    for k in range(-reach, reach + 1):
        below += weights[abs(k)]
        threshold = min((below << 128) // total, (1 << 128) - 1)
        high.append(threshold >> 64)
        low.append(threshold & ((1 << 64) - 1))
    thresholds = np.array(high, dtype=np.uint64)
    first = np.arange(1 << _INDEX_BITS, dtype=np.uint64) << np.uint64(64 - _INDEX_BITS)
    last = first + np.uint64((1 << (64 - _INDEX_BITS)) - 1)
    # A word equal to a threshold's upper half is undecided: a cell is sure only without a threshold in it.
    at_first = np.searchsorted(thresholds, first, side="left")
    at_last = np.searchsorted(thresholds, last, side="right")
    index = (at_first - reach).astype(np.int32)
    index[at_first != at_last] = _AMBIGUOUS
    return _Table(reach, thresholds, np.array(low, dtype=np.uint64), index)


def _weights(sigma: float, reach: int) -> list[int]:
    """exp(-k^2 / (2 sigma^2)) for k = 0..reach in fixed point, absolute error below 2^-280."""
    variance = Fraction(sigma) ** 2
    step, square = _exp_negative(1 / (2 * variance)), _exp_negative(1 / variance)
    weights = [1 << _FRACTION_BITS]
    for _ in range(reach):
        weights.append(weights[-1] * step >> _FRACTION_BITS)
        step = step * square >> _FRACTION_BITS
    return weights


def _exp_negative(x: Fraction) -> int:
    """exp(-x) for x > 0 in fixed point, by Taylor series after halving x below 1/2."""
    halvings = max(0, (x.numerator // x.denominator).bit_length() + 1)
    extra = _FRACTION_BITS + 2 * halvings + 16
    small = (x.numerator << extra) // (x.denominator << halvings)
    total = term = 1 << extra
    for n in range(1, 200):
        term = -(term * small >> extra) // n
        total += term
        if term in (0, -1):
            break
    for _ in range(halvings):
        total = total * total >> extra
    return total >> (extra - _FRACTION_BITS)
