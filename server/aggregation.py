"""From the sites' sums to one averaged, protected gradient.

Plain and local contributions are floats, added in float64 in order of site id. Consortium contributions are
integers modulo 2^32, so their sum is exact in any order, masked or not; the server's own noise goes on top
before anything else sees the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.canonical import sha256_hex
from common.config import Mode, Study
from common.errors import AdapterInvalid
from common.ledger.entries import Participation
from common.model.lora import group_mask, vector_size
from common.privacy.sampling import Csprng
from common.records import RoundRecord, SignedRecord
from common.schedule import active_groups

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
class Protected:
    """The averaged gradient, float32 [adapter size], and the widths of the noise in it, in units."""

    gradient: Floats
    site_share_sigma_units: float
    server_sigma_units: float


def parse_floats(blob: memoryview, *, study: Study, site: str) -> Floats:
    """Decode a site's float32 vector [adapter size]; raises AdapterInvalid naming the site."""
    _verify_size(blob, study=study, site=site)
    values = np.frombuffer(blob, "<f4")
    if not np.isfinite(values).all():
        raise AdapterInvalid(f"contribution of {site}: expected finite values, got a NaN or an infinity")
    return values


def parse_units(blob: memoryview, *, study: Study, site: str) -> Units:
    """Decode a site's integers modulo 2^32 [adapter size]; raises AdapterInvalid naming the site."""
    _verify_size(blob, study=study, site=site)
    return np.frombuffer(blob, "<u4")


def protect(study: Study, collected: Collected, *, round: int) -> Protected:
    """Turn a collected sum into the averaged gradient, with the server's own noise where it adds any."""
    if collected.units is None:
        return Protected(_average(study, collected.floats or {}), _share_sigma(study), 0.0)
    from common.privacy.mechanism import dequantise, top_up
    from common.privacy.study_plan import plan_of

    plan, survivors = plan_of(study), len(collected.contributions)
    trained = group_mask(study.adapter.tensors, active_groups(study, round))
    noised = top_up(
        collected.units.view(np.int32)[trained], plan, _server_randomness(study, round), survivors=survivors
    )
    gradient = np.zeros(trained.size, np.float64)
    gradient[trained] = dequantise(noised, plan) / study.training.denominator
    return Protected(
        gradient.astype(np.float32), plan.site_share_sigma_units, plan.server_topup_sigma_units(survivors)
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


def _server_randomness(study: Study, round: int) -> Csprng:
    if study.testing is None:
        return Csprng.from_os()
    text = f"fedrad test server noise|{study.testing.seed}|{round}"
    return Csprng(bytes.fromhex(sha256_hex(text.encode())), seeded_for_test=True)


def _verify_size(blob: memoryview, *, study: Study, site: str) -> None:
    expected = 4 * vector_size(study.adapter.tensors)
    if len(blob) != expected:
        raise AdapterInvalid(f"contribution of {site}: expected {expected} bytes, got {len(blob)}")
