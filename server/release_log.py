"""A release's way through the ledger: logged by the operator, witnessed by the sites, proven to anyone.

Three steps with a file each, so that they can be repeated: `log_release` appends the entry, a run of the
study's ServerApp gathers cosignatures, `prove_release` writes the offline proof beside the files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import Mode
from common.errors import ReleaseInvalid
from common.files import write_atomic
from common.identity import load_key
from common.ledger.checkpoint import parse_checkpoint
from common.ledger.entries import Release
from common.ledger.output_checks import ENTRY_NAME, PROOF_NAME
from common.ledger.release_proof import list_files, origin_of
from common.model.release import open_release
from server.bundles import LEDGER_NAME
from server.checkpoint import StudyDirectory
from server.log import Log
from server.study_log import StudyLog

Clock = Callable[[], float]


@dataclass(frozen=True)
class LedgerHead:
    """Size, root (hex) and number of witnesses of a study's log."""

    size: int
    root: str
    witnesses: int


def log_release(directory: Path, folder: Path, *, site_epsilon: float, clock: Clock = time.time) -> int:
    """Append the release in `folder` to its study's log, once; returns its version.

    Raises ReleaseInvalid for a release of another study; the operator's signature is checked.
    """
    with _study_log(directory, clock) as (opened, log):
        study = opened.study
        unprotected = study.privacy.mode is Mode.PLAIN or study.testing is not None
        release = open_release(folder, operator_key=study.cohort.operator_key, allow_unprotected=unprotected)
        if release.note.study != study.sha256:
            raise ReleaseInvalid(f"{folder}: expected a release of study {study.sha256[:16]}…, got another")
        version = log.version_of(release.note.adapter_sha256)
        log.add_release(
            Release(
                version=version, adapter=release.note.adapter_sha256, number=release.note.round,
                base=study.base.name, site_epsilon=site_epsilon,
                release_epsilon=release.note.release_epsilon, delta=study.privacy.delta,
                files=list_files(folder),
            )
        )  # fmt: skip
        return version


def prove_release(directory: Path, folder: Path, *, version: int, clock: Clock = time.time) -> None:
    """Write a release's ledger entry and offline proof; raises QuorumNotReached before it is witnessed."""
    with _study_log(directory, clock) as (_, log):
        log.witnessed()
        leaf = log.release_leaf(version)
        write_atomic(folder / ENTRY_NAME, leaf)
        write_atomic(folder / PROOF_NAME, log.proof(leaf))


def ledger_head(directory: Path, *, clock: Clock = time.time) -> LedgerHead:
    """Describe the latest checkpoint of a study's log."""
    with _study_log(directory, clock) as (_, log):
        note = log.head()
        checkpoint = parse_checkpoint(note.text)
        return LedgerHead(checkpoint.size, checkpoint.root.hex(), len(note.signatures) - 1)


@contextlib.contextmanager
def _study_log(directory: Path, clock: Clock) -> Iterator[tuple[StudyDirectory, StudyLog]]:
    with contextlib.closing(StudyDirectory(directory)) as opened:
        study, key = opened.study, load_key(opened.key_path)
        with Log(directory / LEDGER_NAME, origin=origin_of(study), private_key=key.private) as book:
            yield opened, StudyLog(book, study, key, clock=clock)
