"""From the sites' gradient sums to one averaged gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from common.config import Study
from common.errors import AdapterInvalid
from common.model.lora import vector_size


def parse_sum(blob: bytes | memoryview, *, study: Study, site: str) -> npt.NDArray[np.float32]:
    """Decode a site's float32 gradient sum [adapter size]; raises AdapterInvalid naming the site."""
    expected = 4 * vector_size(study.adapter.tensors)
    if len(blob) != expected:
        raise AdapterInvalid(f"contribution of {site}: expected {expected} bytes, got {len(blob)}")
    values = np.frombuffer(blob, "<f4")
    if not np.isfinite(values).all():
        raise AdapterInvalid(f"contribution of {site}: expected finite values, got a NaN or an infinity")
    return values


def average(study: Study, sums: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Add the sites' sums in float64, in order of site id, and divide by the public denominator.

    Equal to the averaged gradient of central training on the union of the same draws.
    """
    total = np.zeros(vector_size(study.adapter.tensors), np.float64)
    for site in sorted(sums):
        total += sums[site]
    return (total / study.training.denominator).astype(np.float32)
