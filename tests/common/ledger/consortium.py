"""A synthetic consortium's ledger for tests: real keys, entries and signatures; no model, no patients."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from common.canonical import sha256_hex
from common.config import Mode, Study, format_study, study_from_mapping
from common.identity import Purpose, SigningKey
from common.ledger.bundle import Bundle, make_bundle
from common.ledger.checkpoint import (
    Checkpoint,
    LedgerProof,
    cosign,
    format_ledger_proof,
    log_key,
    parse_checkpoint,
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
    format_entry,
)
from common.ledger.merkle import Tree, hash_leaf
from common.ledger.note import Note, VerifierKey, format_note, merge_signatures
from common.ledger.output_checks import ADAPTER_NAME, ENTRY_NAME, PROOF_NAME, sum_modulo
from common.ledger.release_proof import STUDY_NAME
from common.ledger.statements import commit, make_round, sign_contribution, sign_entry
from common.privacy.mechanism import ServedRound, View
from common.privacy.study_plan import plan_of

ORIGIN = "fedrad.example/ledger"
START_S = 1_790_000_000
CODE, LOCKFILE = "c0" * 32, "10" * 32


def key_of(name: str) -> SigningKey:
    return SigningKey.from_seed(bytes.fromhex(sha256_hex(name.encode())))


def study(
    *, sites: Iterable[str] = ("amber", "birch", "cedar"), rounds: int = 3, quorum: int = 2, **privacy: Any
) -> Study:
    """A resolved manifest in mode consortium whose noise the tests choose."""
    sites = tuple(sites)
    terms = {"mode": "consortium", "clip_norm": 1.0, "site_noise": 2.0, "release_noise": 3.0,
             "site_epsilon": 16.0, "release_epsilon": 8.0, "delta": 1e-5, "dropouts": 1}  # fmt: skip
    return study_from_mapping(
        {
            "schema": 1,
            "study": {"id": "demo", "purpose": "Test of the ledger"},
            "base": {
                "name": "tiny",
                "files": [{"path": "model.safetensors", "bytes": 1, "sha256": "ba" * 32}],
            },
            "adapter": {
                "rank": 4, "alpha": 8, "targets": "q_proj", "initial_sha256": adapter_name(0),
                "tensors": [{"name": "projector.weight", "shape": [2, 2], "group": "projector"}],
            },
            "stage": [{"name": "align", "rounds": rounds, "learning_rate": 0.001}],
            "training": {"sampling_rate": 0.05, "patients": 300},
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
    origin: str = ORIGIN

    @property
    def log(self) -> VerifierKey:
        return log_key(self.origin, bytes.fromhex(key_of(OPERATOR).public))

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
        head = Checkpoint(self.origin, self.tree.size, self.tree.root())
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
    masked = retained(record, site)
    draft = Participation(
        site=site, commitment=commit(masked[0], masked[1]), sigma_units=share_units(manifest),
        epsilon=epsilon, summed=True, signature="0" * 128,
    )  # fmt: skip
    return sign_participation(manifest, record, draft)


def sign_participation(manifest: Study, record: RoundRecord, draft: Participation) -> Participation:
    signed = sign_contribution(
        manifest, key_of(draft.site), site=draft.site, number=record.number, attempt=record.attempt,
        adapter_in=record.adapter_in, commitment=draft.commitment, sigma_units=draft.sigma_units,
        epsilon=draft.epsilon,
    )  # fmt: skip
    return replace(signed, summed=draft.summed)


def retained(record: RoundRecord, site: str) -> tuple[bytes, bytes]:
    """A masked contribution of 16 values and the opening of its commitment, from the round's numbers."""
    seed = hashlib.sha256(f"{site} {record.number} {record.attempt}".encode()).digest()
    return hashlib.sha256(b"opening" + seed).digest(), seed * 2


def share_units(manifest: Study) -> float:
    return 0.0 if manifest.privacy.mode is Mode.PLAIN else plan_of(manifest).site_share_sigma_units


def round_record(
    manifest: Study, number: int, *, epsilon: float, release_epsilon: float, dropouts: tuple[str, ...] = (),
    attempt: int = 1, outcome: Outcome = Outcome.RELEASED,
) -> RoundRecord:  # fmt: skip
    released = outcome is Outcome.RELEASED
    sites = [s for s in manifest.site_ids if s not in dropouts]
    private = released and manifest.privacy.mode is not Mode.PLAIN
    bare = make_round(
        manifest, number=number, attempt=attempt, outcome=outcome, adapter_in=adapter_name(number),
        adapter_out=adapter_name(number + 1) if released else "", cohort=manifest.site_ids,
        server_sigma_units=plan_of(manifest).server_topup_sigma_units(len(sites)) if private else 0.0,
        release_epsilon=release_epsilon, code=CODE, lockfile=LOCKFILE,
    )  # fmt: skip
    aggregate = ""
    if released:
        aggregate = commit(aggregate_key(bare), sum_modulo([retained(bare, s)[1] for s in sites]))
    parts = tuple(participation(manifest, bare, s, epsilon) for s in sites)
    return replace(bare, participations=parts, dropouts=dropouts, aggregate=aggregate)


def aggregate_key(record: RoundRecord) -> bytes:
    return hashlib.sha256(f"aggregate {record.number} {record.attempt}".encode()).digest()


def open_study(ledger: Ledger) -> None:
    ledger.add(
        StudyOpened(manifest=ledger.manifest, code=CODE, lockfile=LOCKFILE, software="fedrad 0.1.0"), OPERATOR
    )
    for site in ledger.manifest.site_ids:
        signature = key_of(site).sign(Purpose.APPROVAL, format_study(ledger.manifest)).hex()
        ledger.add(Approval(site=site, decision=Decision.APPROVE, policy="", signature=signature))
    ledger.checkpoint()


@functools.cache
def epsilons(manifest: Study, rounds: int) -> list[tuple[float, float]]:
    """Site and release epsilon after each round, all sites present; exact where the audit looks."""
    plan = plan_of(manifest)
    served = ServedRound(plan.sites, plan.server_topup_sigma_units(plan.sites))
    step = max(1, rounds // 4)
    exact = sorted({*range(step, rounds + 1, step), rounds, 1})
    known = {0: (0.0, 0.0)} | {
        n: (plan.epsilon(View.SITE, [served] * n), plan.epsilon(View.RELEASE, [served] * n)) for n in exact
    }
    values = []
    for number in range(1, rounds + 1):
        low = max(n for n in known if n < number)
        high = min(n for n in known if n >= number)
        part = (number - low) / (high - low)
        a, b = known[low], known[high]
        values.append((a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])))
    return values


def adapter_file(number: int) -> bytes:
    """A safetensors file with the manifest's one tensor (2 x 2 float32)."""
    header = json.dumps(
        {"projector.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + struct.pack("<4f", number, 1.0, 2.0, 3.0)


def adapter_name(number: int) -> str:
    return hashlib.sha256(struct.pack("<4f", number, 1.0, 2.0, 3.0)).hexdigest()


def release_files(number: int, manifest: Study) -> dict[str, bytes]:
    return {
        ADAPTER_NAME: adapter_file(number + 1),
        "model-card.md": b"# Model card\n",
        STUDY_NAME: format_study(manifest),
    }


def add_release(
    ledger: Ledger, number: int, *, version: int = 1, site: float, epsilon: float
) -> tuple[int, dict[str, bytes]]:
    """Log, checkpoint and prove a release of the adapter of round `number`; returns index and files."""
    files = release_files(number, ledger.manifest)
    listed = [ReleasedFile(path=p, bytes=len(d), sha256=sha256_hex(d)) for p, d in sorted(files.items())]
    body = Release(
        version=version, adapter=adapter_name(number + 1), number=number, base="tiny", site_epsilon=site,
        release_epsilon=epsilon, delta=ledger.manifest.privacy.delta, files=tuple(listed),
    )  # fmt: skip
    index = ledger.add(body, OPERATOR)
    note = ledger.checkpoint()
    proof = LedgerProof(index, ledger.tree.prove_inclusion(index), note)
    files[ENTRY_NAME] = ledger.leaves[index]
    files[PROOF_NAME] = format_ledger_proof(proof)
    return index, files


def run_study(ledger: Ledger, rounds: int, *, checkpoints: bool = True) -> list[tuple[float, float]]:
    """Open the study and append `rounds` records, one checkpoint each; returns the epsilons."""
    open_study(ledger)
    values = epsilons(ledger.manifest, rounds)
    for number, (site, release) in enumerate(values):
        ledger.add(round_record(ledger.manifest, number, epsilon=site, release_epsilon=release))
        if checkpoints:
            ledger.checkpoint()
    return values


def finish(ledger: Ledger, rounds: int, values: list[tuple[float, float]]) -> dict[str, bytes]:
    """Release the last adapter and end the study; returns the release's members."""
    site, release = values[-1]
    _, files = add_release(ledger, rounds - 1, site=site, epsilon=release)
    ledger.add(
        StudyEnd(
            reason=EndReason.COMPLETED,
            number=rounds - 1,
            adapter=adapter_name(rounds),
            release_epsilon=release,
        ),
        OPERATOR,
    )
    ledger.checkpoint()
    return {f"releases/1/{path}": data for path, data in files.items()}


def bundle_of(ledger: Ledger, members: dict[str, bytes] | None = None) -> Bundle:
    found = {"entries.jsonl": b"".join(leaf + b"\n" for leaf in ledger.leaves)}
    for note in ledger.notes:
        found[f"checkpoints/{parse_checkpoint(note.text).size:012d}.note"] = format_note(note)
    return make_bundle(
        log=ledger.log,
        exported_s=ledger.time_s,
        software="fedrad 0.1.0",
        members={**found, **(members or {})},
    )


def finished_bundle(rounds: int = 3, **terms: Any) -> Bundle:
    """The bundle of a study that ran, was released and ended, with nothing wrong."""
    ledger = Ledger(study(rounds=rounds, **terms))
    values = run_study(ledger, rounds)
    return bundle_of(ledger, finish(ledger, rounds, values))
