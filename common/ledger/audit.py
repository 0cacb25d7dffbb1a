"""Verify an audit bundle: every control, offline, from the bundle's bytes and the auditor's own log key.

Guarantees: no network, no clock, nothing written; a bundle that does not parse fails as a whole; a control
that the bundle gives no means to check is reported so. It trusts the log key that it is given, and says
clearly where it was given none. What it cannot know: whether a hospital's data were what it said, and
whether sites that did not witness saw another log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.canonical import sha256_hex
from common.errors import FedRadError
from common.ledger import log_checks, output_checks, study_checks
from common.ledger.bundle import Bundle, pack, read_bundle
from common.ledger.case import Case, read_case
from common.ledger.evaluation_checks import check_evaluation
from common.ledger.findings import Finding, Problem, Status, conclude
from common.ledger.note import VerifierKey
from common.ledger.privacy_checks import check_privacy


@dataclass(frozen=True)
class AuditReport:
    """The findings on one bundle, in the order of the catalogue; `case` is None when it did not parse."""

    bundle_sha256: str
    findings: tuple[Finding, ...]
    case: Case | None

    @property
    def passed(self) -> bool:
        return all(finding.status is not Status.FAIL for finding in self.findings)

    def count(self, status: Status) -> int:
        return sum(finding.status is status for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle_sha256": self.bundle_sha256,
            "result": "pass" if self.passed else "fail",
            "passed": self.count(Status.PASS),
            "failed": self.count(Status.FAIL),
            "not_checkable": self.count(Status.NOT_CHECKABLE),
            "findings": [finding.to_json() for finding in self.findings],
        }


def verify_file(
    path: Path, *, trusted: VerifierKey | None = None, progress: Callable[[str], None] = lambda what: None
) -> AuditReport:
    """Read and verify a bundle file; a file that cannot be parsed is a report with one failed control."""
    try:
        bundle = read_bundle(path)
    except FedRadError as error:
        digest = sha256_hex(path.read_bytes()) if path.is_file() else ""
        return AuditReport(digest, (conclude("bundle", [Problem(str(error), path.name)], passed=""),), None)
    return verify_bundle(bundle, trusted=trusted, progress=progress)


def verify_bundle(
    bundle: Bundle, *, trusted: VerifierKey | None = None, progress: Callable[[str], None] = lambda what: None
) -> AuditReport:
    """Verify every control of a parsed bundle; `trusted` is the log key from another source."""
    digest = sha256_hex(pack(bundle))
    try:
        case = read_case(bundle)
    except FedRadError as error:
        return AuditReport(digest, (conclude("bundle", [Problem(str(error))], passed=""),), None)
    findings = [
        conclude(
            "bundle", [], passed=f"{len(bundle.members)} members in their one encoding, every entry parsed"
        ),
        log_checks.check_trust(case, trusted),
    ]
    progress("log")
    cosignatures, forged = log_checks.read_cosignatures(case)
    findings += [log_checks.check_history(case), log_checks.check_time(case, cosignatures)]
    for check in (
        log_checks.check_signatures,
        log_checks.check_enrolment,
        log_checks.check_studies_are_open,
        output_checks.check_release_members,
    ):
        findings.append(check(case))
    for study in case.studies.values():
        progress(f"study {study.manifest.study.id}")
        findings += [
            log_checks.check_witnesses(case, study, cosignatures, forged),
            log_checks.check_approvals(case, study),
            study_checks.check_rounds(study),
            study_checks.check_contributions(case, study),
            study_checks.check_mechanism(study),
            *check_privacy(study),
            check_evaluation(case, study),
            study_checks.check_code(study),
            output_checks.check_releases(case, study),
            output_checks.check_records(case, study),
            output_checks.check_retained(case, study),
            study_checks.check_end(study),
        ]
    return AuditReport(digest, tuple(findings), case)
