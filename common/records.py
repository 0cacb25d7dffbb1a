"""The round record: what happened in one round, chained to the record before it.

Guarantees: `previous` of each record is the SHA-256 of the one before (the study's hash for the first), so a
site that knows one record can verify every later one; a record is canonical JSON and signed by the server.
It names sites, hashes and public constants only: no count, loss or metric of a site.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.errors import EnvelopeMalformed, PreviousStateMismatch, WrongRound, WrongStudy
from common.identity import Purpose, SigningKey, verify_signature

MAX_RECORD_BYTES = 64 << 10
_HEX128 = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class RoundRecord:
    """One served round; hashes are SHA-256 hex, `missing` maps a site to the reason it is not in the sum."""

    study: str
    round: int
    attempt: int
    previous: str
    adapter_in: str
    adapter_out: str
    cohort: tuple[str, ...]
    contributors: tuple[str, ...]
    missing: dict[str, str]
    contributions: dict[str, str]
    groups: tuple[str, ...]
    learning_rate: float
    sampling_rate: float
    patients: int
    mode: str
    clip_norm: float
    site_share_sigma_units: float
    server_sigma_units: float
    time_unix_s: int
    rolled_back_to: str = ""

    @property
    def next_adapter(self) -> str:
        """The adapter that the next round starts from."""
        return self.rolled_back_to or self.adapter_out

    @property
    def sha256(self) -> str:
        return sha256_hex(format_record(self))


@dataclass(frozen=True)
class SignedRecord:
    """A record with the server's signature over its canonical bytes (128 hex digits)."""

    record: RoundRecord
    signature: str


def format_record(record: RoundRecord) -> bytes:
    return canonical_json(_plain(record))


def parse_record(data: bytes) -> RoundRecord:
    """Parse canonical bytes; raises EnvelopeMalformed on an unknown, missing or mistyped field."""
    return _record(parse_canonical(data, max_bytes=MAX_RECORD_BYTES))


def sign_record(key: SigningKey, record: RoundRecord) -> SignedRecord:
    return SignedRecord(record, key.sign(Purpose.ROUND_RECORD, format_record(record)).hex())


def signed_to_json(signed: SignedRecord) -> dict[str, Any]:
    return {"record": _plain(signed.record), "signature": signed.signature}


def signed_from_json(value: Any) -> SignedRecord:
    """Parse `{"record", "signature"}`; raises EnvelopeMalformed."""
    if not isinstance(value, dict) or set(value) != {"record", "signature"}:
        raise EnvelopeMalformed("round record: expected the fields record and signature")
    if not isinstance(value["signature"], str) or not _HEX128.fullmatch(value["signature"]):
        raise EnvelopeMalformed("round record signature: expected 128 hex digits")
    return SignedRecord(_record(value["record"]), value["signature"])


def verify_chain(
    records: Sequence[SignedRecord], *, study: str, after_round: int, previous: str, operator_key: str
) -> None:
    """Raise unless `records` are the signed records of the rounds after `after_round`, each on the last.

    `previous` is the hash of the record of `after_round` (the study's hash for -1).
    """
    for offset, signed in enumerate(records):
        record = signed.record
        if record.study != study:
            raise WrongStudy(f"round record: expected study {study[:16]}…, got {record.study[:16]}…")
        if record.round != after_round + 1 + offset:
            raise WrongRound(f"round record: expected round {after_round + 1 + offset}, got {record.round}")
        if record.previous != previous:
            raise PreviousStateMismatch(
                f"record of round {record.round}: expected it to build on {previous[:16]}…, "
                f"got {record.previous[:16]}…: the server shows another history than before"
            )
        verify_signature(
            operator_key, Purpose.ROUND_RECORD, format_record(record), bytes.fromhex(signed.signature)
        )
        previous = record.sha256


def _plain(record: RoundRecord) -> dict[str, Any]:
    value = {name: item for name, item in asdict(record).items() if name != "rolled_back_to" or item}
    for name in ("cohort", "contributors", "groups"):
        value[name] = list(value[name])
    return value


def _record(value: Any) -> RoundRecord:
    kinds: dict[str, type] = {
        "study": str, "round": int, "attempt": int, "previous": str, "adapter_in": str, "adapter_out": str,
        "cohort": list, "contributors": list, "missing": dict, "contributions": dict, "groups": list,
        "learning_rate": float, "sampling_rate": float, "patients": int, "mode": str, "clip_norm": float,
        "site_share_sigma_units": float, "server_sigma_units": float, "time_unix_s": int,
    }  # fmt: skip
    if isinstance(value, dict) and "rolled_back_to" in value:
        kinds["rolled_back_to"] = str
    if not isinstance(value, dict) or set(value) != set(kinds) or value.get("rolled_back_to") == "":
        raise EnvelopeMalformed(f"round record: expected the fields {sorted(kinds)}")
    parsed = dict(value)
    for name, kind in kinds.items():
        if kind is float and type(parsed[name]) is int:
            parsed[name] = float(parsed[name])
        if type(parsed[name]) is not kind:
            raise EnvelopeMalformed(f"round record {name}: expected {kind.__name__}")
        if kind is list:
            parsed[name] = tuple(parsed[name])
    for name in ("cohort", "contributors", "groups"):
        if not all(isinstance(item, str) for item in parsed[name]):
            raise EnvelopeMalformed(f"round record {name}: expected a list of names")
    for name in ("missing", "contributions"):
        if not all(isinstance(item, str) for item in parsed[name].values()):
            raise EnvelopeMalformed(f"round record {name}: expected text by site")
    return RoundRecord(**parsed)
