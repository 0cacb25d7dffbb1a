"""From the sum of the sites' evaluation counts to the ledger's entry: noise on top, then scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from common.config import Study
from common.evaluation_counts import evaluation_entry, evaluation_plan_of, summarise
from common.ledger.entries import Evaluation, EvaluationSum, Participation
from common.privacy.mechanism import top_up
from server.aggregation import Collected, server_randomness, sum_range, verify_range


def evaluate_sum(
    study: Study, collected: Collected, *, adapter: str, attempt: int, statements: Iterable[Participation]
) -> Evaluation:
    """Read the noised counts of the final adapter; nothing un-noised is looked at.

    statements: what the sites signed for this attempt; the largest ε among them counts attempts without a
    sum. Raises SumOutOfRange for counts that honest sites do not reach.
    """
    stated = sorted(statements, key=lambda part: part.site)
    plan, survivors = evaluation_plan_of(study), len(collected.contributions)
    if collected.units is None:
        raise ValueError("expected a sum of counts, got none")
    total = top_up(
        collected.units.view(np.int32), plan, server_randomness(study, study.rounds), survivors=survivors
    )
    verify_range(total, sum_range(plan, dimension=total.size, survivors=survivors))
    width = plan.server_topup_sigma_units(survivors)
    summary = summarise(total, plan, survivors=survivors, server_sigma_units=width, evaluations=1)
    spent = max((part.epsilon for part in stated), default=0.0)
    summary = replace(summary, site_epsilon=max(summary.site_epsilon, spent))
    done = EvaluationSum(
        attempt=attempt,
        participations=tuple(replace(p, summed=p.site in collected.contributions) for p in stated),
        server_sigma_units=width,
    )
    return evaluation_entry(summary, number=study.rounds - 1, adapter=adapter, done=done)
