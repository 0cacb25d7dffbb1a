"""Signed messages between server and site: framing, signing, and the checks on arrival.

A message is `FRM1 | u32 header length | header | 64-byte Ed25519 signature | body`, the header being
canonical JSON that names version, study, round, attempt, stage, kind, sender, recipient, nonce, the
message it answers, the previous-state hash, and the body's length and SHA-256 (docs/PROTOCOL.md). All but
the body is its frame; the frame's SHA-256 stands for the message, since the header holds the body's.
Guarantees: what `open_message` returns was signed by the pinned key of its sender for exactly this
place in this study; anything else ends in one named error. It does not encrypt (TLS does) and does not
remember nonces: the agent's durable state does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.errors import (
    BodyHashMismatch,
    BodyTooLarge,
    EnvelopeMalformed,
    FedRadError,
    MessageReplayed,
    NotCanonical,
    PreviousStateMismatch,
    UnknownSender,
    VersionsTooFarApart,
    WrongRecipient,
    WrongRound,
    WrongStage,
    WrongStudy,
)
from common.identity import Purpose, SigningKey, verify_signature

MAGIC = b"FRM1"
VERSION = 1
OLDEST = 1
SPOKEN = range(OLDEST, VERSION + 1)
HELLO_VERSION = 1  # of every release: a hello stays as it is, for it agrees on the version
MAX_HEADER_BYTES = 4096
MAX_OVERHEAD_BYTES = 8 + MAX_HEADER_BYTES + 64
MAX_META_BYTES = 8 << 20
SERVER = "server"
GENESIS = "0" * 64
Bytes = bytes | bytearray | memoryview
_HEX64 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


class Stage(StrEnum):
    """The exchanges of a study, in their order."""

    HELLO = "hello"
    KEYS = "keys"
    SHARES = "shares"
    CONTRIBUTE = "contribute"
    UNMASK = "unmask"
    WITNESS = "witness"


class Kind(StrEnum):
    REQUEST = "request"
    REPLY = "reply"
    REFUSAL = "refusal"


@dataclass(frozen=True)
class Header:
    """What the signature covers; the body is covered by its hash. Nonces are 32 hex digits."""

    version: int
    study: str
    round: int
    attempt: int
    stage: Stage
    kind: Kind
    sender: str
    recipient: str
    nonce: str
    answers: str
    previous: str
    body_bytes: int
    body_sha256: str


@dataclass(frozen=True)
class Envelope:
    """A message as it travels, in two pieces, so that nothing copies the body to frame it."""

    frame: bytes
    body: Bytes

    def __len__(self) -> int:
        return len(self.frame) + len(self.body)

    def __bytes__(self) -> bytes:
        return b"".join((self.frame, self.body))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the frame, by which an answer names the message."""
        return sha256_hex(self.frame)


@dataclass(frozen=True)
class Message:
    """A verified message and the SHA-256 of its frame; the body is a view of what came, not a copy."""

    header: Header
    body: memoryview
    sha256: str


@dataclass(frozen=True)
class Expected:
    """What the receiver is ready for; None means that any value is acceptable there."""

    study: str
    recipient: str
    sender: str | None = None
    stage: Stage | None = None
    round: int | None = None
    attempt: int | None = None
    previous: str | None = None
    answers: str | None = None


def seal(key: SigningKey, header: Header, body: Bytes) -> Envelope:
    """Frame and sign a message; no receiver opens one whose header describes another body."""
    encoded = format_header(header)
    frame = (MAGIC, len(encoded).to_bytes(4, "big"), encoded, key.sign(Purpose.ENVELOPE, encoded))
    return Envelope(b"".join(frame), body)


def seal_request(
    key: SigningKey,
    *,
    study: str,
    round: int,
    attempt: int,
    stage: Stage,
    sender: str,
    recipient: str,
    nonce: str,
    previous: str,
    body: bytes,
    version: int = VERSION,
) -> Envelope:
    """Sign a request of the server to one site."""
    header = Header(
        version, study, round, attempt, stage, Kind.REQUEST, sender, recipient, nonce, "", previous,
        len(body), sha256_hex(body),
    )  # fmt: skip
    return seal(key, header, body)


def seal_reply(
    key: SigningKey, request: Message, *, nonce: str, body: bytes, refusal: bool = False
) -> Envelope:
    """Sign the answer to a request: same version and place in the study, sender and recipient exchanged."""
    asked = request.header
    header = Header(
        asked.version, asked.study, asked.round, asked.attempt, asked.stage,
        Kind.REFUSAL if refusal else Kind.REPLY, asked.recipient, asked.sender, nonce, request.sha256,
        asked.previous, len(body), sha256_hex(body),
    )  # fmt: skip
    return seal(key, header, body)


def cut_envelope(data: Bytes) -> Envelope:
    """Cut a message's bytes into frame and body, trusting neither; raises EnvelopeMalformed."""
    if len(data) < 8 or data[:4] != MAGIC:
        raise EnvelopeMalformed("expected a message that starts with FRM1, got other bytes")
    length = int.from_bytes(data[4:8], "big")
    if length > MAX_HEADER_BYTES or len(data) < 8 + length + 64:
        raise EnvelopeMalformed(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got length {length}")
    view = memoryview(data).toreadonly()
    return Envelope(bytes(view[: 72 + length]), view[72 + length :])


def read_header(data: Bytes | Envelope, *, max_body_bytes: int, spoken: range = SPOKEN) -> Header:
    """Parse the frame and header of a message without trusting it; nothing is verified yet."""
    return _split(data, max_body_bytes=max_body_bytes, spoken=spoken)[0]


def open_message(
    data: Bytes | Envelope,
    *,
    keys: Mapping[str, str],
    expected: Expected,
    max_body_bytes: int,
    spoken: range = SPOKEN,
) -> Message:
    """Verify a message against pinned keys (`{sender: public hex}`) and the receiver's expectations.

    spoken: the protocol versions that the receiver speaks.
    Raises BodyTooLarge, EnvelopeMalformed, VersionsTooFarApart, UnknownSender, SignatureInvalid,
    WrongStudy, WrongRecipient, WrongStage, WrongRound, PreviousStateMismatch, MessageReplayed or
    BodyHashMismatch, in this order.
    """
    header, envelope, encoded = _split(data, max_body_bytes=max_body_bytes, spoken=spoken)
    if header.sender not in keys:
        raise UnknownSender(f"expected a sender among {', '.join(sorted(keys))}, got {header.sender!r}")
    verify_signature(keys[header.sender], Purpose.ENVELOPE, encoded, envelope.frame[-64:])
    _verify_place(header, expected)
    body = memoryview(envelope.body).toreadonly()
    if len(body) != header.body_bytes or sha256_hex(body) != header.body_sha256:
        raise BodyHashMismatch(
            f"expected a body of {header.body_bytes} bytes with hash {header.body_sha256[:16]}…, "
            f"got {len(body)} bytes with hash {sha256_hex(body)[:16]}…"
        )
    return Message(header, body, envelope.sha256)


def format_header(header: Header) -> bytes:
    return canonical_json(asdict(header))


def parse_header(data: bytes, *, spoken: range = SPOKEN) -> Header:
    """Parse a header in one of the `spoken` versions; raises EnvelopeMalformed or VersionsTooFarApart."""
    try:
        value = parse_canonical(data, max_bytes=MAX_HEADER_BYTES)
    except FedRadError as error:
        raise EnvelopeMalformed(f"header: {error}") from error
    if isinstance(value, dict):
        _verify_version(value.get("version"), value.get("stage"), spoken)
    names = set(Header.__dataclass_fields__)
    if not isinstance(value, dict) or set(value) != names:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise EnvelopeMalformed(f"header: expected the keys {sorted(names)}, got {got}")
    for name in ("round", "attempt", "body_bytes"):
        if type(value[name]) is not int or value[name] < 0:
            raise EnvelopeMalformed(f"header {name}: expected a whole number, got {value[name]!r}")
    patterns: dict[str, Any] = {
        "study": _HEX64, "previous": _HEX64, "body_sha256": _HEX64, "sender": _NAME, "recipient": _NAME,
        "nonce": re.compile(r"[0-9a-f]{32}"), "answers": re.compile(r"(?:[0-9a-f]{64})?"),
    }  # fmt: skip
    for name, pattern in patterns.items():
        if not isinstance(value[name], str) or not pattern.fullmatch(value[name]):
            raise EnvelopeMalformed(f"header {name}: expected {pattern.pattern}, got another form")
    try:
        return Header(**{**value, "stage": Stage(value["stage"]), "kind": Kind(value["kind"])})
    except ValueError as error:
        raise EnvelopeMalformed(f"header: {error}") from error


def pack_body(meta: Mapping[str, Any], *parts: Any) -> bytes:
    """Join JSON and binary parts: `u32 length | canonical JSON | part | …`; "parts" lists their sizes."""
    views = [memoryview(part).cast("B") for part in parts]
    encoded = canonical_json({**meta, "parts": [len(view) for view in views]})
    return b"".join((len(encoded).to_bytes(4, "big"), encoded, *views))


def unpack_body(
    body: Bytes, *, fields: Mapping[str, type], parts: int = 0
) -> tuple[dict[str, Any], list[memoryview]]:
    """Split a body; its JSON part must have exactly `fields` (name → type) and `parts` binary parts.

    Raises EnvelopeMalformed.
    """
    if len(body) < 4:
        raise EnvelopeMalformed(f"body: expected at least 4 bytes, got {len(body)}")
    length = int.from_bytes(body[:4], "big")
    if length > MAX_META_BYTES or 4 + length > len(body):
        raise EnvelopeMalformed(f"body: expected a JSON part of {length} bytes, got {len(body) - 4} in all")
    try:
        meta = parse_canonical(bytes(body[4 : 4 + length]), max_bytes=MAX_META_BYTES)
    except NotCanonical as error:
        raise EnvelopeMalformed(f"body: {error}") from error
    if not isinstance(meta, dict) or set(meta) != {*fields, "parts"}:
        got = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
        raise EnvelopeMalformed(f"body: expected the fields {sorted({*fields, 'parts'})}, got {got}")
    for name, kind in fields.items():
        value = meta[name]
        if kind is float and type(value) is int:
            meta[name] = float(value)
        elif type(value) is not kind:
            raise EnvelopeMalformed(f"body {name}: expected {kind.__name__}, got {type(value).__name__}")
    return meta, _cut(memoryview(body)[4 + length :], meta.pop("parts"), parts)


def _cut(blob: memoryview, sizes: Any, count: int) -> list[memoryview]:
    valid = isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)
    if not valid or len(sizes) != count or sum(sizes) != len(blob):
        raise EnvelopeMalformed(f"body parts: expected {count} that fill the body, got other sizes")
    cut, start = [], 0
    for size in sizes:
        cut.append(blob[start : start + size])
        start += size
    return cut


def _verify_version(found: Any, stage: Any, spoken: range) -> None:
    if type(found) is not int:
        raise EnvelopeMalformed(f"header version: expected a whole number, got {type(found).__name__}")
    if found not in spoken and not (stage == Stage.HELLO.value and found == HELLO_VERSION):
        span = "-".join(str(version) for version in sorted({spoken[0], spoken[-1]}))
        raise VersionsTooFarApart(
            f"expected a message in protocol version {span}, got version {found}; upgrade "
            f"{'its receiver' if found > spoken[-1] else 'its sender'}"
        )


def _split(data: Bytes | Envelope, *, max_body_bytes: int, spoken: range) -> tuple[Header, Envelope, bytes]:
    """Return header, envelope, and the header's bytes, which the signature covers."""
    most = max_body_bytes + MAX_OVERHEAD_BYTES
    if len(data) > most:
        raise BodyTooLarge(f"expected a message of at most {most} bytes, got {len(data)}")
    if isinstance(data, Envelope):
        envelope = data
        if cut_envelope(data.frame).body:
            raise EnvelopeMalformed("expected a frame that ends with its signature, got more bytes")
    else:
        envelope = cut_envelope(data)
    encoded = envelope.frame[8:-64]
    header = parse_header(encoded, spoken=spoken)
    if header.body_bytes > max_body_bytes:
        raise BodyTooLarge(f"expected a body of at most {max_body_bytes} bytes, got {header.body_bytes}")
    return header, envelope, encoded


def _verify_place(header: Header, expected: Expected) -> None:
    if header.study != expected.study:
        raise WrongStudy(f"expected study {expected.study[:16]}…, got {header.study[:16]}…")
    if header.recipient != expected.recipient:
        raise WrongRecipient(f"expected a message to {expected.recipient}, got one to {header.recipient}")
    if expected.sender is not None and header.sender != expected.sender:
        raise UnknownSender(f"expected a message from {expected.sender}, got one from {header.sender}")
    if expected.stage is not None and header.stage is not expected.stage:
        raise WrongStage(f"expected stage {expected.stage.value}, got {header.stage.value}")
    if expected.round is not None and header.round != expected.round:
        raise WrongRound(f"expected round {expected.round}, got {header.round}")
    if expected.attempt is not None and header.attempt != expected.attempt:
        raise WrongRound(f"expected attempt {expected.attempt} of round {header.round}, got {header.attempt}")
    if expected.previous is not None and header.previous != expected.previous:
        raise PreviousStateMismatch(
            f"expected a message that builds on state {expected.previous[:16]}…, got {header.previous[:16]}…"
        )
    if expected.answers is not None and header.answers != expected.answers:
        raise MessageReplayed("expected the answer to this request, got the answer to another")
