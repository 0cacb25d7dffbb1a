"""A release's way through the ledger: logged by the operator, witnessed by the sites, proven to anyone.

Each step can be repeated: `make_release` writes the folder, `log_release` appends the entry, a run of the
study's ServerApp gathers cosignatures, `prove_release` writes the offline proof beside the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Mode
from common.errors import ReleaseInvalid
from common.files import write_atomic
from common.identity import load_key
from common.ledger.checkpoint import parse_checkpoint
from common.ledger.entries import Body, DataUse, Evaluation, Release, RoundRecord
from common.ledger.output_checks import ENTRY_NAME, PROOF_NAME
from common.ledger.release_proof import list_files
from common.model.lora import read_adapter, vector_sha256
from common.model.release import open_release, write_release
from server.model_card import Facts, model_card
from server.study_log import open_study_log

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
    with open_study_log(directory, clock=clock) as (opened, log):
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
    with open_study_log(directory, clock=clock) as (_, log):
        log.witnessed()
        leaf = log.release_leaf(version)
        write_atomic(folder / ENTRY_NAME, leaf)
        write_atomic(folder / PROOF_NAME, log.proof(leaf))


def make_release(
    directory: Path, folder: Path, *, evaluation: Mapping[str, Any] | None = None, clock: Clock = time.time
) -> str:
    """Write the newest adapter of a finished study as a signed release folder; returns the adapter's hash.

    evaluation: `metrics` and, where there, `by_group` for the card. Raises ReleaseInvalid before the end.
    """
    with open_study_log(directory, clock=clock) as (opened, log):
        study = opened.study
        initial = read_adapter(directory / "initial", study.adapter.tensors)
        state = opened.load_state(initial)
        if state.round + 1 < study.rounds:
            raise ReleaseInvalid(
                f"{directory}: expected {study.rounds} rounds, got {state.round + 1}; run it to its end"
            )
        bodies, adapter = log.bodies(), vector_sha256(state.adapter)
        made = [b.number for b in bodies if isinstance(b, RoundRecord) and b.adapter_out == adapter]
        if not made:
            raise ReleaseInvalid(
                f"{directory}: expected the adapter of a round, got the first one: nothing passed"
            )
        given = evaluation or {}
        facts = Facts(
            adapter_sha256=adapter, rounds=study.rounds,
            site_epsilon=_site_epsilon(bodies), release_epsilon=log.release_epsilon, data=_data(bodies),
            evaluations=[b for b in bodies if isinstance(b, Evaluation) and b.adapter == adapter],
            metrics=given.get("metrics", {}), by_group=given.get("by_group", {}),
        )  # fmt: skip
        write_release(
            folder, study, state.adapter, load_key(opened.key_path), round=made[-1],
            release_epsilon=log.release_epsilon, card=model_card(study, facts),
        )  # fmt: skip
        return adapter


def stated_data(directory: Path, *, clock: Clock = time.time) -> list[DataUse]:
    """Return what each site stated about its data last."""
    with open_study_log(directory, clock=clock) as (_, log):
        return _data(log.bodies())


def logged_evaluations(directory: Path, *, clock: Clock = time.time) -> list[Evaluation]:
    """Return the federated evaluations in a study's log."""
    with open_study_log(directory, clock=clock) as (_, log):
        return [body for body in log.bodies() if isinstance(body, Evaluation)]


def stated_site_epsilon(directory: Path, *, clock: Clock = time.time) -> float:
    """Return the largest ε that a site stated in the study's log; 0 where none did."""
    with open_study_log(directory, clock=clock) as (_, log):
        return _site_epsilon(log.bodies())


def ledger_head(directory: Path, *, clock: Clock = time.time) -> LedgerHead:
    """Describe the latest checkpoint of a study's log."""
    with open_study_log(directory, clock=clock) as (_, log):
        note = log.head()
        checkpoint = parse_checkpoint(note.text)
        return LedgerHead(checkpoint.size, checkpoint.root.hex(), len(note.signatures) - 1)


def _site_epsilon(bodies: Iterable[Body]) -> float:
    rounds = [body for body in bodies if isinstance(body, RoundRecord)]
    return max((part.epsilon for body in rounds for part in body.participations), default=0.0)


def _data(bodies: Iterable[Body]) -> list[DataUse]:
    newest = {body.site: body for body in bodies if isinstance(body, DataUse)}
    return [newest[site] for site in sorted(newest)]
