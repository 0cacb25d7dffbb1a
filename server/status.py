"""A study as its directory tells it: sites, rounds, privacy spent, who is missing and why, and what to do.

Read from the durable files (`study.json`, `log.jsonl`, `records.jsonl`, `ledger/entries.jsonl`,
`pending.json`, `traffic.json`) while the server may be writing them: nothing is locked, repaired or changed,
and a torn last line is left out. A site's ε is what the site last signed in the ledger; where it signed
none, an upper bound from the attempts that it may have served. Signatures of records and entries are not
verified here: that is `fedrad-audit`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import errors
from common.config import Mode, Study
from common.errors import CheckpointInvalid
from common.ledger.entries import Outcome
from common.privacy.mechanism import PrivacyPlan, ServedRound, View
from common.privacy.study_plan import plan_of
from common.records import RoundRecord
from server.bundles import LEDGER_NAME
from server.checkpoint import Pending, read_signed_study
from server.log import ENTRIES_NAME

MAX_CURVE_POINTS = 13
_CODE = re.compile(r"[A-Z][A-Za-z]{2,50}")
_PLAIN_REASONS = {
    "not connected": "not-connected",
    "no answer before the deadline": "no-answer",
    "no answer within the grace": "too-slow",
    "no keys for this round: it joins the next": "no-keys",
}
_CARRIERS = ("SiteRefused", "AgentRefused", "NodeFailed")  # what brought a reason, told where nothing else is
_ADVICE = {
    "not-connected": "Ask the site for `fedrad-site status`: its node has no connection to this server.",
    "no-answer": "The site got the request and has gone since; where it is back, nothing to do.",
    "too-slow": "It was still at work when cohort.grace_s was over: give the next study a longer one.",
    "no-keys": "It was away when keys were exchanged, and joins the next round that it is back for.",
    "NodeFailed": "The site's node or agent ended during the round; where it stays away, ask the site.",
    "BudgetExceeded": "The site's own privacy limit is reached; only the site can raise it.",
    "DataInsufficient": "The site's data cannot serve this study; its own log says why.",
    "StudyNotApproved": "The site has not approved this study, or withdrew its approval: telephone.",
    "StudyUnknown": "The site has not received this study: send study.json and operator.sig.",
    "BaseHashMismatch": "The site's base model differs from the pinned one: have it copied again.",
    "BaseInvalid": "The site's base model is incomplete: have it copied again.",
    "DeadlinePassed": "The request came too late: compare the clocks of both machines.",
    "RoundAlreadyServed": "The site has gone on beyond this state: was an old copy of this server restored?",
    "PreviousStateMismatch": "The site has seen another history: was an old copy of this server restored?",
    "SecretWrong": "It dealt shares of another secret than it advertised, and is left out: an incident.",
    "ShareWrong": "It dealt other shares than it announced, and is left out: an incident.",
    "WitnessBehind": "Nothing to do: the site is asked again from where its copy of the ledger stands.",
    "LogForked": "The site saw another ledger: was an old copy of this server restored? Else an incident.",
    "LogShrunk": "The site saw a longer ledger: was an old copy of this server restored? Else an incident.",
    "SiteRevoked": "This site was revoked; a new enrolment lets it in again.",
    "VersionsTooFarApart": "The two sides' versions are too far apart: upgrade the older one.",
    "SignatureInvalid": "A reply was not signed by the site's key: treat as an incident.",
}


@dataclass(frozen=True)
class RoundView:
    """One served round; `seconds` is None where the server ended between its record and its log line."""

    round: int
    attempt: int
    seconds: float | None
    contributors: tuple[str, ...]
    missing: dict[str, str]
    time_unix_s: int


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt that brought no sum; `missing` maps a site to the name of the reason."""

    round: int
    attempt: int
    served: int
    missing: dict[str, str]
    reason: str


@dataclass(frozen=True)
class SiteView:
    """One site: `reason` and `advice` are empty while it serves; `epsilon_signed`: the site signed it.

    `late_s`: how far past the deadline its answer came in the newest round, 0 where it was in time.
    """

    site: str
    serves: bool
    rounds_served: int
    last_round: int | None
    absences: dict[str, int]
    reason: str
    advice: str
    epsilon: float | None
    epsilon_signed: bool
    late_s: float


@dataclass(frozen=True)
class StatedPrivacy:
    """What the ledger states: release ε after each released round, and the newest ε that each site signed."""

    release: dict[int, float]
    sites: dict[str, float]


@dataclass(frozen=True)
class EpsilonPoint:
    """Release ε after `rounds` served rounds."""

    rounds: int
    epsilon: float


@dataclass(frozen=True)
class StudyView:
    """Everything that the operator's views show of one study; ε are None where nothing is claimed."""

    directory: str
    id: str
    purpose: str
    sha256: str
    mode: str
    base: str
    state: str
    rounds_planned: int
    rounds_done: int
    floor: int
    sites: tuple[SiteView, ...]
    rounds: tuple[RoundView, ...]
    failed: tuple[FailedAttempt, ...]
    attempt: Pending | None
    grace_s: float
    delta: float | None
    release_epsilon: float | None
    release_epsilon_limit: float | None
    site_epsilon_limit: float | None
    curve: tuple[EpsilonPoint, ...]
    bytes_by_stage: dict[str, int]
    messages_by_stage: dict[str, int]

    @property
    def missing_now(self) -> dict[str, str]:
        return {site.site: site.reason for site in self.sites if not site.serves}


def reason_name(text: str) -> str:
    """Name the reason of an absence: a known error's name or one of a few words; never a site's free text."""
    if text in _PLAIN_REASONS:
        return _PLAIN_REASONS[text]
    named = [part.strip() for part in text.split(":")[:5]]
    known = [name for name in named if _CODE.fullmatch(name) and (name in _CARRIERS or hasattr(errors, name))]
    told = [name for name in known if name not in _CARRIERS]
    return (told or known or ["other"])[0]


def advice(reason: str) -> str:
    """Say what the operator can do about an absence."""
    return _ADVICE.get(reason, "Telephone the site: its `fedrad-site status` and agent log say more.")


def find_studies(directory: Path) -> list[Path]:
    """List the study directories that `directory` is or holds, two levels down.

    Raises CheckpointInvalid where there is none, unless it is a server's own directory (`server.json`).
    """
    found = [directory] if (directory / "study.json").is_file() else []
    for pattern in ("*/study.json", "*/*/study.json"):
        found += [path.parent for path in directory.glob(pattern) if (path.parent / "operator.sig").is_file()]
    if not found and not (directory / "server.json").is_file():
        raise CheckpointInvalid(f"{directory}: expected a study directory, or studies below, got none")
    return sorted(set(found))


def read_view(directory: Path) -> StudyView:
    """Read a study directory, whoever is at work in it; raises CheckpointInvalid or SignatureInvalid."""
    study = read_signed_study(directory)
    held = is_held(directory / "lock")
    records = [_parse_record(value["record"]) for value in read_lines(directory / "records.jsonl")]
    traffic = read_json(directory / "traffic.json")
    return view_of(
        study,
        directory=str(directory),
        held=held,
        events=read_lines(directory / "log.jsonl"),
        records=records,
        pending=_pending(read_json(directory / "pending.json")),
        traffic=traffic if isinstance(traffic, dict) else {},
        stated=read_stated(directory / LEDGER_NAME / ENTRIES_NAME, study.sha256),
    )


def read_stated(path: Path, study: str) -> StatedPrivacy:
    """Read what a ledger's entries state of a study; nothing where there is no ledger."""
    release: dict[int, float] = {}
    sites: dict[str, float] = {}
    for value in read_lines(path):
        body = value.get("body")
        if value.get("kind") != "round" or value.get("study") != study or not isinstance(body, dict):
            continue
        if body["outcome"] == Outcome.RELEASED.value:
            release[int(body["number"])] = float(body["release_epsilon"])
        for part in body["participations"]:
            sites[str(part["site"])] = max(float(part["epsilon"]), sites.get(str(part["site"]), 0.0))
    return StatedPrivacy(release, sites)


def view_of(
    study: Study,
    *,
    directory: str,
    held: bool | None,
    events: Sequence[dict[str, Any]],
    records: Sequence[RoundRecord],
    pending: Pending | None,
    traffic: dict[str, Any],
    stated: StatedPrivacy,
) -> StudyView:
    """Make the view of a study from what its files hold; pure."""
    seconds = {event["round"]: float(event["seconds"]) for event in events if event.get("event") == "round"}
    missing = {event["round"]: event["missing"] for event in events if event.get("event") == "round"}
    late: dict[str, float] = next(
        (event.get("late", {}) for event in reversed(events) if event.get("event") == "round"), {}
    )
    rounds = tuple(
        RoundView(
            record.round, record.attempt, seconds.get(record.round), record.contributors,
            {site: reason_name(text) for site, text in missing.get(record.round, record.missing).items()},
            record.time_unix_s,
        )
        for record in records
    )  # fmt: skip
    failed = tuple(
        FailedAttempt(
            event["round"], event["attempt"], event["served"],
            {site: reason_name(text) for site, text in event["missing"].items()},
            reason_name(str(event["reason"])) if event.get("reason") else "below-floor",
        )
        for event in events
        if event.get("event") == "round-failed"
    )  # fmt: skip
    plan = None if study.privacy.mode is Mode.PLAIN else plan_of(study)
    consortium = study.privacy.mode is Mode.CONSORTIUM
    curve = release_curve(plan, records, stated.release) if plan is not None and consortium else ()
    return StudyView(
        directory=directory,
        id=study.study.id,
        purpose=study.study.purpose,
        sha256=study.sha256,
        mode=study.privacy.mode.value,
        base=study.base.name,
        state=_state(study, events, records, held=held),
        rounds_planned=study.rounds,
        rounds_done=len(records),
        floor=study.cohort.min_sites,
        sites=tuple(
            _site(study, site, events, rounds, failed, plan, stated, late_s=float(late.get(site, 0.0)))
            for site in study.site_ids
        ),
        rounds=rounds,
        failed=failed,
        attempt=pending,
        grace_s=study.cohort.grace,
        delta=plan.delta if plan else None,
        release_epsilon=curve[-1].epsilon if curve else (0.0 if consortium else None),
        release_epsilon_limit=study.privacy.release_epsilon if consortium else None,
        site_epsilon_limit=study.privacy.site_epsilon if plan else None,
        curve=curve,
        bytes_by_stage=_counts(traffic.get("bytes")),
        messages_by_stage=_counts(traffic.get("messages")),
    )


def release_curve(
    plan: PrivacyPlan, records: Sequence[RoundRecord], stated: Mapping[int, float]
) -> tuple[EpsilonPoint, ...]:
    """Release ε after some of the served rounds, the last one among them; at most MAX_CURVE_POINTS.

    Where the ledger states it, that is it; else it is composed from the records.
    """
    served = tuple(ServedRound(len(record.contributors), record.server_sigma_units) for record in records)
    step = max(1, -(-len(served) // (MAX_CURVE_POINTS - 1)))
    chosen = sorted({1, *range(step, len(served) + 1, step), len(served)}) if served else []
    points = []
    for count in chosen:
        epsilon = stated.get(records[count - 1].round)
        points.append(EpsilonPoint(count, epsilon or _release_epsilon(plan, served[:count])))
    return tuple(points)


@lru_cache(maxsize=4096)
def _release_epsilon(plan: PrivacyPlan, served: tuple[ServedRound, ...]) -> float:
    return plan.epsilon(View.RELEASE, served)


@lru_cache(maxsize=4096)
def _site_bound(plan: PrivacyPlan, charges: int) -> float:
    if not charges:
        return 0.0
    from common.privacy.accounting import SampledGaussian, epsilon_pld

    cost = SampledGaussian(plan.sampling_rate, plan.site_noise, charges * plan.local_steps)
    return epsilon_pld([cost], delta=plan.delta)


def _site(
    study: Study,
    site: str,
    events: Iterable[dict[str, Any]],
    rounds: Sequence[RoundView],
    failed: Sequence[FailedAttempt],
    plan: PrivacyPlan | None,
    stated: StatedPrivacy,
    *,
    late_s: float,
) -> SiteView:
    served = [view.round for view in rounds if site in view.contributors]
    absences: dict[str, int] = {}
    attempts: list[tuple[int, int, str]] = []
    tried = [(view.round, view.attempt, view.missing) for view in rounds]
    tried += [(view.round, view.attempt, view.missing) for view in failed]
    for number, attempt, missing in tried:
        reason = missing.get(site, "")
        attempts.append((number, attempt, reason))
        if reason:
            absences[reason] = absences.get(reason, 0) + 1
    reason = _present_reason([reason for *_, reason in sorted(attempts)], first=_first_reason(site, events))
    asked = sum(reason not in ("not-connected", "no-keys") for _, _, reason in attempts)
    charges = min(asked, study.rounds + study.privacy.spare_rounds)
    return SiteView(
        site=site,
        serves=not reason,
        rounds_served=len(served),
        last_round=max(served, default=None),
        absences=dict(sorted(absences.items())),
        reason=reason,
        advice=advice(reason) if reason else "",
        epsilon=None if plan is None else stated.sites.get(site) or _site_bound(plan, charges),
        epsilon_signed=plan is not None and site in stated.sites,
        late_s=late_s,
    )


def _present_reason(reasons: Sequence[str], *, first: str) -> str:
    """The reason of the newest attempt; where keys were only missed since, that of the absence before."""
    if not reasons or not reasons[-1]:
        return "" if reasons else first
    absence: list[str] = []
    for reason in reversed(reasons):
        if not reason:
            break
        absence.append(reason)
    return next((reason for reason in absence if reason != "no-keys"), absence[0])


def _first_reason(site: str, events: Iterable[dict[str, Any]]) -> str:
    """Before the first round: why a site was not ready, empty when nothing was said of it."""
    reasons = [e["reason"] for e in events if e.get("event") == "site-not-ready" and e.get("site") == site]
    return reason_name(str(reasons[-1])) if reasons else ""


def _state(
    study: Study, events: Sequence[dict[str, Any]], records: Sequence[RoundRecord], *, held: bool | None
) -> str:
    if any(event.get("event") == "finished" for event in events):
        return "finished"
    if held:
        return "running" if records or events else "starting"
    if not events:
        return "not started"
    return "stopped" if held is False else "unknown"


def is_held(lock: Path, *, locks: Path = Path("/proc/locks")) -> bool | None:
    """Whether a process holds `flock` on a file, without taking it; None where the system does not tell."""
    try:
        status = lock.stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return None if lock.exists() else False
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(" FLOCK " in line and name in line.split() for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSON-lines file; a torn or foreign line is left out."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    values = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def _parse_record(value: Any) -> RoundRecord:
    from common.canonical import canonical_json
    from common.records import parse_record

    return parse_record(canonical_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file that others may be writing; None where it is not there or is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _pending(value: Any) -> Pending | None:
    if not isinstance(value, dict):
        return None
    try:
        return Pending(**{**value, "cohort": tuple(value["cohort"])})
    except (KeyError, TypeError):
        return None


def _counts(value: Any) -> dict[str, int]:
    return {str(name): int(count) for name, count in sorted(value.items())} if isinstance(value, dict) else {}
