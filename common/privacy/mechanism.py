"""The privacy plan: one frozen object from which both the noise that runs and the epsilon claimed come.

A site clips each drawn patient's gradient to `clip_norm`, sums, rounds the sum to integers of
`clip_norm / units_per_clip`, and adds discrete Gaussian noise. Under secure aggregation only the sum over
sites is seen; the server adds its own noise before anything is released.

Guarantees (unit: one patient at one site; neighbours: add or remove one patient):
- Rounded sums of neighbours differ by at most `sensitivity_units` in L2. The exact sums differ by one clipped
  patient; clamping is a projection; rounding to the nearest moves each of `dimension` coordinates of each
  sum by at most 1/2, together sqrt(dimension); 2^-20 of the clip covers the float64 arithmetic before it.
- Against the server and `colluders` sites, with at most `dropouts` sites gone, the noise on the sum is at
  least `site_noise` times that. Against whoever has the release, those colluders included, at least
  `release_noise` times that.
- A discrete Gaussian of variance v is a continuous Gaussian of variance v - 16 followed by a randomised
  rounding, up to 2^-450 (Peikert, CRYPTO 2010, Theorem 3.1), and so is a sum of independent ones; each width
  includes the 16 units^2. So accounting it as a continuous Gaussian is a bound, not an approximation.

It does not bound what a site that breaks the protocol contributes, nor hide that a study is running.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from common.errors import PlanInvalid
from common.privacy.accounting import (
    DISCRETISATION,
    History,
    SampledGaussian,
    bucketed,
    dp_event,
    epsilon_pld,
    verify_accountants_agree,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from common.privacy.sampling import Csprng

MODULUS = 1 << 32
_LATTICE_VARIANCE = 16.0
_ARITHMETIC_SLACK = 2.0**-20
_NOISE_REACH = 14.0  # no value of noise is farther out than this many sigma
_MIN_SIGMA_UNITS = 64.0
_MIN_LIMIT_CLIPS = 4


class Mode(Enum):
    """Who is protected from whom."""

    CONSORTIUM = "consortium"  # noise shares under secure aggregation, plus the server's
    LOCAL = "local"  # each site noises fully (ISRL-DP); only a site epsilon is claimed
    PLAIN = "plain"  # no privacy: tests and public data


class Unit(Enum):
    PATIENT_AT_ONE_SITE = "patient at one site"


class Neighbours(Enum):
    ADD_OR_REMOVE = "add or remove one patient"


class View(Enum):
    """Whose view epsilon is about."""

    SITE = "site"  # the server with a coalition of sites
    RELEASE = "release"  # anyone with the released models


@dataclass(frozen=True)
class ServedRound:
    """What one charged round or attempt came to; `survivors` None when it never got that far."""

    survivors: int | None
    server_sigma_units: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """All that decides privacy in one study; see the module for what follows from it."""

    mode: Mode
    sites: int
    colluders: int = 0
    dropouts: int = 0
    patients: int  # public nominal number of patients of the whole cohort
    sampling_rate: float
    studies_per_patient: int
    clip_norm: float
    units_per_clip: int = 1 << 20
    dimension: int  # trainable values, at most
    rounds: int
    spare_rounds: int = 0
    local_steps: int = 1  # noised steps per round, mode local only
    site_noise: float  # noise multiplier of a site's view
    release_noise: float  # noise multiplier of the release, at least site_noise
    delta: float
    unit: Unit = Unit.PATIENT_AT_ONE_SITE
    neighbours: Neighbours = Neighbours.ADD_OR_REMOVE

    def __post_init__(self) -> None:
        _verify_types(self)
        for name in (
            "sites",
            "patients",
            "studies_per_patient",
            "units_per_clip",
            "dimension",
            "rounds",
            "local_steps",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("colluders", "dropouts", "spare_rounds", "site_noise", "release_noise"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(0 < self.sampling_rate <= 1, f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        _require(self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}")
        _require(0 < self.delta < 1, f"delta must be in (0, 1), got {self.delta}")
        _require(self.honest_floor >= 1, "sites - colluders - dropouts must be at least 1")
        _require(self.mode is Mode.LOCAL or self.local_steps == 1, "local_steps needs mode local")
        if self.mode is Mode.PLAIN:
            _require(self.site_noise == self.release_noise == 0, "mode plain has no noise")
        else:
            _require(
                self.delta <= 1 / (10 * self.patients),
                f"delta must be at most 1/(10*patients) = {1 / (10 * self.patients):.3g}, got {self.delta}",
            )
            _require(self.site_noise > 0, "site_noise must be positive")
            _require(self.release_noise >= self.site_noise, "release_noise must be at least site_noise")
            _require(
                self.site_share_sigma_units >= _MIN_SIGMA_UNITS,
                f"a site's share must be at least {_MIN_SIGMA_UNITS:.0f} units wide: raise units_per_clip",
            )
        if self.mode is Mode.LOCAL:
            _require(self.release_noise == self.site_noise, "mode local has no noise of the server")
        _require(
            self.site_limit_units >= _MIN_LIMIT_CLIPS * self.units_per_clip,
            f"no headroom modulo 2^32: {self.sites} sites at {self.units_per_clip} units per clip",
        )

    @property
    def honest_floor(self) -> int:
        """Noise shares that are certain: neither colluding nor dropped."""
        return self.sites - self.colluders - self.dropouts

    @property
    def survivor_floor(self) -> int:
        """Fewer survivors than this and sites refuse to unmask."""
        return self.sites - self.dropouts

    @property
    def denominator(self) -> float:
        """Expected patients in a round: the public number that a sum is divided by."""
        return self.sampling_rate * self.patients

    @property
    def quantum(self) -> float:
        """Gradient value of one integer unit."""
        return self.clip_norm / self.units_per_clip

    @property
    def sensitivity_units(self) -> float:
        """L2 distance, in units, between the rounded sums of neighbours."""
        return self.units_per_clip * (1 + _ARITHMETIC_SLACK) + math.sqrt(self.dimension)

    @property
    def site_share_sigma_units(self) -> float:
        """Width of the noise that each site adds, in units."""
        if self.mode is Mode.PLAIN:
            return 0.0
        shares = self.honest_floor if self.mode is Mode.CONSORTIUM else 1
        return math.sqrt(self._variance_units(self.site_noise) / shares)

    def server_topup_sigma_units(self, survivors: int) -> float:
        """Width of the noise that the server adds to the sum of `survivors` sites, in units."""
        self._verify_survivors(survivors)
        if self.mode is not Mode.CONSORTIUM:
            return 0.0
        missing = self._variance_units(self.release_noise) - self._shares_variance(survivors)
        return max(1.0, math.sqrt(missing)) if missing > 1e-6 * self._shares_variance(survivors) else 0.0

    @property
    def site_limit_units(self) -> int:
        """Largest absolute coordinate of a site's rounded sum; sites clamp to it, so that sums never wrap."""
        noise = _NOISE_REACH * math.sqrt(self.sites) * self.site_share_sigma_units
        return int((MODULUS // 2 - 1 - noise) / self.sites)

    def planned(self, view: View) -> History:
        """All rounds of the plan, for `view`; spare rounds cost a site but are never released."""
        noise = self.site_noise if view is View.SITE else self.release_noise
        rounds = self.rounds + (self.spare_rounds if view is View.SITE else 0)
        return (SampledGaussian(self.sampling_rate, noise, rounds * self.local_steps),)

    def served(self, view: View, rounds: Iterable[ServedRound]) -> History:
        """The rounds as they happened: more survivors mean more noise; unfinished ones cost as planned."""
        return bucketed(
            SampledGaussian(self.sampling_rate, self.round_noise(view, r), self.local_steps) for r in rounds
        )

    def round_noise(self, view: View, served: ServedRound) -> float:
        """Noise multiplier of one round as it happened."""
        if self.mode is not Mode.CONSORTIUM or served.survivors is None:
            return self.site_noise
        self._verify_survivors(served.survivors)
        variance = self._shares_variance(served.survivors)
        if view is View.RELEASE:
            variance += served.server_sigma_units**2
        return math.sqrt(max(0.0, variance - _LATTICE_VARIANCE)) / self.sensitivity_units

    def event(self, view: View, rounds: Iterable[ServedRound] | None = None) -> Any:
        """The `dp_accounting.DpEvent` of the whole plan, or of the rounds as they happened."""
        return dp_event(self.planned(view) if rounds is None else self.served(view, rounds))

    def epsilon(self, view: View, rounds: Iterable[ServedRound] | None = None) -> float:
        """Epsilon at the plan's delta, by PLD, of the whole plan or of the rounds as they happened."""
        return epsilon_pld(
            self.planned(view) if rounds is None else self.served(view, rounds), delta=self.delta
        )

    def verify_accounting(self) -> None:
        """Raise AccountantsDisagree unless both accountants agree on both views of the plan."""
        for view in View:
            verify_accountants_agree(self.planned(view), delta=self.delta)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values; `common.canonical` turns them into the bytes that are hashed."""
        return {
            f.name: value.value if isinstance(value := getattr(self, f.name), Enum) else value
            for f in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls, value: Any) -> PrivacyPlan:
        """Parse `to_json`; every field must be there and no other. Raises PlanInvalid."""
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise PlanInvalid(f"expected a privacy plan with fields {', '.join(names)}")
        fields = dict(value)
        for name, enum in (("mode", Mode), ("unit", Unit), ("neighbours", Neighbours)):
            try:
                fields[name] = enum(fields[name])
            except ValueError as error:
                raise PlanInvalid(f"unknown {name} in a privacy plan") from error
        for name in _FLOATS:
            if type(fields[name]) is int:  # canonical JSON writes 1.0 as 1
                fields[name] = float(fields[name])
        return cls(**fields)

    def _variance_units(self, multiplier: float) -> float:
        return (multiplier * self.sensitivity_units) ** 2 + _LATTICE_VARIANCE

    def _shares_variance(self, survivors: int) -> float:
        return (survivors - self.colluders) * self.site_share_sigma_units**2

    def _verify_survivors(self, survivors: int) -> None:
        if not self.survivor_floor <= survivors <= self.sites:
            raise PlanInvalid(
                f"expected {self.survivor_floor} to {self.sites} surviving sites, got {survivors}"
            )


def quantise(vector: NDArray[np.float64], plan: PrivacyPlan) -> NDArray[np.int32]:
    """Round a clipped sum to the nearest units, clamped to the plan's limit; raises PlanInvalid.

    vector: finite floats, at most `dimension` of them -> int32 of the same size.
    """
    import numpy as np

    if vector.ndim != 1 or vector.size > plan.dimension:
        raise PlanInvalid(f"expected a flat vector of at most {plan.dimension} values, got {vector.shape}")
    scaled = np.divide(vector, plan.quantum, dtype=np.float64)
    if not np.isfinite(scaled).all():
        raise PlanInvalid("a sum of clipped gradients must be finite")
    np.clip(scaled, -plan.site_limit_units, plan.site_limit_units, out=scaled)
    return np.rint(scaled, out=scaled).astype(np.int32)


def privatise(vector: NDArray[np.float64], plan: PrivacyPlan, csprng: Csprng) -> NDArray[np.int32]:
    """A site's contribution: the rounded sum plus the site's share of the noise (mode local: all of it)."""
    from common.privacy.noise import discrete_gaussian_chunks

    out = quantise(vector, plan)
    if plan.mode is Mode.PLAIN:
        return out
    start = 0
    for chunk in discrete_gaussian_chunks(csprng, sigma=plan.site_share_sigma_units, size=out.size):
        out[start : start + chunk.size] += chunk
        start += chunk.size
    return out


def top_up(
    total: NDArray[np.int32], plan: PrivacyPlan, csprng: Csprng, *, survivors: int
) -> NDArray[np.int64]:
    """The unmasked sum of `survivors` sites plus the server's noise, in units."""
    import numpy as np

    from common.privacy.noise import discrete_gaussian_chunks

    out = total.astype(np.int64)
    sigma = plan.server_topup_sigma_units(survivors)
    if sigma == 0:
        return out
    start = 0
    for chunk in discrete_gaussian_chunks(csprng, sigma=sigma, size=out.size, purpose="server noise"):
        out[start : start + chunk.size] += chunk
        start += chunk.size
    return out


def dequantise(total: NDArray[np.int64] | NDArray[np.int32], plan: PrivacyPlan) -> NDArray[np.float64]:
    """Units back to gradient values (a sum over patients; divide by `plan.denominator` for the mean)."""
    import numpy as np

    return np.multiply(total, plan.quantum, dtype=np.float64)


def calibrate(
    *, target_site_epsilon: float, target_release_epsilon: float | None = None, **fields: Any
) -> PrivacyPlan:
    """Fill `site_noise` and `release_noise` of a plan with the least noise that meets both targets.

    fields: those of PrivacyPlan but the two widths. Without a release target the release is as noised as the
    sites' view. Widths are rounded up to 4 decimals. Raises PlanInvalid when no width up to 1000 does.
    """
    probe = PrivacyPlan(**fields, site_noise=1.0, release_noise=1.0)
    if probe.mode is Mode.PLAIN:
        raise PlanInvalid("mode plain has nothing to calibrate")

    def least(view: View, target: float) -> float:
        (rounds,) = probe.planned(view)

        def meets(noise: int, discretisation: float) -> bool:
            widened = dataclasses.replace(rounds, noise_multiplier=noise / 1e4)
            return epsilon_pld([widened], delta=probe.delta, discretisation=discretisation) <= target

        return _least_noise(meets, target)

    site = least(View.SITE, target_site_epsilon)
    release = site
    if target_release_epsilon is not None and probe.mode is Mode.CONSORTIUM:
        release = max(site, least(View.RELEASE, target_release_epsilon))
    return dataclasses.replace(probe, site_noise=site, release_noise=release)


def _least_noise(meets: Callable[[int, float], bool], target: float) -> float:
    """The least multiplier that meets the target, in ten-thousandths; coarse first, for speed."""
    _require(0 < target < math.inf, f"a target epsilon must be positive and finite, got {target}")
    low, high = 2_000, 10_000
    while not meets(high, 10 * DISCRETISATION):
        low, high = high, high * 2
        _require(high <= 10_000_000, f"no noise multiplier up to 1000 gives epsilon {target}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle, 10 * DISCRETISATION) else (middle, high)
    step = 1
    while high - step >= 2_000 and meets(high - step, DISCRETISATION):  # the finer value is lower
        high, step = high - step, 2 * step
    low = max(high - step, 1_999)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle, DISCRETISATION) else (middle, high)
    return high / 1e4


_FLOATS = ("sampling_rate", "clip_norm", "site_noise", "release_noise", "delta")
_ENUMS = {"mode": Mode, "unit": Unit, "neighbours": Neighbours}


def _verify_types(plan: PrivacyPlan) -> None:
    for f in dataclasses.fields(plan):
        value = getattr(plan, f.name)
        if f.name in _ENUMS:
            _require(isinstance(value, _ENUMS[f.name]), f"{f.name} must be one of its named values")
        elif f.name in _FLOATS:
            _require(
                type(value) in (int, float) and math.isfinite(value), f"{f.name} must be a finite number"
            )
        else:
            _require(type(value) is int, f"{f.name} must be a whole number")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanInvalid(message)
