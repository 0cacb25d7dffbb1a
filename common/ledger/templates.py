"""Inputs for an impact assessment and for technical documentation, filled with what the ledger knows.

What only people can add is named as such, never invented.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Mode
from common.ledger.audit import AuditReport
from common.ledger.case import StudyCase
from common.ledger.document import Block, Cell, Heading, Link, Table, entry_link
from common.ledger.entries import Evaluation, Release
from common.ledger.findings import Status

_BY_CONTROLLER = "to be added by the controller"


def template_blocks(report: AuditReport, study: StudyCase) -> Iterator[Block]:
    """Fill both templates for one study."""
    manifest = study.manifest
    yield Heading(f"Impact assessment inputs (GDPR Art. 35), study {manifest.study.id}", 2)
    yield Table(("Item", "Input", "Source"), (26, 56, 18), tuple(_impact_rows(study)))
    yield Heading(f"Technical documentation inputs (EU AI Act Annex IV), study {manifest.study.id}", 2)
    yield Table(("Item", "Input", "Source"), (26, 56, 18), tuple(_annex_rows(report, study)))


def _impact_rows(study: StudyCase) -> Iterator[tuple[Cell, ...]]:
    manifest, privacy = study.manifest, study.manifest.privacy
    where = entry_link(study.index)
    values = sum(tensor.size for tensor in manifest.adapter.tensors)
    masked = ", masked" if privacy.masking else ""
    yield "Purpose", manifest.study.purpose, where
    yield "Legal basis", _BY_CONTROLLER, ""
    yield "Controllers", f"sites {', '.join(manifest.site_ids)}", where
    nature = (
        f"training of an adapter of {values} values on base {manifest.base.name}, {manifest.rounds} rounds"
    )
    yield "Nature of processing", f"{nature}; images and reports stay at the sites", where
    yield "Data leaving a site", f"clipped, noised{masked} gradient sums; no image, report or count", where
    patients = f"nominal {manifest.training.patients} over all sites"
    yield "Patients", f"{patients}; each site's bucket under Who took part", where
    if privacy.mode is Mode.PLAIN:
        yield "Risk: inference", "not bounded: mode plain claims no privacy", where
    else:
        last = study.rounds[-1] if study.rounds else None
        spent = (
            f"release epsilon {last[1].release_epsilon:.3f} at delta {privacy.delta:g}"
            if last
            else "no round"
        )
        source: Cell = entry_link(last[0]) if last else ""
        yield "Risk: inference from the model", f"bounded, per patient at one site: {spent}", source
        budget = f"bounded by site epsilon {privacy.site_epsilon:g}"
        yield "Risk: curious operator", f"{budget}, with {privacy.colluders} colluding sites", where
    yield "Residual risk, consultation", _BY_CONTROLLER, ""


def _annex_rows(report: AuditReport, study: StudyCase) -> Iterator[tuple[Cell, ...]]:
    manifest = study.manifest
    where = entry_link(study.index)
    evaluations, releases = study.bodies(Evaluation), study.bodies(Release)
    versions = ", ".join(str(e.body.version) for _, e in releases if isinstance(e.body, Release))
    tested: Cell = entry_link(evaluations[-1][0]) if evaluations else ""
    published: Cell = entry_link(releases[-1][0]) if releases else ""
    drafts = "drafts the findings of chest radiographs for a radiologist to edit"
    yield "1 Description", f"{drafts}; versions: {versions or 'none released'}", published
    yield "1 Intended purpose, hardware, instructions", _BY_CONTROLLER, ""
    method = f"LoRA rank {manifest.adapter.rank}, {manifest.adapter.strategy.value}"
    yield "2 Methods and design", f"{method}; optimizer {manifest.optimizer.name.value}", where
    data = f"pairs of at most {manifest.training.max_tokens} tokens"
    yield "2 Data requirements", f"{data}; sites' buckets under Who took part", where
    yield "2 Testing", f"{len(evaluations)} evaluations on record", tested
    passed = f"{report.count(Status.PASS)} controls passed, {report.count(Status.FAIL)} failed in this audit"
    yield "2 Cybersecurity", passed, Link("Controls", "controls")
    yield "3 Monitoring and limits", _BY_CONTROLLER, ""
    changes = f"{len(study.rounds)} round records and {len(releases)} releases in the log"
    yield "6 Changes through the lifecycle", changes, Link("Timeline", "timeline")
    yield "9 Post-market monitoring", _BY_CONTROLLER, ""
