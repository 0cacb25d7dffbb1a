"""The audit of a federated evaluation: what sites signed of it, its noise, and both epsilons recomputed.

The plan of an evaluation follows from its manifest, whose two ε for it are its own, on top of training's.
Guarantees: an entry fails without what the sites signed, or with a width (a site's or the server's) that is
not the plan's, an ε other than that costs, or a site that did not sign. It does not recompute the scores
(nobody keeps the counts). Which sites were in the sum (`summed`) and that the server drew its noise are the
operator's word, and the release ε rests on them. The plan and its cost need dp-accounting; without it the
control is not checkable, unless something else is wrong.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

from common.errors import FedRadError
from common.ledger.case import Case, StudyCase
from common.ledger.entries import (
    Evaluation,
    EvaluationSum,
    Incident,
    KeyUse,
    Outcome,
    Participation,
    RoundRecord,
    StudyEnd,
)
from common.ledger.findings import Finding, Problems, conclude
from common.ledger.privacy_checks import NO_ACCOUNTANT, TOLERANCE
from common.ledger.statements import make_round, verify_contribution
from common.ledger.study_checks import close
from common.privacy.mechanism import ServedRound, View

CONTROL = "evaluation-epsilon"
EVALUATION_FAILED = "evaluation-failed"
_ROUNDED = 1e-6  # figures of the entry have six decimals


def check_evaluation(case: Case, study: StudyCase) -> Finding:
    """Check the one federated evaluation that a manifest may ask for."""
    section = study.manifest.federated_evaluation
    found = [
        (index, entry.body)
        for index, entry in study.entries
        if isinstance(entry.body, Evaluation) and entry.body.site == "all"
    ]
    evidence = tuple(f"entry {index}" for index, _ in found)
    problems, unchecked, passed = Problems(), "", ""
    for index, _ in found[1:] if section else found:
        problems.add("an evaluation across sites that the manifest does not ask for", f"entry {index}")
    if section is None:
        passed = "the manifest asks for no federated evaluation, and none is on record"
    elif not found:
        failed = any(
            isinstance(e.body, Incident) and e.body.code == EVALUATION_FAILED for _, e in study.entries
        )
        unchecked = "the federated evaluation failed" if failed else "no federated evaluation is on record"
    else:
        index, body = found[0]
        problems += _entry(study, body, index)
        if body.sum is None:
            problems.add("the entry does not hold what the sites signed", f"entry {index}")
        else:
            problems += _statements(case, study, body, body.sum, index)
            if not problems and find_spec("dp_accounting"):
                problems += _costs(study, body, body.sum, index)
            unchecked = "" if find_spec("dp_accounting") else NO_ACCOUNTANT
            site, release = (body.metrics.get(f"{view}_epsilon", 0.0) for view in ("site", "release"))
            passed = (
                f"site epsilon {site:.3f} of {section.site_epsilon:g}, release epsilon {release:.3f} of "
                f"{section.release_epsilon:g}: what the plan's noise, signed by "
                f"{len(body.sum.participations)} sites, costs"
            )
    return conclude(
        CONTROL, problems, passed=passed, unchecked=unchecked, evidence=evidence, study=study.sha256
    )


def _entry(study: StudyCase, body: Evaluation, index: int) -> Problems:
    """What needs no accountant: the adapter, and that the ε are stated and within the manifest's."""
    problems, where, section = Problems(), f"entry {index}", study.manifest.federated_evaluation
    ends = [entry.body for _, entry in study.entries if isinstance(entry.body, StudyEnd)]
    if any(end.adapter != body.adapter for end in ends):
        problems.add("evaluated an adapter that the study did not end with", where)
    for view, cap in (
        (("site", section.site_epsilon), ("release", section.release_epsilon)) if section else ()
    ):
        stated = body.metrics.get(f"{view}_epsilon", 0.0)
        if not 0 < stated <= cap * (1 + TOLERANCE):
            problems.add(f"states a {view} epsilon of {stated:.4f}, the manifest allows {cap:g}", where)
    return problems


def _statements(case: Case, study: StudyCase, body: Evaluation, done: EvaluationSum, index: int) -> Problems:
    """Each site signed its noise and ε for this very attempt; enough of them are in the sum."""
    manifest, problems, where = study.manifest, Problems(), f"entry {index}"
    if not 1 <= done.attempt <= manifest.cohort.max_attempts:
        problems.add(f"attempt {done.attempt} of at most {manifest.cohort.max_attempts}", where)
    summed = sum(part.summed for part in done.participations)
    least = max(manifest.cohort.min_sites, len(manifest.site_ids) - manifest.privacy.dropouts)
    if not least <= summed <= len(manifest.site_ids):
        problems.add(f"a sum of {summed} sites, expected {least} to {len(manifest.site_ids)}", where)
    earlier = {part.commitment for _, record in study.rounds for part in record.participations}
    record = make_round(
        manifest, number=manifest.rounds, attempt=done.attempt, outcome=Outcome.FAILED,
        adapter_in=body.adapter, cohort=manifest.site_ids, code="", lockfile="",
    )  # fmt: skip
    most = max((part.epsilon for part in done.participations), default=0.0)
    if body.metrics.get("site_epsilon", 0.0) < most - _ROUNDED:
        problems.add(f"states a site epsilon below the {most:.4f} that a site signed", where)
    for part in done.participations:
        if part.site not in manifest.site_ids:
            problems.add(f"{part.site} is not of this study", where)
            continue
        if part.commitment in earlier:
            problems.add(f"{part.site}'s contribution stands in the log before", where)
        keys = case.keys.valid(part.site, KeyUse.MESSAGE, index=index, time_s=case.entries[index].time_s)
        if not any(_signed(study, record, part, key) for key in keys):
            problems.add(f"{part.site} did not sign what is recorded of it", where)
    return problems


def _signed(study: StudyCase, record: RoundRecord, part: Participation, key: str) -> bool:
    try:
        verify_contribution(study.sha256, record, part, key)
    except FedRadError:
        return False
    return True


def _costs(study: StudyCase, body: Evaluation, done: EvaluationSum, index: int) -> Problems:
    """Hold every width against the plan of the manifest, and both ε and the noise against what it gives."""
    from common.evaluation_counts import evaluation_plan_of

    problems, where = Problems(), f"entry {index}"
    summed = sum(part.summed for part in done.participations)
    try:
        plan = evaluation_plan_of(study.manifest)
        share, topup = plan.site_share_sigma_units, plan.server_topup_sigma_units(summed)
        charged = [plan.epsilon(View.SITE, [ServedRound(None)] * n) for n in range(1, done.attempt + 1)]
        served = [ServedRound(summed, topup)]
        site, release = plan.epsilon(View.SITE, served), plan.epsilon(View.RELEASE, served)
    except FedRadError as error:
        problems.add(f"the manifest fixes no plan of an evaluation: {error}", where)
        return problems
    if not close(done.server_sigma_units, topup):
        got = done.server_sigma_units
        problems.add(f"the server added width {got:g}, the plan says {topup:g}", where)
    for part in done.participations:
        if not close(part.sigma_units, share):
            got = part.sigma_units
            problems.add(f"{part.site} added noise of width {got:g}, the plan says {share:g}", where)
    for part in done.participations:
        if not any(math.isclose(part.epsilon, cost, rel_tol=TOLERANCE) for cost in charged):
            allowed = f"{charged[0]:.4f} to {charged[-1]:.4f}"
            problems.add(f"{part.site} stated epsilon {part.epsilon:.4f}, its attempts cost {allowed}", where)
    stated = body.metrics
    if stated["site_epsilon"] < site - _ROUNDED - TOLERANCE * site:
        problems.add(f"site epsilon stated as {stated['site_epsilon']:.4f}, the sum cost {site:.4f}", where)
    if not math.isclose(stated["release_epsilon"], release, rel_tol=TOLERANCE, abs_tol=_ROUNDED):
        what = f"release epsilon stated as {stated['release_epsilon']:.4f}, the plan gives {release:.4f}"
        problems.add(what, where)
    noise = math.sqrt(summed * share**2 + topup**2) * plan.quantum  # standard deviation of every count
    if not math.isclose(stated.get("noise", 0.0), noise, rel_tol=TOLERANCE, abs_tol=_ROUNDED):
        problems.add(f"noise stated as {stated.get('noise', 0.0):.4f}, the plan gives {noise:.4f}", where)
    return problems
