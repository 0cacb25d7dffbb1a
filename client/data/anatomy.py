"""Does an image look like an upright frontal chest? Seven measures of a thumbnail, one linear score.

The measures: symmetry about a vertical line; two dark fields beside a brighter middle; a bright abdomen below
them (mean, and under either field); likeness to a drawn chest; texture inside the dark fields (vessels and
ribs; air has none). The weights were fitted by logistic regression on two of four collections of real
radiographs against the same turned, upside down and inverted, and tested on the other two; figures are in
docs/results.md.

Guarantees: the same pixels give the same score; no learned image goes into it. It is a check against wrong
headers, turned and inverted images, and other parts of the body; it is no quality judgement, and one half of
a chest often passes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from client.data.pixels import Gray

SIDE = 48
# Below the first an image is quarantined, below the second the pair is flagged.
QUARANTINE, FLAG = -1.0, 2.0
_WEIGHTS = (8.8, -5.7, 16.8, 18.7, -4.5, 2.1, 1.6)
_OFFSET = -21.8
_MOST_TEXTURE = 4.0
# What no other measure can make up for: the dark fields stand out from the middle, and are not empty.
_LEAST_CONTRAST, _LEAST_TEXTURE, _HARDLY = 0.05, 0.7, -5.0

Floats = npt.NDArray[np.floating[Any]]


def chest_score(pixels: Gray) -> float:
    """Score a cropped 2-D uint16 image: about 10 for a chest, under `QUARANTINE` for hardly one."""
    image = Image.fromarray(pixels.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = measures(np.asarray(image, dtype=np.float64))
    score = float(np.dot(_WEIGHTS, values) + _OFFSET)
    lacking = values[1] < _LEAST_CONTRAST or values[-1] < _LEAST_TEXTURE
    return min(score, _HARDLY) if lacking else score


def measures(image: Floats) -> tuple[float, ...]:
    """Return the seven measures of a `SIDE` × `SIDE` image."""
    ranks = _ranks(image)
    profile = ranks[_part(0.25, 0.65)].mean(axis=0)
    left = _first(0.08) + int(profile[_part(0.08, 0.45)].argmin())
    right = _first(0.55) + int(profile[_part(0.55, 0.92)].argmin())
    middle = float(profile[_part(0.33, 0.67)].max())
    abdomen = float(ranks[_part(0.82, 0.97), _part(0.2, 0.8)].mean())
    below = [
        float(ranks[_part(0.85, 0.98), max(0, at - 3) : at + 4].mean() - profile[at]) for at in (left, right)
    ]
    dark = (float(profile[left]), float(profile[right]))
    return (
        _symmetry(ranks),
        middle - max(dark),
        abdomen - sum(dark) / 2,
        _likeness(ranks),
        min(below),
        max(below),
        _texture(image, (left, right)),
    )


def _symmetry(ranks: Floats) -> float:
    """Return the best correlation of the image with its mirror image about a line near the middle."""
    best = -1.0
    for shift in range(-5, 6):
        part = ranks[:, max(0, shift) : SIDE + min(0, shift)]
        best = max(best, _correlation(part, part[:, ::-1]))
    return best


def _likeness(ranks: Floats) -> float:
    """Return the best correlation with the drawn chest over small shifts and sizes."""
    centred = ranks.ravel() - ranks.mean()
    return float((_drawings() @ (centred / (np.linalg.norm(centred) + 1e-9))).max())


def _texture(image: Floats, fields: tuple[int, int]) -> float:
    """Return the lower median gradient of the two dark fields, in hundredths of the range."""
    low, high = np.percentile(image, (1, 99))
    scaled = np.clip((image - low) / max(float(high - low), 1e-9), 0, 1)
    gradient = np.hypot(*np.gradient(scaled))
    medians = [float(np.median(gradient[_part(0.25, 0.65), max(0, at - 4) : at + 5])) for at in fields]
    return min(100 * min(medians), _MOST_TEXTURE)


@lru_cache(maxsize=1)
def _drawings() -> Floats:
    """Draw a chest (body, lungs, mediastinum, heart, abdomen), moved and resized a little: 75 unit rows."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    chest = np.full((SIDE, SIDE), 0.65)
    for centre in (0.29, 0.71):
        lung = ((x - centre) / 0.19) ** 2 + ((y - 0.47) / 0.36) ** 2
        chest = np.minimum(chest, np.clip(0.15 + 0.5 * np.maximum(0, lung - 0.6), 0, 0.65))
    chest = np.where(np.abs(x - 0.5) < 0.09, 0.8, chest)
    chest = np.where(((x - 0.56) / 0.16) ** 2 + ((y - 0.64) / 0.15) ** 2 < 1, 0.85, chest)
    chest = np.where(y > 0.84, np.maximum(chest, 0.8), chest)
    ranks = _ranks(chest)
    rows = []
    at = np.arange(SIDE)
    for size in (0.85, 1.0, 1.2):
        for down in (-4, -2, 0, 2, 4):
            for across in (-4, -2, 0, 2, 4):
                ys, xs = (
                    np.clip((at - SIDE / 2) / size + SIDE / 2 + move, 0, SIDE - 1).astype(int)
                    for move in (down, across)
                )
                drawing = ranks[np.ix_(ys, xs)].ravel()
                drawing = drawing - drawing.mean()
                rows.append(drawing / np.linalg.norm(drawing))
    return np.stack(rows)


def _ranks(image: Floats) -> Floats:
    """Replace values by their ranks, 0 to 1, so that windows and gamma do not matter."""
    order = np.argsort(np.argsort(image.ravel(), kind="stable"), kind="stable")
    return order.reshape(image.shape) / (image.size - 1)


def _correlation(one: Floats, other: Floats) -> float:
    first, second = one - one.mean(), other - other.mean()
    return float((first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-9))


def _first(share: float) -> int:
    return int(share * SIDE)


def _part(start: float, stop: float) -> slice:
    return slice(_first(start), _first(stop))
