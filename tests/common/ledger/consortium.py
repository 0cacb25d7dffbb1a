"""A synthetic consortium's ledger for tests: real keys, entries and signatures; no model, no patients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from common.canonical import sha256_hex
from common.config import Study, study_from_mapping
from common.identity import Purpose, SigningKey
from common.ledger.checkpoint import (
    Checkpoint,
    cosign,
    log_key,
    sign_checkpoint,
    witness_key,
)
from common.ledger.entries import (
    OPERATOR,
    Approval,
    Body,
    Decision,
    EndReason,
    Entry,
    Outcome,
    Participation,
    Release,
    ReleasedFile,
    RoundRecord,
    StudyEnd,
    StudyOpened,
    contribution_statement,
    format_entry,
    sign_entry,
)
from common.ledger.merkle import Tree, hash_leaf
from common.ledger.note import Note, VerifierKey, merge_signatures

ORIGIN = "fedrad.example/ledger"
START_S = 1_790_000_000
CODE, LOCKFILE = "c0" * 32, "10" * 32


def key_of(name: str) -> SigningKey:
    return SigningKey.from_seed(bytes.fromhex(sha256_hex(name.encode())))


def adapter(number: int) -> str:
    return sha256_hex(f"adapter {number}".encode())


def study(
    *, sites: Iterable[str] = ("amber", "birch", "cedar"), rounds: int = 3, quorum: int = 2, **privacy: Any
) -> Study:
    """A resolved manifest in mode consortium whose sigmas the tests choose."""
    sites = tuple(sites)
    terms = {"mode": "consortium", "clip_norm": 1.0, "site_sigma": 2.0, "server_sigma": 0.0,
             "site_epsilon": 900.0, "release_epsilon": 800.0, "delta": 1e-5, "dropouts": 1}  # fmt: skip
    return study_from_mapping(
        {
            "schema": 1,
            "study": {"id": "demo", "purpose": "Test of the ledger"},
            "base": {
                "name": "tiny",
                "files": [{"path": "model.safetensors", "bytes": 1, "sha256": "ba" * 32}],
            },
            "adapter": {
                "rank": 4, "alpha": 8, "targets": "q_proj",
                "tensors": [{"name": "projector.weight", "shape": [2, 2], "group": "projector"}],
            },
            "stage": [{"name": "align", "rounds": rounds, "learning_rate": 0.001}],
            "training": {"sampling_rate": 0.05, "expected_patients": 100},
            "privacy": {**terms, **privacy},
            "cohort": {
                "min_sites": max(1, len(sites) - 1), "witness_quorum": quorum,
                "operator_key": key_of(OPERATOR).public,
                "site": [
                    {"id": s, "message_key": key_of(s).public, "witness_key": key_of(f"{s} witness").public}
                    for s in sites
                ],
            },
        }
    )  # fmt: skip


@dataclass
class Ledger:
    """A log in memory that appends, checkpoints and lets every site cosign."""

    manifest: Study
    time_s: int = START_S
    leaves: list[bytes] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    tree: Tree = field(default_factory=Tree)

    @property
    def log(self) -> VerifierKey:
        return log_key(ORIGIN, bytes.fromhex(key_of(OPERATOR).public))

    @property
    def witnesses(self) -> list[VerifierKey]:
        return [witness_key(s.id, bytes.fromhex(s.witness_key)) for s in self.manifest.cohort.site]

    def entry(self, body: Body, *signers: str) -> Entry:
        entry = Entry(self.time_s, self.manifest.sha256, body)
        for signer in signers:
            entry = sign_entry(entry, signer=signer, key=key_of(signer))
        return entry

    def add(self, body: Body, *signers: str) -> int:
        return self.add_leaf(format_entry(self.entry(body, *signers)))

    def add_leaf(self, leaf: bytes) -> int:
        self.leaves.append(leaf)
        self.tree.extend([hash_leaf(leaf)])
        return len(self.leaves) - 1

    def checkpoint(self, cosigners: Iterable[str] | None = None) -> Note:
        head = Checkpoint(ORIGIN, self.tree.size, self.tree.root())
        note = sign_checkpoint(head, private_key=key_of(OPERATOR).private)
        names = self.manifest.site_ids if cosigners is None else cosigners
        note = merge_signatures(
            note,
            [
                cosign(note, name=n, private_key=key_of(f"{n} witness").private, time_s=self.time_s)
                for n in names
            ],
        )
        self.notes.append(note)
        self.time_s += 60
        return note


def participation(manifest: Study, record: RoundRecord, site: str, epsilon: float) -> Participation:
    draft = Participation(
        site=site, commitment=sha256_hex(f"{site} {record.number} {record.attempt}".encode()),
        site_sigma=manifest.privacy.site_sigma, epsilon=epsilon, summed=True, signature="0" * 128,
    )  # fmt: skip
    message = contribution_statement(manifest.sha256, record, draft)
    return replace(draft, signature=key_of(site).sign(Purpose.CONTRIBUTION, message).hex())


def round_record(
    manifest: Study, number: int, *, epsilon: float, release_epsilon: float, dropouts: tuple[str, ...] = (),
    attempt: int = 0, outcome: Outcome = Outcome.RELEASED,
) -> RoundRecord:  # fmt: skip
    record = RoundRecord(
        number=number, attempt=attempt, outcome=outcome, adapter_in=adapter(number),
        adapter_out=adapter(number + 1) if outcome is Outcome.RELEASED else "", state_out="",
        cohort=manifest.site_ids, participations=(), dropouts=dropouts,
        clip_norm=manifest.privacy.clip_norm, sampling_rate=manifest.training.sampling_rate,
        expected_patients=manifest.training.expected_patients, server_sigma=manifest.privacy.server_sigma,
        delta=manifest.privacy.delta, release_epsilon=release_epsilon, aggregate="", code=CODE,
        lockfile=LOCKFILE,
    )  # fmt: skip
    sites = [s for s in manifest.site_ids if s not in dropouts]
    return replace(record, participations=tuple(participation(manifest, record, s, epsilon) for s in sites))


def open_study(ledger: Ledger) -> None:
    ledger.add(
        StudyOpened(manifest=ledger.manifest, code=CODE, lockfile=LOCKFILE, software="fedrad 0.1.0"), OPERATOR
    )
    for site in ledger.manifest.site_ids:
        ledger.add(Approval(site=site, decision=Decision.APPROVE, policy=""), site)
    ledger.checkpoint()


def release(
    ledger: Ledger, number: int, files: tuple[ReleasedFile, ...], *, epsilon: float, site: float
) -> Release:
    return Release(
        version=1, adapter=adapter(number + 1), number=number, base="tiny", site_epsilon=site,
        release_epsilon=epsilon, delta=ledger.manifest.privacy.delta, files=files,
    )  # fmt: skip


def end(ledger: Ledger, number: int, epsilon: float) -> None:
    ledger.add(
        StudyEnd(
            reason=EndReason.COMPLETED, number=number, adapter=adapter(number + 1), release_epsilon=epsilon
        ),
        OPERATOR,
    )
