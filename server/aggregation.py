"""From the sites' sums to one averaged, protected gradient.

Plain and local contributions are floats, added in float64 in order of site id. Consortium contributions are
integers modulo 2^32, so their sum is exact in any order, masked or not; the server's own noise goes on top
before anything else sees the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.canonical import sha256_hex
from common.config import Mode, Study
from common.errors import AdapterInvalid, SumOutOfRange
from common.ledger.entries import Participation
from common.model.lora import group_mask, vector_size
from common.privacy.sampling import Csprng
from common.records import RoundRecord, SignedRecord
from common.schedule import active_groups

if TYPE_CHECKING:
    from common.privacy.mechanism import PrivacyPlan

Floats = npt.NDArray[np.float32]
Units = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Collected:
    """One round's sum over `contributions` (site → SHA-256 of what it sent); floats or units, by mode.

    aggregate: the keyed commitment to the sum of the contributions as they came, where they are integers.
    """

    contributions: dict[str, str]
    missing: dict[str, str]
    floats: Mapping[str, Floats] | None = None
    units: Units | None = None
    aggregate: str = ""


@dataclass(frozen=True)
class SumRange:
    """What honest sites' noised sum can be, in units: the largest coordinate and the largest L2 norm."""

    coordinate_units: float
    norm_units: float


@dataclass(frozen=True)
class Protected:
    """The averaged gradient, float32 [adapter size], and the widths of the noise in it, in units."""

    gradient: Floats
    site_share_sigma_units: float
    server_sigma_units: float


def parse_floats(blob: memoryview, *, study: Study, site: str) -> Floats:
    """Decode a site's float32 vector [adapter size]; raises AdapterInvalid naming the site."""
    _verify_size(blob, length=vector_size(study.adapter.tensors), site=site)
    values = np.frombuffer(blob, "<f4")
    if not np.isfinite(values).all():
        raise AdapterInvalid(f"contribution of {site}: expected finite values, got a NaN or an infinity")
    return values


def parse_units(blob: memoryview, *, length: int, site: str) -> Units:
    """Decode a site's integers modulo 2^32 [length]; raises AdapterInvalid naming the site."""
    _verify_size(blob, length=length, site=site)
    return np.frombuffer(blob, "<u4")


def protect(study: Study, collected: Collected, *, round: int) -> Protected:
    """Turn a collected sum into the averaged gradient, with the server's own noise where it adds any.

    Raises SumOutOfRange for a sum that clipped gradients and their noise do not reach; the check reads the
    sum with all its noise, so that its outcome costs no more privacy.
    """
    if collected.units is None:
        return Protected(_average(study, collected.floats or {}), _share_sigma(study), 0.0)
    from common.privacy.mechanism import dequantise, top_up
    from common.privacy.study_plan import plan_of

    plan, survivors = plan_of(study), len(collected.contributions)
    trained = group_mask(study.adapter.tensors, active_groups(study, round))
    noised = top_up(
        collected.units.view(np.int32)[trained], plan, server_randomness(study, round), survivors=survivors
    )
    verify_range(noised, sum_range(plan, dimension=noised.size, survivors=survivors))
    gradient = np.zeros(trained.size, np.float64)
    gradient[trained] = dequantise(noised, plan) / study.training.denominator
    return Protected(
        gradient.astype(np.float32), plan.site_share_sigma_units, plan.server_topup_sigma_units(survivors)
    )


def sum_range(plan: PrivacyPlan, *, dimension: int, survivors: int) -> SumRange:
    """Bound the noised sum of honest sites, but for a chance below 1e-9 a round.

    At most as many patients are drawn as twice the nominal number would give (the true number may differ from
    the nominal one), each moves the sum by one clip at most, and the noise is Gaussian of a known width: its
    coordinates stay within 8 sigma, its norm within sigma (sqrt(d) + 8) (Laurent & Massart 2000).
    """
    sigma = math.hypot(
        math.sqrt(survivors) * plan.site_share_sigma_units, plan.server_topup_sigma_units(survivors)
    )
    expected = 2 * plan.denominator
    clips = (expected + 6 * math.sqrt(expected) + 6) * plan.sensitivity_units
    return SumRange(clips + 8 * sigma, clips + (math.sqrt(dimension) + 8) * sigma)


def verify_range(noised: npt.NDArray[np.int64], limit: SumRange) -> None:
    """Raise SumOutOfRange for a noised sum, int64 in units, outside what honest sites reach."""
    largest = float(np.abs(noised).max(initial=0))
    norm = float(np.linalg.norm(noised.astype(np.float64)))
    for what, got, most in (
        ("coordinate", largest, limit.coordinate_units), ("norm", norm, limit.norm_units),
    ):  # fmt: skip
        if got > most:
            raise SumOutOfRange(
                f"privacy.clip_norm: expected a sum whose {what} is at most {most:.4g} units, got {got:.4g}: "
                "a site exceeded its clip, or the manifest's nominal number of patients is far too low"
            )


def release_epsilon(
    study: Study,
    before: Sequence[SignedRecord],
    record: RoundRecord,
    statements: Iterable[Participation],
    stated_before: float,
) -> float:
    """Return what the released sums cost so far, this round's record included; 0 in mode plain.

    In mode local nothing but the sites' own noise protects the release: the largest site ε is stated.
    """
    if study.privacy.mode is Mode.PLAIN:
        return 0.0
    if study.privacy.mode is Mode.LOCAL:
        return max([stated_before, *(part.epsilon for part in statements)])
    from common.privacy.mechanism import ServedRound, View
    from common.privacy.study_plan import plan_of

    records = [*(signed.record for signed in before), record]
    served = [ServedRound(len(r.contributors), r.server_sigma_units) for r in records]
    return plan_of(study).epsilon(View.RELEASE, served)


def _average(study: Study, floats: Mapping[str, Floats]) -> Floats:
    """Add in order of site id; sums are divided by the public denominator, local means by their number."""
    total = np.zeros(vector_size(study.adapter.tensors), np.float64)
    for site in sorted(floats):
        total += floats[site]
    divisor = len(floats) if study.privacy.mode is Mode.LOCAL else study.training.denominator
    return (total / divisor).astype(np.float32)


def _share_sigma(study: Study) -> float:
    if study.privacy.mode is Mode.PLAIN:
        return 0.0
    from common.privacy.study_plan import plan_of

    return plan_of(study).site_share_sigma_units


def server_randomness(study: Study, round: int) -> Csprng:
    """Return the generator of the server's noise: the system's, or seeded in a `[testing]` study."""
    if study.testing is None:
        return Csprng.from_os()
    text = f"fedrad test server noise|{study.testing.seed}|{round}"
    return Csprng(bytes.fromhex(sha256_hex(text.encode())), seeded_for_test=True)


def _verify_size(blob: memoryview, *, length: int, site: str) -> None:
    expected = 4 * length
    if len(blob) != expected:
        raise AdapterInvalid(f"contribution of {site}: expected {expected} bytes, got {len(blob)}")
