"""`fedrad-site status`: what is going on at this site, in words.

Read from the site's own files while everything runs (or does not): nothing is asked of the server and nothing
changes. Sentences name what is wrong first, then what to do.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

from client.budget import BudgetLimits, read_summary
from client.enrolment import read_enrolled
from client.heartbeat import AGENT_NAME, LINK_NAME, STALE_S, heard
from client.home import SiteHome, list_studies, read_approved_study, read_study
from common.errors import FedRadError, StudyNotApproved
from deploy.site.link import SKEW_WARNING_S
from deploy.site.up import STATUS_NAME as UP_NAME

_QUIET_S = 75.0


def read_status(home: SiteHome, *, now: float) -> dict[str, Any]:
    """Collect what the site's files say; `now` is Unix seconds."""
    run = home.directory / "run"
    up, link, agent = (heard(run / name, now=now) for name in (UP_NAME, LINK_NAME, AGENT_NAME))
    enrolled: dict[str, Any] | None = None
    try:
        known = read_enrolled(home)
        enrolled = {
            "consortium": known.consortium,
            "server": known.address,
            "certificate_until": known.not_after.isoformat(),
            "certificate_expired": known.not_after.timestamp() < now,
        }
    except FedRadError:
        pass
    return {
        "site": home.site,
        "enrolled": enrolled,
        "running": bool(up or link or agent),  # without `up`: agent, link and relay as services of their own
        "agent": agent is not None,
        "link": link is not None,
        "programs": up["programs"] if up else {},
        "connected": bool(link and link.get("connected")),
        "relaying": bool(link and now - float(link.get("gateway_last_s", 0)) < _QUIET_S),
        "error": str(link.get("error") or link.get("gateway_error") or "") if link else "",
        "clock_ahead_s": link.get("clock_ahead_s") if link else None,
        "studies": [_study(home, sha256) for sha256 in list_studies(home)],
        "budget": _budget(home),
    }


def words(status: dict[str, Any], *, now: float) -> str:
    """Say it: one sentence per line."""
    lines = [_first(status)]
    if status["running"]:
        lines += [
            f"The {name} has given no sign of life for {STALE_S:.0f} s or more: it is starting, has ended or "
            f"hangs; see logs/{name}.log, or the log of its unit or container."
            for name in ("agent", "link")
            if not status[name]
        ]
    if status["error"]:
        lines.append(f"Something is in the way between this site and the server: {status['error']}")
    ahead = status["clock_ahead_s"]
    if ahead is not None and abs(ahead) > SKEW_WARNING_S:
        direction = "ahead of" if ahead > 0 else "behind"
        lines.append(
            f"warning: ClockSkewed: this machine's clock is {abs(ahead):.0f} s {direction} the server's; "
            "set it (NTP)."
        )
    if status["enrolled"]:
        until = datetime.fromisoformat(status["enrolled"]["certificate_until"])
        left_h = (until.timestamp() - now) / 3600
        state = "ended" if left_h < 0 else f"ends in {left_h / 24:.1f} days"
        lines.append(f"The certificate {state} ({until.astimezone(UTC):%Y-%m-%d %H:%M} UTC).")
    for name, program in sorted(status["programs"].items()):
        if not program["running"]:
            lines.append(
                f"The {name} is not running (it ended {program['ends']} times, last: {program['last_end']}); "
                f"see logs/{name}.log."
            )
    lines += [_study_words(study) for study in status["studies"]] or ["No study was received yet."]
    lines.append(status["budget"])
    return "\n".join(lines)


def _first(status: dict[str, Any]) -> str:
    site = status["site"]
    if status["enrolled"] is None:
        return f"Site {site} is not enrolled yet: send the request of `fedrad-site enrol` to the operator."
    server = status["enrolled"]["server"]
    if not status["running"]:
        return f"Site {site} is enrolled at {server} but not running: start `fedrad-site up`."
    if not status["agent"]:
        return f"Site {site} is not at work, though it is enrolled at {server}: its agent does not serve."
    if status["connected"] and status["relaying"]:
        return f"Site {site} is connected to {server}."
    if status["connected"]:
        return f"Site {site} reaches {server}; its SuperNode is not connected (yet): see logs/supernode.log."
    return f"Site {site} runs, but has no connection to {server}."


def _study_words(study: dict[str, Any]) -> str:
    if "error" in study:
        return f"Study {study['study'][:12]} cannot be read: {study['error']}"
    head = f"Study {study['id']} ({study['study'][:12]}) is {study['state']}"
    if study["state"] == "waiting for your decision":
        return head + f": `fedrad-site study show {study['id']}`, then approve or refuse it."
    if study["rounds_seen"]:
        head += f"; {study['rounds_seen']} of {study['rounds']} rounds are done"
    return head + "."


def _study(home: SiteHome, sha256: str) -> dict[str, Any]:
    try:
        study = read_study(home, sha256)
    except FedRadError as error:
        return {"study": sha256, "error": f"{error.code}: {error}"}
    state = "approved"
    try:
        read_approved_study(home, sha256)
    except StudyNotApproved:
        refused = (home.study_directory(sha256) / "refusal.json").is_file()
        state = "refused" if refused else "waiting for your decision"
    path = home.state_directory(sha256) / "seen.json"  # read, not opened as the agent does: that writes
    seen = int(json.loads(path.read_text())["round"]) + 1 if path.is_file() else 0
    return {
        "study": sha256,
        "id": study.study.id,
        "state": state,
        "rounds": study.rounds,
        "rounds_seen": seen,
    }


def _budget(home: SiteHome) -> str:
    try:
        summary = read_summary(home.budget_path, BudgetLimits(epsilon=home.epsilon, delta=home.delta))
    except (FedRadError, OSError) as error:
        return f"The budget cannot be read: {error}"
    return (
        f"Privacy: ε {summary.epsilon_spent:.2f} spent, {summary.epsilon_committed:.2f} committed of "
        f"{summary.limits.epsilon:.2f} at δ = {summary.limits.delta:.0e}."
    )


def unix_now() -> float:
    return time.time()
