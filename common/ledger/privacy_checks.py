"""The audit of privacy: every epsilon recomputed from the round records, every budget kept.

The site view composes the rounds that a site took part in (a failed attempt costs as planned), the release
view the sums that were released. Exact values are recomputed at releases, at the end and at rounds in
between; elsewhere a stated epsilon must lie between its neighbours, which it does when it never decreases.
Needs dp-accounting; without it the recomputation is not checkable and only the order and budgets are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from importlib.util import find_spec

from common.config import Mode
from common.errors import FedRadError
from common.ledger.case import StudyCase
from common.ledger.entries import Outcome, Release, RoundRecord, StudyEnd
from common.ledger.findings import Finding, Problem, Problems, Status, conclude
from common.privacy.accounting import History, epsilon_pld
from common.privacy.mechanism import Mode as PlanMode
from common.privacy.mechanism import PrivacyPlan, ServedRound, View
from common.privacy.study_plan import plan_of

TOLERANCE = 1e-6
_EXACT_ROUNDS = 4
_NO_PRIVACY = "mode plain: the study claims no privacy"
NO_ACCOUNTANT = "dp-accounting is not installed: pip install 'fedrad[audit]'"

Epsilon = Callable[[View, tuple[ServedRound, ...]], float]


def check_privacy(study: StudyCase) -> list[Finding]:
    """Recompute both views and compare every statement and every budget."""
    controls = ("site-epsilon", "release-epsilon", "budgets")
    if study.manifest.privacy.mode is Mode.PLAIN:
        return [Finding(c, Status.NOT_CHECKABLE, _NO_PRIVACY, study=study.sha256) for c in controls]
    try:
        plan = plan_of(study.manifest)
    except FedRadError as error:
        return [
            conclude(
                c, [Problem(f"the manifest fixes no privacy plan: {error}")], passed="", study=study.sha256
            )
            for c in controls
        ]
    epsilon = _accountant(plan) if find_spec("dp_accounting") else None
    return [
        _check_site(study, epsilon),
        _check_release(study, plan, epsilon),
        _check_budgets(study, plan, epsilon),
    ]


def site_history(study: StudyCase, site: str, upto: int | None = None) -> tuple[ServedRound, ...]:
    """The rounds that charged a site, up to and including entry `upto`."""
    return tuple(
        _served(record) if part.summed else ServedRound(None)
        for index, record in study.rounds
        if upto is None or index <= upto
        for part in record.participations
        if part.site == site
    )


def release_history(study: StudyCase, upto: int | None = None) -> tuple[ServedRound, ...]:
    """The rounds whose sums were released, up to and including entry `upto`."""
    return tuple(
        _served(record)
        for index, record in study.rounds
        if record.outcome is Outcome.RELEASED and (upto is None or index <= upto)
    )


def _served(record: RoundRecord) -> ServedRound:
    if record.outcome is not Outcome.RELEASED:
        return ServedRound(None)
    return ServedRound(sum(part.summed for part in record.participations), record.server_sigma_units)


def _accountant(plan: PrivacyPlan) -> Epsilon:
    return lambda view, history: _cost(plan.served(view, history), plan.delta)


@functools.lru_cache(maxsize=1024)
def _cost(history: History, delta: float) -> float:
    """Epsilon of a history, remembered: sites that took part in the same rounds share one computation."""
    return epsilon_pld(history, delta=delta)


def _check_site(study: StudyCase, epsilon: Epsilon | None) -> Finding:
    problems, recomputed = Problems(), 0
    for site in study.manifest.site_ids:
        stated = [(i, p.epsilon) for i, r in study.rounds for p in r.participations if p.site == site]
        problems += _decreasing(stated, f"{site}'s epsilon")
        if epsilon is None:
            continue
        for index, value in _picked(stated):
            try:
                exact = epsilon(View.SITE, site_history(study, site, index))
            except FedRadError as error:
                problems.add(f"entry {index}: {error}", f"entry {index}")
                continue
            recomputed += 1
            if exact > value * (1 + TOLERANCE) + TOLERANCE:
                what = f"{site} stated epsilon {value:.4f}, its rounds cost {exact:.4f}"
                problems.add(f"entry {index}: {what}", f"entry {index}")
    return conclude(
        "site-epsilon",
        problems,
        passed=f"{recomputed} statements recomputed, none below what the site's rounds cost",
        unchecked="" if epsilon else NO_ACCOUNTANT,
        evidence=_last(study),
        study=study.sha256,
    )


def _check_release(study: StudyCase, plan: PrivacyPlan, epsilon: Epsilon | None) -> Finding:
    released = [(i, r.release_epsilon) for i, r in study.rounds if r.outcome is Outcome.RELEASED]
    problems = Problems(_decreasing(released, "the release epsilon"))
    stated = _picked(released)
    for index, entry in study.entries:
        body = entry.body
        if isinstance(body, Release | StudyEnd):
            stated.append((index, body.release_epsilon))
        if isinstance(body, Release) and body.delta != plan.delta:
            problems.add(f"release {body.version}: delta is not the manifest's", f"entry {index}")
    for index, value in stated if epsilon else ():
        try:
            exact = epsilon(View.RELEASE, release_history(study, index)) if epsilon else 0.0
        except FedRadError as error:
            problems.add(f"entry {index}: {error}", f"entry {index}")
            continue
        enough = plan.mode is PlanMode.LOCAL and value > exact  # there the largest site epsilon is stated
        if not enough and not math.isclose(exact, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            what = f"release epsilon stated as {value:.4f}, the released rounds cost {exact:.4f}"
            problems.add(f"entry {index}: {what}", f"entry {index}")
    return conclude(
        "release-epsilon",
        problems,
        passed=f"{len(stated)} statements recomputed exactly, delta {plan.delta:g}",
        unchecked="" if epsilon else NO_ACCOUNTANT,
        evidence=_last(study),
        study=study.sha256,
    )


def _check_budgets(study: StudyCase, plan: PrivacyPlan, epsilon: Epsilon | None) -> Finding:
    privacy, problems, worst, last = study.manifest.privacy, Problems(), 0.0, 0.0
    site_cap, release_cap = (
        privacy.site_epsilon * (1 + TOLERANCE),
        privacy.release_epsilon * (1 + TOLERANCE),
    )
    capped = plan.mode is PlanMode.CONSORTIUM
    for index, entry in study.entries:
        body, where = entry.body, f"entry {index}"
        if isinstance(body, RoundRecord):
            last = body.release_epsilon
            for part in body.participations:
                worst = max(worst, part.epsilon)
                if part.epsilon > site_cap:
                    problems.add(f"round {body.number}: {part.site} spent {part.epsilon:.4f}", where)
            if capped and last > release_cap:
                problems.add(f"round {body.number}: the release spent {last:.4f}", where)
        elif isinstance(body, Release) and body.site_epsilon < worst * (1 - TOLERANCE):
            problems.add(f"release {body.version} states a site epsilon below the sites' own", where)
    if epsilon and _cost(plan.planned(View.SITE), plan.delta) > site_cap:
        problems.add("the plan itself costs more than the site budget", f"entry {study.index}")
    if epsilon and capped and _cost(plan.planned(View.RELEASE), plan.delta) > release_cap:
        problems.add("the plan itself costs more than the release budget", f"entry {study.index}")
    return conclude(
        "budgets",
        problems,
        passed=f"stated: site epsilon {worst:.3f} of {privacy.site_epsilon:g}, "
        f"release epsilon {last:.3f} of {privacy.release_epsilon:g}",
        evidence=(f"entry {study.index}", *_last(study)),
        study=study.sha256,
    )


def _decreasing(stated: list[tuple[int, float]], what: str) -> list[Problem]:
    return [
        Problem(f"entry {index}: {what} falls from {before:.4f} to {value:.4f}", f"entry {index}")
        for (_, before), (index, value) in itertools.pairwise(stated)
        if value < before * (1 - TOLERANCE)
    ]


def _picked(stated: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The last statement and a few spread over those before it."""
    if not stated:
        return []
    step = max(1, len(stated) // _EXACT_ROUNDS)
    return [*stated[step - 1 : -1 : step], stated[-1]]


def _last(study: StudyCase) -> tuple[str, ...]:
    return (f"entry {study.rounds[-1][0]}",) if study.rounds else ()
