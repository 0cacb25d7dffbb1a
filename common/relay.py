"""One envelope in Flower records: `fedrad` alone, or the frame in `fedrad` and the body in `fedrad.1` …

Flower moves a record as one object and keeps equal ones once. At 20 MB and eight sites, parts of 4 MiB took
40 % less time and half of the SuperLink's memory (`tests/benchmarks/rounds.py`); with the frame in a record
of its own, and parts cut from a body's end, where the adapter is, what all sites get is pushed and kept once.
An envelope that fits in one part is one record.

Flower's store keeps the first tree that anybody names for an object's id. So nobody may know an id before its
object is there: a frame holds a fresh signature, and parts that sites have had before carry a salt.

Guarantees: `join_envelope(split_envelope(stage, envelope)) == (stage, envelope)`; records that no split makes
are refused; joining takes the parts out of the records, so that memory holds the envelope and one part. It
signs and checks nothing inside the envelope: `common.protocol` does.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from common.errors import BodyTooLarge, RelayInvalid
from common.protocol import Bytes, Envelope, cut_envelope

RECORD = "fedrad"
PART_BYTES = 4 * 1024 * 1024
MAX_ENVELOPE_BYTES = 2 * 1024**3

_FIELDS = {"stage", "envelope"}
_SALTED = _FIELDS | {"salt"}


def split_envelope(
    stage: str, envelope: Envelope, parts: Sequence[bytes] | None = None, *, salt: str = ""
) -> dict[str, dict[str, str | bytes]]:
    """Return record name to fields; `parts` of the body where the caller has cut it. Raises BodyTooLarge.

    salt: makes the parts other objects than the same bytes were before; equal parts with it are one object.
    """
    _check_size(len(envelope))
    if len(envelope) <= PART_BYTES:
        pieces = [bytes(envelope)]
    else:
        pieces = [envelope.frame, *(body_parts(envelope.body) if parts is None else parts)]
    salted: dict[str, str | bytes] = {"salt": salt} if salt else {}
    return {
        _name(number): {"stage": stage, "envelope": piece, **(salted if number else {})}
        for number, piece in enumerate(pieces)
    }


def body_parts(body: Bytes, like: Sequence[bytes] = ()) -> list[bytes]:
    """Cut a body from its end into the parts that travel; parts equal to those of `like` are its objects."""
    view, ends = memoryview(body), range(len(body), 0, -PART_BYTES)
    parts = [bytes(view[max(0, end - PART_BYTES) : end]) for end in ends]
    for number, (part, before) in enumerate(zip(parts, reversed(like), strict=False)):
        if part == before:
            parts[number] = before
    return parts[::-1]


def join_envelope(records: MutableMapping[str, Any]) -> tuple[str, Envelope]:
    """Return stage and envelope and empty the records.

    Raises BodyTooLarge, and RelayInvalid or EnvelopeMalformed for records that no split makes.
    """
    names = [_name(number) for number in range(len(records))]
    if not names or set(names) != set(records):
        raise RelayInvalid(f"expected the records {names or [RECORD]}, got {sorted(records)[:8]}")
    stages, sizes = set(), []
    for name in names:
        record = records[name]
        if set(record) != _FIELDS and (name == RECORD or set(record) != _SALTED):
            raise RelayInvalid(
                f"expected fields {sorted(_FIELDS)} in record {name}, got {sorted(record)[:8]}"
            )
        stage, part = record["stage"], record["envelope"]
        if (
            not isinstance(stage, str)
            or not isinstance(part, bytes)
            or type(record.get("salt", "")) is not str
        ):
            raise RelayInvalid(f"expected text and bytes in record {name}")
        stages.add(stage)
        sizes.append(len(part))
    if len(stages) != 1:
        raise RelayInvalid(f"expected one stage in all records, got {sorted(stages)[:8]}")
    if any(size != PART_BYTES for size in sizes[2:]) or (len(sizes) > 1 and not 0 < sizes[1] <= PART_BYTES):
        raise RelayInvalid(f"expected full parts of {PART_BYTES} bytes after the first of the body")
    _check_size(sum(sizes))
    frame = records.pop(RECORD)["envelope"]
    if len(names) == 1:
        return stages.pop(), cut_envelope(frame)
    if cut_envelope(frame).body:
        raise RelayInvalid("expected a frame alone in the first of several records, got more bytes")
    if len(names) == 2:
        return stages.pop(), Envelope(frame, records.pop(names[1])["envelope"])
    body = bytearray()
    for name in names[1:]:
        body += records.pop(name)["envelope"]
    return stages.pop(), Envelope(frame, body)


def _name(number: int) -> str:
    return f"{RECORD}.{number}" if number else RECORD


def _check_size(size: int) -> None:
    if size > MAX_ENVELOPE_BYTES:
        raise BodyTooLarge(f"expected an envelope of at most {MAX_ENVELOPE_BYTES} bytes, got {size}")
