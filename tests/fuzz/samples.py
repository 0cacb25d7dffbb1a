"""Valid values of records and of the ledger, as first inputs of the fuzzers."""

from __future__ import annotations

from dataclasses import dataclass

from common.ledger.bundle import pack
from common.ledger.checkpoint import cosign, parse_checkpoint
from common.ledger.note import format_note, format_signature_line, format_verifier_key
from common.ledger.witness import CosignRequest, format_cosign_request
from common.records import RoundRecord
from tests.common.ledger.consortium import Ledger, add_release, bundle_of, key_of, run_study, study


@dataclass(frozen=True)
class LedgerSamples:
    """One small log, in every form in which a site or an auditor meets it."""

    leaves: list[bytes]
    notes: list[bytes]
    texts: list[bytes]
    requests: list[bytes]
    proofs: list[bytes]
    lines: list[bytes]
    keys: list[bytes]
    bundle: bytes


def ledger_samples() -> LedgerSamples:
    ledger = Ledger(study(rounds=2))
    site, release = run_study(ledger, 2)[-1]
    _, files = add_release(ledger, 1, site=site, epsilon=release)
    last = ledger.notes[-1]
    size = parse_checkpoint(last.text).size
    line = cosign(last, name="amber", private_key=key_of("amber witness").private, time_s=1)
    request = CosignRequest(size - 1, tuple(ledger.tree.prove_consistency(size - 1, size)), last)
    return LedgerSamples(
        leaves=list(ledger.leaves),
        notes=[format_note(note) for note in ledger.notes],
        texts=[note.text.encode() for note in ledger.notes],
        requests=[format_cosign_request(request)],
        proofs=[data for name, data in files.items() if b"tlog-proof" in data],
        lines=[format_signature_line(line)],
        keys=[format_verifier_key(ledger.log).encode()],
        bundle=pack(bundle_of(ledger)),
    )


def round_record() -> RoundRecord:
    return RoundRecord(
        study="ab" * 32, round=1, attempt=1, previous="cd" * 32, adapter_in="01" * 32, adapter_out="02" * 32,
        cohort=("alpha", "beta"), contributors=("alpha",), missing={"beta": "not connected"},
        contributions={"alpha": "03" * 32}, groups=("projector",), learning_rate=0.001, sampling_rate=0.05,
        patients=40, mode="consortium", clip_norm=1.0, site_share_sigma_units=2.5, server_sigma_units=0.0,
        time_unix_s=1_800_000_000,
    )  # fmt: skip
