"""What makes a release folder runnable at a site: its ledger entry, the offline proof, and exactly its files.

Guarantees: `verify_release_folder` returns only for a folder whose files are, name by name and byte by byte,
those of a release entry that is in the consortium's log under a quorum of witnesses. It says nothing about
how good the model is, nor whether a newer release exists (TUF's part).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.config import Mode, Study, parse_study
from common.errors import FedRadError, LedgerInvalid, ReleaseUnproven
from common.ledger.checkpoint import (
    Checkpoint,
    log_key,
    parse_checkpoint,
    parse_ledger_proof,
    verify_ledger_proof,
    witness_key,
)
from common.ledger.entries import OPERATOR, Entry, Release, ReleasedFile, ReleaseRollback, parse_entry
from common.ledger.note import VerifierKey, format_verifier_key, parse_verifier_key
from common.ledger.output_checks import ADAPTER_NAME, ENTRY_NAME, PROOF_NAME, adapter_sha256
from common.ledger.statements import verify_signed_by

STUDY_NAME = "study.json"
MAX_PROOF_FILE_BYTES = 6 << 20


@dataclass(frozen=True)
class LedgerTrust:
    """Whose log a site believes: the log's key, its witnesses, and how many of them must have cosigned."""

    log: VerifierKey
    witnesses: tuple[VerifierKey, ...]
    quorum: int


def origin_of(study: Study) -> str:
    """Name the log of a study that keeps a log of its own, in its study directory."""
    return f"fedrad/{study.sha256}"


def trust_of(study: Study, *, origin: str = "") -> LedgerTrust:
    """Return the trust that a signed study fixes for the log named `origin` (default: the study's own)."""
    keys = [s for s in study.cohort.site if s.witness_key]
    witnesses = tuple(witness_key(s.id, bytes.fromhex(s.witness_key)) for s in keys)
    return LedgerTrust(
        log_key(origin or origin_of(study), bytes.fromhex(study.cohort.operator_key)),
        witnesses,
        study.cohort.witness_quorum,
    )


def format_trust(trust: LedgerTrust) -> bytes:
    witnesses = [format_verifier_key(key) for key in trust.witnesses]
    return canonical_json(
        {"log": format_verifier_key(trust.log), "quorum": trust.quorum, "witnesses": witnesses}
    )


def parse_trust(data: bytes) -> LedgerTrust:
    """Parse a trust file; raises LedgerInvalid, NotCanonical or NoteInvalid."""
    value = parse_canonical(data, max_bytes=1 << 20)
    if not isinstance(value, dict) or value.keys() != {"log", "quorum", "witnesses"}:
        raise LedgerInvalid("ledger trust: expected log, quorum and witnesses")
    if type(value["quorum"]) is not int or not isinstance(value["witnesses"], list) or value["quorum"] < 0:
        raise LedgerInvalid("ledger trust: expected a whole quorum and a list of witnesses")
    witnesses = tuple(parse_verifier_key(str(text)) for text in value["witnesses"])
    return LedgerTrust(parse_verifier_key(str(value["log"])), witnesses, value["quorum"])


def list_files(folder: Path) -> tuple[ReleasedFile, ...]:
    """Describe a release folder's files for its ledger entry; proof files are not part of it."""
    paths = [p for p in sorted(folder.iterdir()) if p.name not in (ENTRY_NAME, PROOF_NAME)]
    if any(not p.is_file() or p.is_symlink() for p in paths):
        raise ReleaseUnproven(f"{folder}: expected plain files only")
    return tuple(
        ReleasedFile(path=p.name, bytes=p.stat().st_size, sha256=sha256_hex(p.read_bytes())) for p in paths
    )


def verify_statement(leaf: bytes, proof: bytes, trusts: Sequence[LedgerTrust]) -> tuple[Entry, Checkpoint]:
    """Verify that an entry is in a witnessed log that is believed, and signed by its operator; returns both.

    Raises ReleaseUnproven.
    """
    try:
        parsed = parse_ledger_proof(proof)
        origin = parse_checkpoint(parsed.note.text).origin
        trust = next((trust for trust in trusts if trust.log.name == origin), None)
        if trust is None:
            raise ReleaseUnproven(f"expected a log that this site believes, got {origin!r}")
        checkpoint = verify_ledger_proof(
            leaf, parsed, log=trust.log, witnesses=trust.witnesses, quorum=trust.quorum
        )
        entry = parse_entry(leaf)
        verify_signed_by(entry, signer=OPERATOR, public_hex=trust.log.public.hex())
    except FedRadError as error:
        raise ReleaseUnproven(f"ledger proof: {error}") from error
    return entry, checkpoint


def verify_release_folder(
    folder: Path,
    trusts: Sequence[LedgerTrust],
    *,
    version: int | None = None,
    allow_unprotected: bool = False,
) -> tuple[Release, Checkpoint]:
    """Verify a release folder against the ledger; returns the release and the checkpoint that proves it.

    Raises ReleaseUnproven naming the first thing that is missing, extra, swapped or without privacy.
    """
    files = {path.name: path for path in folder.iterdir()}
    for name in (ENTRY_NAME, PROOF_NAME, STUDY_NAME, ADAPTER_NAME):
        if name not in files:
            raise ReleaseUnproven(f"{folder.name}: expected {name}, got none")
    if any(files[n].stat().st_size > MAX_PROOF_FILE_BYTES for n in (ENTRY_NAME, PROOF_NAME, STUDY_NAME)):
        raise ReleaseUnproven(f"{folder.name}: expected proof files of at most {MAX_PROOF_FILE_BYTES} bytes")
    entry, checkpoint = verify_statement(
        files[ENTRY_NAME].read_bytes(), files[PROOF_NAME].read_bytes(), trusts
    )
    release = entry.body
    if not isinstance(release, Release):
        raise ReleaseUnproven(f"{folder.name}: expected the entry of a release, got {entry.kind}")
    if version is not None and release.version != version:
        raise ReleaseUnproven(f"{folder.name}: expected version {version}, got {release.version}")
    _verify_files(folder, release, files)
    study = parse_study(files[STUDY_NAME].read_bytes())
    if study.sha256 != entry.study:
        raise ReleaseUnproven(f"{folder.name}: expected the study of the entry, got another")
    if adapter_sha256(files[ADAPTER_NAME].read_bytes(), study) != release.adapter:
        raise ReleaseUnproven(f"{folder.name}: expected adapter {release.adapter[:16]}…, got another")
    if (study.privacy.mode is Mode.PLAIN or study.testing is not None) and not allow_unprotected:
        raise ReleaseUnproven(
            f"{folder.name}: trained without privacy; use it only where no patient's data went in"
        )
    return release, checkpoint


def verify_rollback(
    leaf: bytes, proof: bytes, trusts: Sequence[LedgerTrust], *, frm: int, to: int
) -> ReleaseRollback:
    """Verify the operator's logged permission to go from version `frm` back to `to`."""
    entry, _ = verify_statement(leaf, proof, trusts)
    body = entry.body
    if not isinstance(body, ReleaseRollback) or (body.frm, body.to) != (frm, to):
        raise ReleaseUnproven(f"expected a permission to roll back from {frm} to {to}, got another statement")
    return body


def _verify_files(folder: Path, release: Release, files: Mapping[str, Path]) -> None:
    listed = {file.path: file for file in release.files}
    found = files.keys() - {ENTRY_NAME, PROOF_NAME}
    for name in sorted(found - listed.keys()):
        raise ReleaseUnproven(f"{folder.name}: extra file {name}")
    for name in sorted(listed.keys() - found):
        raise ReleaseUnproven(f"{folder.name}: expected {name}, got none")
    for name, file in sorted(listed.items()):
        path = files[name]
        if (
            path.is_symlink()
            or path.stat().st_size != file.bytes
            or sha256_hex(path.read_bytes()) != file.sha256
        ):
            raise ReleaseUnproven(f"{folder.name}: {name} is not the file that is in the ledger")
