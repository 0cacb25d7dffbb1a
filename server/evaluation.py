"""From the sum of the sites' evaluation counts to the ledger's entry: noise on top, then scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.config import Study
from common.evaluation_counts import evaluation_entry, evaluation_plan_of, summarise
from common.ledger.entries import Evaluation
from common.privacy.mechanism import top_up
from server.aggregation import Collected, server_randomness, sum_range, verify_range


def evaluate_sum(study: Study, collected: Collected, *, adapter: str, spent: float) -> Evaluation:
    """Read the noised counts of the final adapter; nothing un-noised is looked at.

    spent: the largest ε that a site stated for the evaluation, attempts without a sum included. Raises
    SumOutOfRange for counts that honest sites do not reach.
    """
    plan, survivors = evaluation_plan_of(study), len(collected.contributions)
    if collected.units is None:
        raise ValueError("expected a sum of counts, got none")
    total = top_up(
        collected.units.view(np.int32), plan, server_randomness(study, study.rounds), survivors=survivors
    )
    verify_range(total, sum_range(plan, dimension=total.size, survivors=survivors))
    summary = summarise(
        total, plan, survivors=survivors, server_sigma_units=plan.server_topup_sigma_units(survivors),
        evaluations=1,
    )  # fmt: skip
    summary = replace(summary, site_epsilon=max(summary.site_epsilon, spent))
    return evaluation_entry(summary, number=study.rounds - 1, adapter=adapter)
