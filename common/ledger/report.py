"""The audit's report for people: what was checked, what happened, who took part, what it cost in privacy.

Guarantees: every statement is computed from the bundle and links to the entry, checkpoint or member that it
rests on; a report of a failed bundle says so first. Templates (impact assessment, technical documentation)
are filled with what the ledger knows and name what only people can add.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from common.canonical import sha256_hex
from common.config import Mode
from common.ledger.audit import AuditReport
from common.ledger.case import Case, StudyCase
from common.ledger.document import Block, Cell, Chart, Heading, Link, Mark, Record, Table, Text, entry_link
from common.ledger.entries import (
    AdapterDecision,
    Approval,
    DataUse,
    Entry,
    Evaluation,
    Incident,
    Outcome,
    Release,
    RoundRecord,
    StudyEnd,
    StudyOpened,
    format_entry,
)
from common.ledger.findings import Finding, Status, catalogue
from common.ledger.templates import template_blocks

_TONES = {Status.PASS: "good", Status.FAIL: "bad", Status.NOT_CHECKABLE: "open"}
_MAX_RECORDS = 5000
TITLE = "FedRad audit report"


def report_json(report: AuditReport) -> dict[str, Any]:
    """The findings with titles and questions, and the map of regimes, as plain JSON values."""
    known = {control["id"]: control for control in catalogue()["controls"]}
    value = report.to_json()
    for finding in value["findings"]:
        finding["title"] = known[finding["control"]]["title"]
        finding["question"] = known[finding["control"]]["question"]
    value["regimes"] = [
        {
            **regime,
            "lines": [{**line, "status": _line_status(report, line["controls"])} for line in regime["lines"]],
        }
        for regime in catalogue()["regimes"]
    ]
    return value


def report_blocks(report: AuditReport) -> list[Block]:
    """Build the whole report as blocks."""
    blocks: list[Block] = [Heading(TITLE, 1), *_summary(report), *_findings(report)]
    if report.case is not None:
        for study in report.case.studies.values():
            blocks += _study(report.case, study)
        blocks += _timeline(report.case)
    blocks += _regimes(report)
    if report.case is not None:
        for study in report.case.studies.values():
            blocks += template_blocks(report, study)
        blocks += _records(report.case)
    return blocks


def _summary(report: AuditReport) -> Iterator[Block]:
    verdict = Mark("PASS", "good") if report.passed else Mark("FAIL", "bad")
    yield Text(
        (
            verdict,
            f"{report.count(Status.PASS)} controls passed, {report.count(Status.FAIL)} failed, "
            f"{report.count(Status.NOT_CHECKABLE)} could not be checked.",
        )
    )
    failed = [finding for finding in report.findings if finding.status is Status.FAIL]
    if failed:
        titles = {control["id"]: control["title"] for control in catalogue()["controls"]}
        links = [Link(titles[f.control], _finding_anchor(f)) for f in failed]
        yield Text((Mark("Failed:", "bad"), *_listed(links)))
    yield Text((f"Bundle SHA-256 {report.bundle_sha256}.",))
    if report.case is not None:
        bundle = report.case.bundle
        yield Text(
            (
                f"Exported {_time(bundle.exported_s)} by {bundle.software}; log {bundle.log.name} with "
                f"{len(report.case.entries)} entries, {len(report.case.heads)} checkpoints and "
                f"{len(report.case.studies)} studies.",
            )
        )
    yield Text(
        (
            "Everything below was computed from the bundle alone, offline. Not checkable means that the "
            "bundle holds no means to check the control; it does not count as passed.",
        )
    )


def _findings(report: AuditReport) -> Iterator[Block]:
    known = {control["id"]: control for control in catalogue()["controls"]}
    yield Heading("Controls", 2, "controls")
    rows: list[tuple[Cell, ...]] = []
    for finding in report.findings:
        control = known[finding.control]
        rows.append(
            (
                Mark(finding.status.value, _TONES[finding.status]),
                control["title"],
                f"{control['question']} {finding.detail[:1].upper()}{finding.detail[1:]}.",
                _listed([_evidence(item) for item in finding.evidence[:6]]),
            )
        )
    anchors = tuple(_finding_anchor(finding) for finding in report.findings)
    yield Table(
        ("Outcome", "Control", "Question and finding", "Evidence"), (14, 18, 50, 18), tuple(rows), anchors
    )


def _study(case: Case, study: StudyCase) -> Iterator[Block]:
    manifest, privacy = study.manifest, study.manifest.privacy
    yield Heading(f"Study {manifest.study.id}", 2, f"study-{study.sha256}")
    yield Text(
        (
            f"{manifest.study.purpose}. Manifest SHA-256 {study.sha256}; opened in",
            entry_link(study.index),
            f"with {study.opened.software}.",
        )
    )
    if privacy.mode is Mode.PLAIN:
        yield Text((Mark("No privacy", "bad"), "was claimed: mode plain, for public or synthetic data only."))
    else:
        yield Text(
            (
                f"Unit of privacy: one patient at one site, add or remove one. Mode {privacy.mode.value}: "
                f"clip {privacy.clip_norm:g}, sampling {manifest.training.sampling_rate:g}, noise "
                f"multipliers {privacy.site_noise:g} (site view) and {privacy.release_noise:g} (release "
                f"view), delta {privacy.delta:g}. Site epsilon is what the server with {privacy.colluders} "
                "colluding sites could learn, release epsilon what anyone with the released model could.",
            )
        )
        yield _privacy_chart(study)
        yield _privacy_table(study)
    yield Heading("Who took part", 3)
    yield _participation(study)
    decided = study.bodies(AdapterDecision) + study.bodies(Evaluation) + study.bodies(Release)
    yield Heading("Evaluations, decisions and releases", 3)
    if decided:
        rows = [(entry_link(i), e.kind, _say(e)) for i, e in sorted(decided, key=lambda pair: pair[0])]
        yield Table(("Entry", "Kind", "What it says"), (12, 14, 74), tuple(rows))
    else:
        yield Text(("None on record.",))
    yield Heading("Incidents", 3)
    incidents = study.bodies(Incident)
    failed = [(i, r) for i, r in study.rounds if r.outcome is Outcome.FAILED]
    rows = [(entry_link(i), _time(e.time_s), _say(e)) for i, e in incidents]
    rows += [
        (entry_link(i), _time(case.entries[i].time_s), f"round {r.number} attempt {r.attempt} failed")
        for i, r in failed
    ]
    if rows:
        yield Table(("Entry", "Time", "What happened"), (12, 22, 66), tuple(rows))
    else:
        yield Text(("None on record.",))


def _privacy_chart(study: StudyCase) -> Chart:
    released = [(r.number, r.release_epsilon) for _, r in study.rounds if r.outcome is Outcome.RELEASED]
    series = [("release", ((0.0, 0.0), *((float(n + 1), e) for n, e in released)))]
    for site in study.manifest.site_ids:
        points = [
            (float(r.number + 1), p.epsilon)
            for _, r in study.rounds
            for p in r.participations
            if p.site == site
        ]
        series.append((site, ((0.0, 0.0), *points) if points else ()))
    return Chart(
        "Epsilon spent, by round",
        "round",
        f"epsilon at delta {study.manifest.privacy.delta:g}",
        tuple(series[:9]),
    )


def _privacy_table(study: StudyCase) -> Table:
    privacy = study.manifest.privacy
    rows: list[tuple[Cell, ...]] = []
    for site in study.manifest.site_ids:
        stated = [(i, p.epsilon) for i, r in study.rounds for p in r.participations if p.site == site]
        if stated:
            rows.append(
                (
                    site,
                    "server and colluding sites",
                    f"{stated[-1][1]:.4f}",
                    f"{privacy.site_epsilon:g}",
                    str(len(stated)),
                    entry_link(stated[-1][0]),
                )
            )
    released = [(i, r.release_epsilon) for i, r in study.rounds if r.outcome is Outcome.RELEASED]
    if released:
        rows.append(
            (
                "release",
                "anyone with the model",
                f"{released[-1][1]:.4f}",
                f"{privacy.release_epsilon:g}",
                str(len(released)),
                entry_link(released[-1][0]),
            )
        )
    return Table(
        ("For", "Against", "Epsilon", "Budget", "Rounds", "Stated in"), (18, 30, 13, 13, 12, 14), tuple(rows)
    )


def _participation(study: StudyCase) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for site in study.manifest.site_ids:
        approvals = [(i, e) for i, e in study.bodies(Approval) if getattr(e.body, "site", "") == site]
        taken = [i for i, r in study.rounds if any(p.site == site and p.summed for p in r.participations)]
        missed = [i for i, r in study.rounds if site in r.dropouts]
        data = [
            e.body for _, e in study.bodies(DataUse) if isinstance(e.body, DataUse) and e.body.site == site
        ]
        rows.append(
            (
                site,
                _listed([entry_link(i) for i, _ in approvals]) or "no approval",
                f"{data[-1].patients} patients, {data[-1].studies} studies" if data else "not stated",
                str(len(taken)),
                str(len(missed)),
                _listed([entry_link(taken[0]), entry_link(taken[-1])]) if taken else "none",
            )
        )
    return Table(
        ("Site", "Approval", "Data (buckets)", "Rounds", "Missed", "First and last"),
        (18, 16, 26, 11, 11, 18),
        tuple(rows),
    )


def _timeline(case: Case) -> Iterator[Block]:
    """All entries but the bulk of the rounds, which are told by their first and last."""
    yield Heading("Timeline", 2, "timeline")
    rows: list[tuple[Cell, ...]] = []
    rounds: list[int] = []

    def told(indices: list[int]) -> None:
        for index in indices if len(indices) <= 6 else (indices[0], indices[-1]):
            entry = case.entries[index]
            rows.append((entry_link(index), _time(entry.time_s), entry.kind, _say(entry)))
        if len(indices) > 6:
            between = (entry_link(indices[1]), "to", entry_link(indices[-2]))
            rows.insert(len(rows) - 1, (between, "", "round", f"{len(indices) - 2} more rounds"))

    for index, entry in enumerate(case.entries):
        if isinstance(entry.body, RoundRecord):
            rounds.append(index)
            continue
        told(rounds)
        rounds = []
        told([index])
    told(rounds)
    yield Table(("Entry", "Time (UTC)", "Kind", "What it says"), (18, 22, 13, 47), tuple(rows))


def _regimes(report: AuditReport) -> Iterator[Block]:
    yield Heading("Map to regulations", 2, "regimes")
    yield Text(("Each line points at the controls that bear on it, or says what lies outside the software.",))
    found = {finding.control: finding for finding in report.findings}
    titles = {control["id"]: control["title"] for control in catalogue()["controls"]}
    for regime in catalogue()["regimes"]:
        yield Heading(regime["title"], 3)
        rows: list[tuple[Cell, ...]] = []
        for line in regime["lines"]:
            links = [Link(titles[c], _finding_anchor(found[c])) for c in line["controls"] if c in found]
            status = _line_status(report, line["controls"])
            mark: Cell = Mark(status, _TONES[Status(status)]) if status in set(Status) else status
            rows.append(
                (line["ref"], line["text"], mark, _listed(links) or "none", line["outside"] or "nothing")
            )
        yield Table(
            ("Reference", "Subject", "Outcome", "Controls", "Outside the software"),
            (16, 20, 13, 24, 27),
            tuple(rows),
        )


def _records(case: Case) -> Iterator[Block]:
    yield Heading("Records", 2, "records")
    shown = case.entries[:_MAX_RECORDS]
    if len(shown) < len(case.entries):
        yield Text((f"The first {len(shown)} of {len(case.entries)} entries; the rest is in the bundle.",))
    for index, entry in enumerate(shown):
        data = format_entry(entry)
        yield Record(
            f"entry-{index}",
            f"{index}  {_time(entry.time_s)}  {entry.kind}  {_say(entry)}  ({sha256_hex(data)[:16]})",
            json.dumps(json.loads(data), indent=1, ensure_ascii=False),
        )
    yield Heading("Checkpoints", 2, "checkpoints")
    rows = tuple(
        (str(h.checkpoint.size), h.checkpoint.root.hex(), ", ".join(s.name for s in h.note.signatures))
        for h in case.heads
    )
    anchors = tuple(f"checkpoint-{h.checkpoint.size}" for h in case.heads)
    yield Table(("Size", "Root", "Signed by"), (10, 55, 35), rows, anchors)


def _say(entry: Entry) -> str:
    """One line about an entry."""
    body = entry.body
    if isinstance(body, RoundRecord):
        return (
            f"round {body.number} attempt {body.attempt} {body.outcome.value}: "
            f"{len(body.participations)} sites, {len(body.dropouts)} missing, "
            f"release epsilon {body.release_epsilon:.4f}"
        )
    if isinstance(body, StudyOpened):
        return f"study {body.manifest.study.id} opened"
    if isinstance(body, Approval):
        return f"{body.site}: {body.decision.value}"
    if isinstance(body, Release):
        return (
            f"version {body.version}: adapter of round {body.number}, "
            f"release epsilon {body.release_epsilon:.4f}, site epsilon {body.site_epsilon:.4f}"
        )
    if isinstance(body, Evaluation):
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in sorted(body.metrics.items()))
        return f"{body.site} ({body.subgroup}, {body.studies} studies): {metrics}"
    if isinstance(body, AdapterDecision):
        return f"round {body.number}: {body.decision.value}"
    if isinstance(body, Incident):
        return f"{body.code}{f' at {body.site}' if body.site else ''}, round {body.number}"
    if isinstance(body, StudyEnd):
        return f"{body.reason.value} after round {body.number}, release epsilon {body.release_epsilon:.4f}"
    holder = getattr(body, "holder", getattr(body, "site", ""))
    return f"{entry.kind} {holder}".strip()


def _line_status(report: AuditReport, controls: list[str]) -> str:
    """The worst outcome of the controls that bear on a line; `outside` where none does."""
    found = {f.status for f in report.findings if f.control in controls}
    for status in (Status.FAIL, Status.NOT_CHECKABLE, Status.PASS):
        if status in found:
            return status.value
    return "outside"


def _evidence(item: str) -> str | Link:
    kind, _, rest = item.partition(" ")
    if kind == "entry" and rest.isdigit():
        return entry_link(int(rest))
    if item.startswith("checkpoints/"):
        return Link(f"checkpoint {int(item[12:24])}", f"checkpoint-{int(item[12:24])}")
    return item


def _listed(items: Sequence[str | Link]) -> tuple[str | Link, ...]:
    """The items with commas between them."""
    parts: list[str | Link] = []
    for number, item in enumerate(items):
        comma = "," if number < len(items) - 1 else ""
        parts.append(f"{item}{comma}" if isinstance(item, str) else Link(f"{item.text}{comma}", item.anchor))
    return tuple(parts)


def _finding_anchor(finding: Finding) -> str:
    return f"control-{finding.control}{'-' + finding.study[:12] if finding.study else ''}"


def _time(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
