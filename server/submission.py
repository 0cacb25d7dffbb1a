"""Studies in the operator's directory: submitted with enrolled keys, offered to sites, approved by each.

Guarantees: a study is signed only over keys that the registry holds; an approval is kept only when the site's
pinned key made it over exactly this manifest; `verify_ready` passes before a study's first start only when
every site of the manifest has approved and takes part with the keys that the manifest pins. A study that has
begun goes on with those that still do, down to its floor: the withdrawal or revocation of one site takes out
that site alone.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

from common.config import Study, format_study, parse_study_toml
from common.errors import (
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


def offered_studies(home: ServerHome, site: str) -> list[tuple[bytes, bytes]]:
    """Return manifest and operator's signature of every study that names the site."""
    return [
        (
            (one.directory / "study.json").read_bytes(),
            bytes.fromhex((one.directory / "operator.sig").read_text().strip()),
        )
        for one in submitted_studies(home)
        if site in one.study.site_ids
    ]


def record_approval(home: ServerHome, name: str, site: str, signature: bytes) -> Submitted:
    """Keep a site's approval; raises StudyUnknown, ManifestInvalid or SignatureInvalid."""
    submitted = find_submitted(home, name)
    study = submitted.study
    if site not in study.site_ids:
        raise ManifestInvalid(f"study {study.study.id}: expected one of its sites, got {site!r}")
    verify_signature(study.site(site).message_key, Purpose.APPROVAL, format_study(study), signature)
    write_atomic(_approval_path(submitted.directory, site), signature.hex().encode())
    missing = missing_approvals(home, submitted.directory, study)
    return Submitted(submitted.directory, study, missing)


def withdraw_approval(home: ServerHome, name: str, site: str) -> None:
    """Forget a site's approval: the study does not start again without a new one."""
    with contextlib.suppress(FileNotFoundError):
        _approval_path(find_submitted(home, name).directory, site).unlink()


def missing_approvals(home: ServerHome, directory: Path, study: Study) -> dict[str, str]:
    """Say for each site of the manifest why it does not take part; empty when all do."""
    missing = {}
    for section in study.cohort.site:
        try:
            enrolled = approved_site(home, section.id)
            if enrolled.message_key != section.message_key:
                missing[section.id] = "has new keys: the study pins its old ones"
                continue
            signature = bytes.fromhex(_approval_path(directory, section.id).read_text().strip())
            verify_signature(section.message_key, Purpose.APPROVAL, format_study(study), signature)
        except SiteRevoked:
            missing[section.id] = "revoked"
        except SiteNotEnrolled:
            missing[section.id] = "not enrolled"
        except (OSError, ValueError, SignatureInvalid):
            missing[section.id] = "has not approved"
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


def _approval_path(directory: Path, site: str) -> Path:
    return directory / "approvals" / f"{site}.sig"
