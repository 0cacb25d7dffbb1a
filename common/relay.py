"""One envelope in Flower records: the first part in record `fedrad`, further ones in `fedrad.1`, `fedrad.2` …

Flower moves a record as one object. At 20 MB and eight sites, parts of 4 MiB took 40 % less time and half of
the SuperLink's memory (`tests/benchmarks/rounds.py`). An envelope that fits in one part is one record.

Guarantees: `join_envelope(split_envelope(stage, envelope)) == (stage, envelope)`; records that no split makes
are refused; joining takes the parts out of the records, so that memory holds the envelope and one part. It
signs and checks nothing inside the envelope: `common.protocol` does.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from common.errors import BodyTooLarge, RelayInvalid

RECORD = "fedrad"
PART_BYTES = 4 * 1024 * 1024
MAX_ENVELOPE_BYTES = 2 * 1024**3

_FIELDS = {"stage", "envelope"}


def split_envelope(stage: str, envelope: bytes | bytearray) -> dict[str, dict[str, str | bytes]]:
    """Return record name to fields; raises BodyTooLarge over 2 GiB."""
    _check_size(len(envelope))
    view = memoryview(envelope)
    starts = range(0, max(1, len(envelope)), PART_BYTES)
    return {
        _name(number): {"stage": stage, "envelope": bytes(view[start : start + PART_BYTES])}
        for number, start in enumerate(starts)
    }


def join_envelope(records: MutableMapping[str, Any]) -> tuple[str, bytearray]:
    """Return stage and envelope and empty the records.

    Raises BodyTooLarge, and RelayInvalid for records that `split_envelope` does not make.
    """
    names = [_name(number) for number in range(len(records))]
    if not names or set(names) != set(records):
        raise RelayInvalid(f"expected the records {names or [RECORD]}, got {sorted(records)[:8]}")
    stages, sizes = set(), []
    for name in names:
        record = records[name]
        if set(record) != _FIELDS:
            raise RelayInvalid(
                f"expected fields {sorted(_FIELDS)} in record {name}, got {sorted(record)[:8]}"
            )
        stage, part = record["stage"], record["envelope"]
        if not isinstance(stage, str) or not isinstance(part, bytes):
            raise RelayInvalid(f"expected text and bytes in record {name}")
        stages.add(stage)
        sizes.append(len(part))
    if len(stages) != 1:
        raise RelayInvalid(f"expected one stage in all records, got {sorted(stages)[:8]}")
    if any(size != PART_BYTES for size in sizes[:-1]) or (len(sizes) > 1 and not sizes[-1]):
        raise RelayInvalid(f"expected full parts of {PART_BYTES} bytes before the last")
    _check_size(sum(sizes))
    envelope = bytearray()
    for name in names:
        envelope += records.pop(name)["envelope"]
    return stages.pop(), envelope


def _name(number: int) -> str:
    return f"{RECORD}.{number}" if number else RECORD


def _check_size(size: int) -> None:
    if size > MAX_ENVELOPE_BYTES:
        raise BodyTooLarge(f"expected an envelope of at most {MAX_ENVELOPE_BYTES} bytes, got {size}")
