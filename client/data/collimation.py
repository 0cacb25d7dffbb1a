"""Burned-in collimation: the dim strips that shutters leave around the exposed field, found.

Guarantees: a side is cut only at a straight edge that runs along nearly the whole width, bright inside and
darker outside, within the outer `LIMIT` of that side; nothing else is cut. Round and slanted shutters stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from client.data.pixels import MIN_SIDE, Box, Gray

# Share of a side searched, step in brightness (0 to 1) at the edge, share of the width that shows the step.
LIMIT, STEP, SHARE = 0.4, 0.08, 0.85
# Columns that are dark on both sides of the line (air) say nothing; half of them must say something.
BODY, BODY_SHARE = 0.2, 0.5
_SEARCHED = 256

Floats = npt.NDArray[np.floating[Any]]


def field_box(pixels: Gray) -> Box:
    """Find the exposed field of a 2-D uint16 image: all of it where no shutter edge is found."""
    step = max(1, max(pixels.shape) // _SEARCHED)
    small = pixels[::step, ::step].astype(np.float32)
    low, high = np.percentile(small, (1, 99))
    small = np.clip((small - low) / max(float(high - low), 1.0), 0, 1)
    bottom, top = _outside(small), _outside(small[::-1])
    columns = small[top : len(small) - bottom].T
    right, left = _outside(columns), _outside(columns[::-1])
    height, width = pixels.shape
    box = Box(top * step, height - bottom * step, left * step, width - right * step)
    return box if min(box.of(pixels).shape) >= MIN_SIDE else Box(0, height, 0, width)


def _outside(image: Floats) -> int:
    """Count the rows at the end that lie outside the sharpest shutter edge; 0 without one."""
    height = len(image)
    reach = max(2, height // 100)
    first, last = int(height * (1 - LIMIT)), height - reach - 1
    if first < reach or last <= first:
        return 0
    sums = np.concatenate([np.zeros((1, image.shape[1]), image.dtype), np.cumsum(image, axis=0)])
    rows = np.arange(first, last)
    above = (sums[rows] - sums[rows - reach]) / reach
    below = (sums[rows + 1 + reach] - sums[rows + 1]) / reach
    body = above > BODY
    counted = body.sum(axis=1)
    share = ((above - below > STEP) & body).sum(axis=1) / np.maximum(counted, 1)
    share[counted < BODY_SHARE * image.shape[1]] = 0
    best = int(share.argmax())
    return height - int(rows[best]) + 1 if share[best] >= SHARE else 0
