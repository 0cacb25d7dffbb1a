"""Studies in the operator's directory: submitted with enrolled keys, offered to sites, approved by each.

Guarantees: a study is signed only over keys that the registry holds; an approval is kept only when the site's
pinned key made it over exactly this manifest; `verify_ready` passes before a study's first start only when
every site of the manifest has approved and takes part with the keys that the manifest pins. A study that has
begun goes on with those that still do, down to its floor: the withdrawal or revocation of one site takes out
that site alone.

Which of two decisions counts. What is held here of a site's decision may be older than the site's own (a
request lost, a server restored) or come again (a request replayed, a site restored from a copy). The truth is
in the site's directory, where its agent reads it at every message; its link compares it with what is held
here at every exchange and sends it where the two differ (deploy/site/link.py). A decision carries the time at
which the site made it. A withdrawal is always taken; an approval only where no withdrawal of that time or a
later one is held. So a replayed approval undoes no withdrawal that is held. One that a restore has lost is
undone until the site's next exchange at most, and its agent refuses meanwhile. A replayed withdrawal is
undone at the next exchange, too: the approval after it is later. A site restored from a copy of before its
withdrawal does not come back by that: its approval is refused until somebody there approves again. Where
server and site are both restored from copies of before a withdrawal, nobody knows of it: the site must decide
again.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.config import Study, format_study, parse_study_toml
from common.errors import (
    ApprovalOutdated,
    FedRadError,
    ManifestInvalid,
    SignatureInvalid,
    SiteNotEnrolled,
    SiteRevoked,
    StudyNotReady,
    StudyUnknown,
)
from common.files import write_atomic
from common.identity import Purpose, save_key, verify_signature
from server.checkpoint import read_signed_study
from server.consortium import ServerHome
from server.enrolment import approved_site
from server.studies import SiteKeys, resolve_study, write_study

EVENTS_NAME = "log.jsonl"  # its first line is the ServerApp's first act (server/checkpoint.py)


@dataclass(frozen=True)
class Submitted:
    """A study in the operator's directory; `missing` says per site why it does not take part."""

    directory: Path
    study: Study
    missing: dict[str, str]

    @property
    def begun(self) -> bool:
        """Tell whether its ServerApp was started once, when every site had approved."""
        return (self.directory / EVENTS_NAME).is_file()


def submit_study(
    home: ServerHome, text: str, *, source: str, base: Path, public: Path | None = None
) -> Submitted:
    """Pin the enrolled keys of a manifest's sites, sign it and place it in `studies/`.

    public: the operator's public set, for a manifest with an acceptance test. Raises PublicSetInvalid,
    SiteNotEnrolled, SiteRevoked, ManifestInvalid, BaseInvalid, RunDirectoryBusy for a taken id.
    """
    draft = parse_study_toml(text, source=source)
    keys = {}
    for site in draft.site_ids:
        enrolled = approved_site(home, site)
        keys[site] = SiteKeys(enrolled.message_key, enrolled.witness_key)
    operator = home.message_key()
    study = resolve_study(draft, base=base, operator_key=operator.public, site_keys=keys, public=public)
    directory = home.studies / study.study.id
    home.studies.mkdir(exist_ok=True, mode=0o700)
    write_study(directory, study, operator, base=base, public=public)
    own = directory / "keys" / "message.key"
    if not own.exists():
        own.parent.mkdir(mode=0o700, exist_ok=True)
        save_key(operator, own)
    return Submitted(directory, study, missing_approvals(home, directory, study))


def submitted_studies(home: ServerHome) -> list[Submitted]:
    """Read every study of the operator's directory, by id; `broken_studies` names those that cannot be."""
    found = []
    for path in _folders(home):
        with contextlib.suppress(FedRadError):
            study = _read_own(home, path)
            found.append(Submitted(path, study, missing_approvals(home, path, study)))
    return found


def broken_studies(home: ServerHome) -> dict[str, str]:
    """Name the folders in `studies/` that hold no study signed by an operator, with the reason."""
    broken = {}
    for path in _folders(home):
        try:
            _read_own(home, path)
        except FedRadError as error:
            broken[path.name] = f"{error.code}: {error}"
    return broken


def find_submitted(home: ServerHome, name: str) -> Submitted:
    """Find a study by id or the start of its hash; raises StudyUnknown."""
    found = [
        one
        for one in submitted_studies(home)
        if one.study.study.id == name or (len(name) >= 8 and one.study.sha256.startswith(name))
    ]
    if len(found) != 1:
        raise StudyUnknown(f"expected one submitted study named {name!r}, got {len(found)}")
    return found[0]


@dataclass(frozen=True)
class Offered:
    """A study as a site gets it: manifest, operator's signature, whether the site's approval is held."""

    manifest: bytes
    signature: bytes
    approved: bool


def offered_studies(home: ServerHome, site: str) -> list[Offered]:
    """Return every study that names the site."""
    return [
        Offered(
            (one.directory / "study.json").read_bytes(),
            bytes.fromhex((one.directory / "operator.sig").read_text().strip()),
            _is_approved(one.directory, one.study, site),
        )
        for one in submitted_studies(home)
        if site in one.study.site_ids
    ]


def record_approval(home: ServerHome, name: str, site: str, signature: bytes, *, decided_s: int) -> Submitted:
    """Keep a site's approval, decided at this Unix time.

    Raises StudyUnknown, ManifestInvalid, SignatureInvalid or, where the withdrawal held is not older,
    ApprovalOutdated.
    """
    submitted = find_submitted(home, name)
    study, directory = submitted.study, submitted.directory
    if site not in study.site_ids:
        raise ManifestInvalid(f"study {study.study.id}: expected one of its sites, got {site!r}")
    verify_signature(study.site(site).message_key, Purpose.APPROVAL, format_study(study), signature)
    withdrawn_s = _withdrawn_s(directory, site)
    if withdrawn_s is not None and decided_s <= withdrawn_s:
        raise ApprovalOutdated(
            f"study {study.study.id}: expected an approval from after {site}'s withdrawal of "
            f"{_words(withdrawn_s)}, got one from {_words(decided_s)}; if {site} takes part, approve it again"
        )
    path = _approval_path(directory, site)
    write_atomic(path, signature.hex().encode())
    write_atomic(_time_path(directory, site), str(decided_s).encode())
    missing = missing_approvals(home, directory, study)
    return Submitted(directory, study, missing)


def withdraw_approval(home: ServerHome, name: str, site: str, *, decided_s: int) -> Submitted:
    """Forget a site's approval, and note when it was withdrawn; raises StudyUnknown or ManifestInvalid."""
    submitted = find_submitted(home, name)
    study, directory = submitted.study, submitted.directory
    if site not in study.site_ids:
        raise ManifestInvalid(f"study {study.study.id}: expected one of its sites, got {site!r}")
    decided_s = max(decided_s, _withdrawn_s(directory, site) or 0)
    write_atomic(_time_path(directory, site), str(decided_s).encode())  # first: killed here, it is sent again
    _approval_path(directory, site).unlink(missing_ok=True)
    return Submitted(directory, study, missing_approvals(home, directory, study))


def missing_approvals(home: ServerHome, directory: Path, study: Study) -> dict[str, str]:
    """Say for each site of the manifest why it does not take part; empty when all do."""
    missing = {}
    for section in study.cohort.site:
        try:
            enrolled = approved_site(home, section.id)
            if enrolled.message_key != section.message_key:
                missing[section.id] = "has new keys: the study pins its old ones"
                continue
        except SiteRevoked:
            missing[section.id] = "revoked"
        except SiteNotEnrolled:
            missing[section.id] = "not enrolled"
        else:
            if not _is_approved(directory, study, section.id):
                withdrew = _withdrawn_s(directory, section.id) is not None
                missing[section.id] = "withdrew its approval" if withdrew else "has not approved"
    return missing


def verify_ready(submitted: Submitted) -> None:
    """Raise StudyNotReady unless every site takes part or, once the study has begun, cohort.min_sites do."""
    if not submitted.missing:
        return
    study = submitted.study
    reasons = "; ".join(f"{site} {reason}" for site, reason in sorted(submitted.missing.items()))
    if not submitted.begun:
        raise StudyNotReady(f"study {study.study.id}: expected the approval of every site, got: {reasons}")
    left = len(study.site_ids) - len(submitted.missing)
    if left < study.cohort.min_sites:
        raise StudyNotReady(
            f"study {study.study.id}: to go on, expected at least {study.cohort.min_sites} of its sites "
            f"(cohort.min_sites), got {left}: {reasons}"
        )


def _read_own(home: ServerHome, path: Path) -> Study:
    study = _read_once(path, (path / "study.json").stat().st_mtime_ns, (path / "study.json").stat().st_ino)
    operator = home.message_key().public
    if study.cohort.operator_key != operator:
        raise StudyNotReady(
            f"{path}: expected a study signed by this operator {operator[:16]}…, got one by "
            f"{study.cohort.operator_key[:16]}…"
        )
    return study


@functools.lru_cache(maxsize=64)
def _read_once(path: Path, _mtime_ns: int, _inode: int) -> Study:
    """Read a study once per file; its signature is verified again by whoever runs it."""
    return read_signed_study(path)


def _folders(home: ServerHome) -> list[Path]:
    if not home.studies.is_dir():
        return []
    return [path for path in sorted(home.studies.iterdir()) if (path / "study.json").is_file()]


def _is_approved(directory: Path, study: Study, site: str) -> bool:
    """Tell whether an approval is held that the site's pinned key made."""
    try:
        signature = bytes.fromhex(_approval_path(directory, site).read_text().strip())
        verify_signature(study.site(site).message_key, Purpose.APPROVAL, format_study(study), signature)
    except (OSError, ValueError, SignatureInvalid):
        return False
    return True


def _withdrawn_s(directory: Path, site: str) -> int | None:
    """Return when the site withdrew its approval; None where it did not."""
    if _approval_path(directory, site).exists():
        return None
    try:
        return int(_time_path(directory, site).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _words(unix_s: int) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC" if unix_s else "an unknown time"


def _approval_path(directory: Path, site: str) -> Path:
    return directory / "approvals" / f"{site}.sig"


def _time_path(directory: Path, site: str) -> Path:
    return directory / "approvals" / f"{site}.decided"
