"""Is this picture a frontal chest radiograph as this site makes them? Learned from the site's own images.

Three scores from two sources: how far edges and shades lie from the site's own pictures (Mahalanobis in a
whitened subspace, and what that subspace cannot express), the same for the frozen vision tower's features,
and a logistic score between the site's pictures and spoiled copies of them (turned, inverted, cut, scrambled)
and drawn ones. Each is divided by its own high quantile; the score is the largest.

Guarantees: the threshold is a quantile of scores of own pictures that were not fitted on (cross-fitting), so
the false refusals on pictures of the same kind are what was asked for, up to sampling; calibration is
reproducible from the pictures and the seed. It does not judge quality, positioning or whose chest it is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import GuardNotCalibrated

Floats = NDArray[np.float32]
Gray = NDArray[np.uint8]

LEAST_PICTURES = 40
SIDE = 96
_CELLS, _BINS, _COARSE = 8, 8, 12
_FOLDS = 4
# The share of own pictures refused that is aimed at, and of the room up to spoiled ones given away. Chosen on
# other pictures and strangers than measured on: "The guard" in docs/results.md.
FALSE_REFUSALS, SHARED = 0.005, 0.2
_SEED = 8


@dataclass(frozen=True)
class Whitened:
    """A Gaussian in a subspace: `mean` [D], `axes` [K, D] scaled to unit spread, the rest's own spread."""

    mean: Floats
    axes: Floats
    rest: float

    def score(self, rows: Floats) -> Floats:
        """Root of the mean squared deviation, within the subspace and outside it."""
        centred = rows - self.mean
        inside = centred @ self.axes.T
        scale = (self.axes**2).sum(1)
        outside = (centred**2).sum(1) - ((inside**2) / scale).sum(1)
        squared = (inside**2).mean(1) + np.maximum(outside, 0) / self.rest
        found: Floats = np.sqrt(squared / 2)
        return found


@dataclass(frozen=True)
class ImageGuard:
    """A calibrated guard: arrays only, so that it is stored without pickle."""

    looks: Whitened
    tower: Whitened
    mean: Floats
    spread: Floats
    weights: Floats
    bias: float
    scales: tuple[float, float, float]
    threshold: float
    pictures: int

    def score(self, looks: Floats, tower: Floats) -> Floats:
        """Score pictures by their looks [N, L] and tower features [N, T]; above `threshold` is refused."""
        found: Floats = (_parts(self, looks, tower) / np.array(self.scales, np.float32)).max(1)
        return found


def look(gray: Gray, *, colour: float = 0.0) -> Floats:
    """Describe a picture, uint8 [H, W], by shades, edges and how coloured it came; float32 [L]."""
    small = _resized(gray, SIDE).astype(np.float32)
    flat = _equalized(small)
    gy, gx = np.gradient(flat)
    strength = np.hypot(gx, gy)
    angle = (np.arctan2(gy, gx) % (2 * np.pi)) * (_BINS / (2 * np.pi))
    bins = np.minimum(angle.astype(int), _BINS - 1)
    cell = SIDE // _CELLS
    hog = np.zeros((_CELLS, _CELLS, _BINS), np.float32)
    for number in range(_BINS):
        held = np.where(bins == number, strength, 0.0)
        hog[:, :, number] = held.reshape(_CELLS, cell, _CELLS, cell).sum((1, 3))
    hog /= hog.sum(2, keepdims=True) + 0.02 * hog.sum() / hog[..., 0].size + 1e-6
    coarse = flat.reshape(_COARSE, SIDE // _COARSE, _COARSE, SIDE // _COARSE).mean((1, 3))
    share = strength.reshape(_CELLS, cell, _CELLS, cell).mean((1, 3))
    share = share / (share.mean() + 1e-6)
    mirrored = _correlation(coarse, coarse[:, ::-1])
    fine = np.abs(np.diff(small, axis=1)).mean() + np.abs(np.diff(small, axis=0)).mean()
    levels = np.bincount(_resized(gray, SIDE).ravel(), minlength=256) / small.size
    entropy = -(levels[levels > 0] * np.log(levels[levels > 0])).sum()
    ratio = np.log(gray.shape[0] / gray.shape[1])
    stats = np.array(
        [
            small.mean() / 255,
            small.std() / 255,
            mirrored,
            np.log1p(fine),
            entropy / np.log(256),
            levels.max(),
            2 * ratio,
            10 * colour,
            _correlation(small[:-4], small[4:]),
        ],
        np.float32,
    )
    return np.concatenate([2 * coarse.ravel(), hog.ravel(), 0.5 * share.ravel(), 3 * stats]).astype(
        np.float32
    )


def tower_vector(features: Floats) -> Floats:
    """Summarise the tower's features [N, D] of one picture: mean and spread over places, [2 D]."""
    return np.concatenate([features.mean(0), features.std(0)]).astype(np.float32)


def spoiled(gray: Gray, rng: np.random.Generator) -> Gray:
    """Spoil a picture in one of several ways, so that it is no upright frontal chest any more."""
    height, width = gray.shape
    way = int(rng.integers(8))
    if way < 3:
        return np.ascontiguousarray(np.rot90(gray, way + 1))
    if way == 3:
        return np.ascontiguousarray(gray[::-1])
    if way == 4:
        return 255 - gray
    if way in (5, 6):
        part = rng.uniform(0.2, 0.55)
        tall, wide = (min(side, max(8, int(side * part))) for side in gray.shape)
        top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
        return gray[top : top + tall, left : left + wide].copy()
    grid = min(int(rng.integers(2, 5)), height, width)
    tall, wide = height // grid, width // grid
    tiles = [
        gray[r * tall : (r + 1) * tall, c * wide : (c + 1) * wide] for r in range(grid) for c in range(grid)
    ]
    order = rng.permutation(len(tiles))
    rows = [np.hstack([tiles[i] for i in order[r * grid : (r + 1) * grid]]) for r in range(grid)]
    return np.ascontiguousarray(np.vstack(rows))


def drawn(rng: np.random.Generator, side: int = 128) -> NDArray[np.uint8]:
    """Draw something that is no radiograph: noise, a smooth surface, clouds, blobs, or stripes."""
    y, x = np.mgrid[0:side, 0:side] / side
    way = int(rng.integers(5))
    if way == 0:
        shown = rng.normal(0.5, rng.uniform(0.1, 0.4), (side, side))
    elif way == 1:
        a, b, c, d, e = rng.normal(0, 1, 5) * (rng.random() < 0.5, rng.random() < 0.5, rng.random(), 1, 1)
        shown = a * (x - 0.5) ** 2 + b * (y - 0.5) ** 2 + c * (x - 0.5) * (y - 0.5) + d * x + e * y
    elif way == 2:
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) + 1 / side
        spectrum = np.fft.fft2(rng.normal(size=(side, side))) / frequency ** rng.uniform(0.8, 2.0)
        shown = np.real(np.fft.ifft2(spectrum))
    elif way == 3:
        shown = np.full((side, side), rng.uniform())
        for _ in range(int(rng.integers(1, 12))):
            cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.45)
            inside = np.hypot((x - cx) * rng.uniform(0.5, 2), y - cy) < r
            shown = np.where(inside, rng.uniform(), shown)
    else:
        shown = np.sin(2 * np.pi * rng.uniform(2, 20) * (x * rng.uniform() + y * rng.uniform()))
    span = float(shown.max() - shown.min()) or 1.0
    found: Gray = ((shown - shown.min()) * (255 / span)).astype(np.uint8)
    return found


@dataclass(frozen=True)
class Fitted:
    """A guard without threshold, and the three scores of every picture by a guard that was not fitted on it.

    `own` [N, 3] are the site's pictures, `bad` [M, 3] the spoiled and drawn ones.
    """

    guard: ImageGuard
    own: Floats
    bad: Floats


def fit_guard(
    looks: Floats, towers: Floats, *, bad_looks: Floats, bad_towers: Floats, seed: int = _SEED
) -> Fitted:
    """Fit on own pictures [N, …] and spoiled ones; raises GuardNotCalibrated with fewer than 40 own."""
    many = len(looks)
    if many < LEAST_PICTURES:
        raise GuardNotCalibrated(f"expected at least {LEAST_PICTURES} own pictures, got {many}")
    rng = np.random.default_rng(seed)
    fold, bad_fold = rng.permutation(many) % _FOLDS, rng.permutation(len(bad_looks)) % _FOLDS
    held = np.zeros((many, 3), np.float32)
    held_bad = np.zeros((len(bad_looks), 3), np.float32)
    for number in range(_FOLDS):
        kept, bad_kept = fold != number, bad_fold != number
        fitted = _fit(looks[kept], towers[kept], bad_looks[bad_kept], bad_towers[bad_kept])
        held[~kept] = _parts(fitted, looks[~kept], towers[~kept])
        held_bad[~bad_kept] = _parts(fitted, bad_looks[~bad_kept], bad_towers[~bad_kept])
    return Fitted(_fit(looks, towers, bad_looks, bad_towers), held, held_bad)


def with_threshold(
    fitted: Fitted, *, false_refusals: float = FALSE_REFUSALS, shared: float = SHARED
) -> ImageGuard:
    """Set the threshold so that a share `false_refusals` of own pictures lie above it, or fewer.

    Where nearly all spoiled pictures lie far above, a share `shared` of the room between is given to the own
    ones: a quantile of few pictures is rough.
    """
    scales = np.maximum(np.quantile(fitted.own, 1 - false_refusals, axis=0), 1e-3)
    threshold = float(np.quantile((fitted.own / scales).max(1), 1 - false_refusals))
    beyond = float(np.quantile((fitted.bad / scales).max(1), 0.02))
    one, two, three = scales.tolist()
    threshold += shared * max(0.0, beyond - threshold)
    return replace(fitted.guard, scales=(one, two, three), threshold=threshold)


def format_guard(guard: ImageGuard) -> bytes:
    """Store a guard as an npz without pickle."""
    stream = io.BytesIO()
    np.savez(
        stream,
        **{f"{name}_{part}": getattr(getattr(guard, name), part) for name in ("looks", "tower")
           for part in ("mean", "axes", "rest")},
        mean=guard.mean, spread=guard.spread, weights=guard.weights,
        numbers=np.array([guard.bias, *guard.scales, guard.threshold, guard.pictures], np.float64),
    )  # fmt: skip
    return stream.getvalue()


def parse_guard(data: bytes) -> ImageGuard:
    """Read a stored guard; raises GuardNotCalibrated."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            looks, tower = (
                Whitened(held[f"{name}_mean"], held[f"{name}_axes"], float(held[f"{name}_rest"]))
                for name in ("looks", "tower")
            )
            bias, one, two, three, threshold, pictures = held["numbers"].tolist()
            return ImageGuard(
                looks, tower, held["mean"], held["spread"], held["weights"], bias, (one, two, three),
                threshold, int(pictures),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise GuardNotCalibrated(
            f"expected a stored calibration, got {type(error).__name__}; calibrate again"
        ) from error


def _fit(looks: Floats, towers: Floats, bad_looks: Floats, bad_towers: Floats) -> ImageGuard:
    own = np.hstack([looks, towers])
    every = np.vstack([own, np.hstack([bad_looks, bad_towers])])
    mean, spread = own.mean(0), own.std(0) + 0.05 * own.std() + 1e-6
    bad = np.concatenate([np.zeros(len(own)), np.ones(len(bad_looks))])
    weights, bias = _logistic(np.clip((every - mean) / spread, -5, 5), bad)
    return ImageGuard(
        _whiten(looks), _whiten(towers), mean, spread, weights, bias, (1.0, 1.0, 1.0), 1.0, len(looks)
    )


def _parts(guard: ImageGuard, looks: Floats, tower: Floats) -> Floats:
    rows = np.clip((np.hstack([looks, tower]) - guard.mean) / guard.spread, -5, 5)
    margin = rows @ guard.weights + guard.bias
    # A probability would flatten where it matters; the margin is shifted to be positive and smooth.
    logistic = np.logaddexp(0.0, margin + 4.0)
    return np.stack([guard.looks.score(looks), guard.tower.score(tower), logistic], 1).astype(np.float32)


def _whiten(rows: Floats, *, most: int = 48, explained: float = 0.95) -> Whitened:
    mean = rows.mean(0)
    _, spread, axes = np.linalg.svd(rows - mean, full_matrices=False)
    variance = spread**2 / max(1, len(rows) - 1)
    upto = int(np.searchsorted(np.cumsum(variance) / max(variance.sum(), 1e-12), explained)) + 1
    upto = max(1, min(most, upto, len(rows) // 4, len(variance)))
    scale = np.sqrt(variance[:upto] + 1e-3 * variance[0] + 1e-12)
    rest = float(variance[upto:].sum()) + 1e-3 * float(variance.sum()) + 1e-9
    return Whitened(mean.astype(np.float32), (axes[:upto] / scale[:, None]).astype(np.float32), rest)


def _logistic(rows: Floats, bad: NDArray[Any], *, ridge: float = 3e-3) -> tuple[Floats, float]:
    """Fit a logistic regression with balanced classes by L-BFGS; returns weights and bias."""
    from scipy.optimize import minimize

    rows64 = rows.astype(np.float64)
    weight = np.where(bad > 0, 0.5 / max(1, bad.sum()), 0.5 / max(1, (1 - bad).sum()))
    sign = np.where(bad > 0, 1.0, -1.0)

    def loss(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (rows64 @ theta[:-1] + theta[-1])
        value = float((weight * np.logaddexp(0, -margin)).sum() + 0.5 * ridge * theta[:-1] @ theta[:-1])
        slope = -weight * sign * np.exp(-np.logaddexp(0, margin))
        gradient = np.append(rows64.T @ slope + ridge * theta[:-1], slope.sum())
        return value, gradient

    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return found.x[:-1].astype(np.float32), float(found.x[-1])


def _resized(gray: Gray, side: int) -> Gray:
    from PIL import Image

    return np.asarray(Image.fromarray(gray).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0))


def _equalized(values: Floats) -> Floats:
    """Replace shades by their rank in -1 … 1, ties in the middle: no scanner's gamma stays."""
    shades, inverse, counts = np.unique(values.ravel().round(), return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    middle = (upper - counts / 2) / values.size
    ranked: Floats = (2 * middle[inverse.ravel()] - 1).reshape(values.shape).astype(np.float32)
    return ranked if len(shades) > 1 else np.zeros_like(values)


def _correlation(one: Floats, other: Floats) -> float:
    a, b = one.ravel() - one.mean(), other.ravel() - other.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-9 else 0.0


def stacked(pictures: Sequence[Gray]) -> Floats:
    """Describe several pictures, float32 [N, L]."""
    return np.stack([look(one) for one in pictures])
