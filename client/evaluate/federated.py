"""A site's part in a federated evaluation: count, charge, noise, and only then answer.

The order is the agent's as in training: the request is checked by the policy, the budget is charged durably
and gives the seed, then data is touched. Guarantees: the same request on the same data gives the same answer
and is charged once; the answer is integers with the site's share of the noise in them; a patient counts once,
by at most `studies_per_patient` studies drawn with the round's own randomness. What the site's exact figures
are stays here. Wiring into the agent and the server's loop is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from client.budget import Budget, Charge
from client.evaluate.scores import finding_counts
from common.canonical import canonical_json, sha256_hex
from common.evaluation_counts import DIMENSION, patient_vector
from common.privacy.mechanism import PrivacyPlan, privatise
from common.privacy.sampling import Csprng, studies_of


def evaluation_account(study_sha256: str) -> str:
    """Name the budget's account for a study's evaluations: apart from its training, composed with it."""
    return sha256_hex(canonical_json({"evaluation_of": study_sha256}))


def charge_evaluation(
    budget: Budget,
    study_sha256: str,
    plan: PrivacyPlan,
    *,
    number: int,
    attempt: int,
    request_sha256: str,
    data_sha256: str,
    seed: bytes,
) -> Charge:
    """Charge one evaluation durably, committing the plan at the first; only then may data be touched.

    Raises BudgetExceeded, BudgetMismatch or RoundAlreadyServed, as for a round of training.
    """
    account = evaluation_account(study_sha256)
    budget.commit(account, plan)
    return budget.charge(
        account,
        round=number,
        attempt=attempt,
        request_sha256=request_sha256,
        data_sha256=data_sha256,
        seed=seed,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.site_noise,
    )


def chosen_studies(
    patients: Mapping[str, Sequence[str]], plan: PrivacyPlan, csprng: Csprng
) -> dict[str, list[str]]:
    """Draw which studies of each patient are written and counted, at most `studies_per_patient` each."""
    return {
        patient: studies_of(csprng, sorted(studies), plan.studies_per_patient)
        for patient, studies in sorted(patients.items())
        if studies
    }


def site_contribution(
    chosen: Mapping[str, Sequence[str]],
    drafts: Mapping[str, str],
    references: Mapping[str, str],
    plan: PrivacyPlan,
    csprng: Csprng,
) -> NDArray[np.int32]:
    """Count, clip, sum, round, and add this site's noise: int32 [DIMENSION], ready to be masked.

    `drafts` and `references` are by study. Without a patient it is the noise alone: a refusal would tell.
    """
    total = np.zeros(DIMENSION)
    for patient in sorted(chosen):
        counts = [finding_counts(drafts[study], references[study]) for study in chosen[patient]]
        total += patient_vector(counts, clip_norm=plan.clip_norm)
    return privatise(total, plan, csprng)
