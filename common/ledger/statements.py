"""Signing and making entries: who signed, what a site states about its contribution, a round's record.

Guarantees: a signature binds kind, study and body; a site's statement binds the round, the adapter it started
from, its commitment, and the clipping, sampling and noise it applied, so that an operator cannot rewrite any
of them later. Whether a signer was allowed to sign is the audit's business.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import replace

from common.canonical import canonical_json, parse_canonical
from common.config import Study
from common.errors import EntryInvalid, SignatureInvalid
from common.identity import Purpose, SigningKey, verify_signature
from common.ledger.entries import (
    BUCKETS,
    Entry,
    EntrySignature,
    Outcome,
    Participation,
    RoundRecord,
    signed_bytes,
)
from common.ledger.fields import build, plain

_MAX_STATEMENT_BYTES = 4096
UNSIGNED = "0" * 128


def sign_entry(entry: Entry, *, signer: str, key: SigningKey) -> Entry:
    """Return the entry with one more signature."""
    value = key.sign(Purpose.ENTRY, signed_bytes(entry)).hex()
    return replace(entry, signatures=(*entry.signatures, EntrySignature(signer, key.public, value)))


def add_signatures(entry: Entry, signatures: Iterable[EntrySignature]) -> Entry:
    """Return the entry with signatures that others made over the same kind, study and body."""
    return replace(entry, signatures=(*entry.signatures, *signatures))


def verify_entry_signature(entry: Entry, signature: EntrySignature) -> None:
    """Raise SignatureInvalid unless the key named in the signature signed this entry."""
    verify_signature(signature.key, Purpose.ENTRY, signed_bytes(entry), bytes.fromhex(signature.value))


def verify_signed_by(entry: Entry, *, signer: str, public_hex: str) -> None:
    """Raise SignatureInvalid unless `signer` signed the entry with exactly this key."""
    for signature in entry.signatures:
        if signature.signer == signer and signature.key == public_hex:
            verify_entry_signature(entry, signature)
            return
    raise SignatureInvalid(
        f"{entry.kind}: expected a signature of {signer} by key {public_hex[:16]}…, got none"
    )


def make_round(
    study: Study,
    *,
    number: int,
    attempt: int,
    outcome: Outcome,
    adapter_in: str,
    cohort: Iterable[str],
    adapter_out: str = "",
    state_out: str = "",
    participations: Iterable[Participation] = (),
    server_sigma_units: float = 0.0,
    release_epsilon: float = 0.0,
    aggregate: str = "",
    record: str = "",
    code: str,
    lockfile: str,
) -> RoundRecord:
    """Write down one attempt at one round; the terms come from the manifest, the dropouts from the rest."""
    parts = tuple(sorted(participations, key=lambda part: part.site))
    asked = tuple(sorted(cohort))
    return RoundRecord(
        number=number,
        attempt=attempt,
        outcome=outcome,
        adapter_in=adapter_in,
        adapter_out=adapter_out,
        state_out=state_out,
        cohort=asked,
        participations=parts,
        dropouts=tuple(site for site in asked if site not in {part.site for part in parts}),
        clip_norm=study.privacy.clip_norm,
        sampling_rate=study.training.sampling_rate,
        patients=study.training.patients,
        server_sigma_units=server_sigma_units,
        delta=study.privacy.delta,
        release_epsilon=release_epsilon,
        aggregate=aggregate,
        record=record,
        code=code,
        lockfile=lockfile,
    )


def sign_contribution(
    study: Study,
    key: SigningKey,
    *,
    site: str,
    number: int,
    attempt: int,
    adapter_in: str,
    commitment: str,
    sigma_units: float,
    epsilon: float,
) -> Participation:
    """State and sign one site's contribution; `summed` is False until the server has added it.

    sigma_units: the width of the noise that was added; epsilon: what the site has spent, this round charged.
    """
    part = Participation(
        site=site, commitment=commitment, sigma_units=sigma_units, epsilon=epsilon, summed=False,
        signature=UNSIGNED,
    )  # fmt: skip
    message = _statement(
        study.sha256, part, number=number, attempt=attempt, adapter_in=adapter_in,
        clip_norm=study.privacy.clip_norm, sampling_rate=study.training.sampling_rate,
        patients=study.training.patients,
    )  # fmt: skip
    return replace(part, signature=key.sign(Purpose.CONTRIBUTION, message).hex())


def verify_contribution(study: str, record: RoundRecord, participation: Participation, public: str) -> None:
    """Raise SignatureInvalid unless the site signed exactly these values."""
    message = _statement(
        study, participation, number=record.number, attempt=record.attempt, adapter_in=record.adapter_in,
        clip_norm=record.clip_norm, sampling_rate=record.sampling_rate, patients=record.patients,
    )  # fmt: skip
    verify_signature(public, Purpose.CONTRIBUTION, message, bytes.fromhex(participation.signature))


def format_participation(participation: Participation) -> bytes:
    return canonical_json(plain(participation))


def parse_participation(data: bytes) -> Participation:
    """Parse a site's statement; raises EntryInvalid, NotCanonical or BodyTooLarge. Nothing is verified."""
    value = parse_canonical(data, max_bytes=_MAX_STATEMENT_BYTES)
    participation: Participation = build(Participation, value, "participation")
    return participation


def commit(opening: bytes, data: bytes | memoryview) -> str:
    """Return the keyed commitment HMAC-SHA256(opening, data) in hex; `opening` is 32 random bytes."""
    if len(opening) != 32:
        raise EntryInvalid(f"expected an opening of 32 bytes, got {len(opening)}")
    return hmac.new(opening, data, hashlib.sha256).hexdigest()


def bucket(count: int) -> str:
    """Return the bucket of a count: what may be published instead of the count."""
    if count < 0:
        raise EntryInvalid("expected a count of at least 0")
    if count < 10:
        return BUCKETS[0]
    lows = [int(name.rstrip("+").split("-")[0]) for name in BUCKETS[1:]]
    return BUCKETS[sum(count >= low for low in lows)]


def _statement(
    study: str,
    part: Participation,
    *,
    number: int,
    attempt: int,
    adapter_in: str,
    clip_norm: float,
    sampling_rate: float,
    patients: int,
) -> bytes:
    return canonical_json(
        {
            "adapter_in": adapter_in,
            "attempt": attempt,
            "clip_norm": clip_norm,
            "commitment": part.commitment,
            "epsilon": part.epsilon,
            "number": number,
            "patients": patients,
            "sampling_rate": sampling_rate,
            "sigma_units": part.sigma_units,
            "site": part.site,
            "study": study,
        }
    )
