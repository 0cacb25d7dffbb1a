"""The privacy plan of a study: the manifest's numbers as one `PrivacyPlan`, and the noise that meets them.

What runs at the sites and the server, what budgets are charged, and what records and releases claim is all
read from `plan_of(study)`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from common.config import Mode, Study
from common.errors import ManifestInvalid
from common.privacy import mechanism
from common.privacy.mechanism import PrivacyPlan, View


def plan_of(study: Study) -> PrivacyPlan:
    """Make the plan of a resolved private study; raises ManifestInvalid in mode plain, PlanInvalid."""
    privacy = study.privacy
    if privacy.mode is Mode.PLAIN:
        raise ManifestInvalid("privacy.mode: expected consortium or local, got plain")
    return PrivacyPlan(**_fields(study), site_noise=privacy.site_noise, release_noise=privacy.release_noise)


def calibrated(study: Study) -> Study:
    """Fill δ and the noise multipliers that meet the manifest's ε; a study that has them is checked.

    Raises ManifestInvalid when the given noise does not meet the manifest's ε, AccountantsDisagree when two
    accountants differ by more than 2 %.
    """
    if study.privacy.mode is Mode.PLAIN:
        return study
    if study.privacy.delta == 0.0:
        study = replace(study, privacy=replace(study.privacy, delta=1.0 / (10 * study.training.patients)))
    if study.privacy.site_noise == 0.0:
        plan = mechanism.calibrate(
            target_site_epsilon=study.privacy.site_epsilon,
            target_release_epsilon=(
                study.privacy.release_epsilon if study.privacy.mode is Mode.CONSORTIUM else None
            ),
            **_fields(study),
        )
        noise = replace(study.privacy, site_noise=plan.site_noise, release_noise=plan.release_noise)
        study = replace(study, privacy=noise)
    verify_plan(study)
    return study


def verify_plan(study: Study) -> None:
    """Raise unless the study's noise meets its ε and the accountants agree; quick when asked again."""
    if study.privacy.mode is not Mode.PLAIN:
        _verify(plan_of(study), study.privacy.site_epsilon, study.privacy.release_epsilon)


@lru_cache(maxsize=64)
def _verify(plan: PrivacyPlan, site_epsilon: float, release_epsilon: float) -> None:
    plan.verify_accounting()
    limits = {View.SITE: site_epsilon}
    if plan.mode is mechanism.Mode.CONSORTIUM:
        limits[View.RELEASE] = release_epsilon
    for view, limit in limits.items():
        epsilon = plan.epsilon(view)
        if epsilon > limit * (1 + 1e-9):
            raise ManifestInvalid(
                f"privacy.{view.value}_epsilon: expected noise that keeps ε at most {limit:g}, "
                f"got ε {epsilon:.3f}"
            )


def _fields(study: Study) -> dict[str, Any]:
    privacy, training = study.privacy, study.training
    return {
        "mode": mechanism.Mode(privacy.mode.value),
        "sites": len(study.cohort.site),
        "colluders": privacy.colluders,
        "dropouts": privacy.dropouts,
        "patients": training.patients,
        "sampling_rate": training.sampling_rate,
        "studies_per_patient": training.studies_per_patient,
        "clip_norm": privacy.clip_norm,
        "units_per_clip": privacy.units_per_clip,
        "dimension": sum(tensor.size for tensor in study.adapter.tensors),
        "rounds": study.rounds,
        "spare_rounds": privacy.spare_rounds,
        "local_steps": training.local_steps,
        "delta": privacy.delta,
    }
