"""The envelope: one named error per thing that can be wrong, nothing unnamed for any bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import protocol
from common.canonical import canonical_json, sha256_hex
from common.errors import (
    BodyHashMismatch,
    BodyTooLarge,
    EnvelopeMalformed,
    FedRadError,
    MessageReplayed,
    PreviousStateMismatch,
    SignatureInvalid,
    UnknownSender,
    VersionsTooFarApart,
    WrongRecipient,
    WrongRound,
    WrongStage,
    WrongStudy,
)
from common.identity import Purpose, SigningKey
from common.protocol import Expected, Header, Kind, Stage, pack_body, unpack_body

SERVER = SigningKey.from_seed(b"s" * 32)
SITE = SigningKey.from_seed(b"a" * 32)
KEYS = {"server": SERVER.public, "alpha": SITE.public}
STUDY, OTHER = "ab" * 32, "cd" * 32
BODY = pack_body({"x": 1}, b"part")
CAP = 1000


def request(body: bytes = BODY, **fields: Any) -> bytes:
    about: dict[str, Any] = {
        "study": STUDY, "round": 3, "attempt": 1, "stage": Stage.CONTRIBUTE, "sender": "server",
        "recipient": "alpha", "nonce": "12" * 16, "previous": "ef" * 32,
    }  # fmt: skip
    return bytes(protocol.seal_request(SERVER, body=body, **{**about, **fields}))


EXPECTED = Expected(
    study=STUDY, recipient="alpha", sender="server", stage=Stage.CONTRIBUTE, round=3, attempt=1,
    previous="ef" * 32,
)  # fmt: skip


def opened(data: bytes | protocol.Envelope, expected: Expected = EXPECTED) -> protocol.Message:
    return protocol.open_message(data, keys=KEYS, expected=expected, max_body_bytes=CAP)


def with_header(**changes: Any) -> bytes:
    """A message whose header has other or additional fields, properly signed over what it says."""
    value = asdict(opened(request()).header)
    encoded = canonical_json({k: v for k, v in {**value, **changes}.items() if v is not ...})
    return framed(encoded)


def framed(encoded: bytes, body: bytes = BODY) -> bytes:
    signature = SERVER.sign(Purpose.ENVELOPE, encoded)
    return b"FRM1" + len(encoded).to_bytes(4, "big") + encoded + signature + body


def test_a_message_opens_to_what_was_sealed() -> None:
    message = opened(request())
    assert message.body == BODY
    assert message.header.kind is Kind.REQUEST
    assert message.sha256 == sha256_hex(request()[: -len(BODY)])


def test_a_header_parses_to_what_was_formatted() -> None:
    header = opened(request()).header
    assert protocol.parse_header(protocol.format_header(header)) == header


def test_a_reply_names_the_request_that_it_answers() -> None:
    asked = opened(request())
    reply = protocol.seal_reply(SITE, asked, nonce="34" * 16, body=pack_body({}))
    expected = Expected(study=STUDY, recipient="server", sender="alpha", answers=asked.sha256)
    assert opened(reply, expected).header.answers == asked.sha256


def test_the_answer_to_another_request_is_refused() -> None:
    reply = protocol.seal_reply(SITE, opened(request()), nonce="34" * 16, body=pack_body({}))
    other = opened(request(nonce="56" * 16))
    expected = Expected(study=STUDY, recipient="server", answers=other.sha256)
    with pytest.raises(MessageReplayed):
        opened(reply, expected)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"study": OTHER}, WrongStudy),
        ({"round": 4}, WrongRound),
        ({"attempt": 2}, WrongRound),
        ({"stage": Stage.UNMASK}, WrongStage),
        ({"recipient": "beta"}, WrongRecipient),
        ({"previous": OTHER}, PreviousStateMismatch),
        ({"sender": "mallory"}, UnknownSender),
        ({"sender": "alpha"}, SignatureInvalid),
    ],
)
def test_a_message_for_another_place_is_refused(fields: dict[str, Any], error: type[FedRadError]) -> None:
    with pytest.raises(error):
        opened(request(**fields))


def test_a_message_of_a_known_but_other_sender_is_refused() -> None:
    reply = protocol.seal_reply(SITE, opened(request()), nonce="34" * 16, body=BODY)
    with pytest.raises(UnknownSender):
        opened(reply, Expected(study=STUDY, recipient="server", sender="beta"))


@pytest.mark.parametrize("at", [8, 40, 200])
def test_one_flipped_bit_of_the_header_is_refused(at: int) -> None:
    data = bytearray(request())
    data[at] ^= 1
    with pytest.raises((EnvelopeMalformed, SignatureInvalid, VersionsTooFarApart)):
        opened(bytes(data))


def test_one_flipped_bit_of_the_signature_is_refused() -> None:
    data = bytearray(request())
    data[-len(BODY) - 1] ^= 1
    with pytest.raises(SignatureInvalid):
        opened(bytes(data))


@pytest.mark.parametrize("body", [BODY[:-1], BODY + b"x", BODY[:-1] + b"X", b""])
def test_another_body_is_refused(body: bytes) -> None:
    with pytest.raises(BodyHashMismatch):
        opened(request()[: -len(BODY)] + body)


def test_a_signature_for_another_purpose_is_refused() -> None:
    encoded = protocol.format_header(opened(request()).header)
    signature = SERVER.sign(Purpose.APPROVAL, encoded)
    with pytest.raises(SignatureInvalid):
        opened(b"FRM1" + len(encoded).to_bytes(4, "big") + encoded + signature + BODY)


def test_a_body_over_the_cap_is_refused() -> None:
    with pytest.raises(BodyTooLarge):
        opened(request(bytes(CAP + 1)))


def test_a_header_that_claims_a_body_over_the_cap_is_refused_before_the_body_is_there() -> None:
    with pytest.raises(BodyTooLarge):
        opened(with_header(body_bytes=1 << 31)[: -len(BODY)])


def test_a_message_longer_than_any_allowed_is_refused_unread() -> None:
    with pytest.raises(BodyTooLarge):
        opened(b"FRM1" + bytes(CAP + 5000))


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 8, 30, 400, 480])
def test_a_truncated_message_is_refused(cut: int) -> None:
    with pytest.raises(EnvelopeMalformed):
        opened(request()[:cut])


def test_a_header_that_is_not_canonical_is_refused() -> None:
    import json

    value = asdict(opened(request()).header)
    with pytest.raises(EnvelopeMalformed):
        opened(framed(json.dumps(value, indent=1).encode()))


def test_a_header_with_an_extra_field_is_refused() -> None:
    with pytest.raises(EnvelopeMalformed):
        opened(with_header(priority="high"))


def test_a_header_without_a_field_is_refused() -> None:
    with pytest.raises(EnvelopeMalformed):
        opened(with_header(nonce=...))


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1}, {"round": True}, {"round": 1.5}, {"attempt": "1"}, {"study": "AB" * 32},
        {"nonce": "12"},
        {"stage": "dance"}, {"kind": "order"}, {"sender": "Server"}, {"recipient": ""}, {"answers": "x"},
        {"body_sha256": 7},
    ],
)  # fmt: skip
def test_a_header_field_of_another_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeMalformed):
        opened(with_header(**change))


@pytest.mark.parametrize(("version", "who"), [(0, "sender"), (2, "receiver")])
def test_another_version_is_refused_by_name_and_says_whom_to_upgrade(version: int, who: str) -> None:
    with pytest.raises(VersionsTooFarApart, match=f"version 1, got version {version}; upgrade its {who}"):
        opened(with_header(version=version))


@pytest.mark.parametrize("version", ["1", None, True, 1.5])
def test_a_version_that_is_no_whole_number_is_refused(version: Any) -> None:
    with pytest.raises(EnvelopeMalformed):
        opened(with_header(version=version))


def test_a_hello_is_read_by_every_release_and_nothing_else_is() -> None:
    later = range(3, 5)
    about = {"keys": KEYS, "expected": Expected(STUDY, "alpha"), "max_body_bytes": CAP, "spoken": later}
    hello = protocol.open_message(with_header(stage="hello"), **about)  # type: ignore[arg-type]
    assert hello.header.version == protocol.HELLO_VERSION
    with pytest.raises(VersionsTooFarApart, match="version 3-4, got version 1; upgrade its sender"):
        protocol.open_message(with_header(stage="contribute"), **about)  # type: ignore[arg-type]
    with pytest.raises(VersionsTooFarApart):
        protocol.open_message(with_header(stage="hello", version=2), **about)  # type: ignore[arg-type]


def test_an_answer_is_in_the_version_of_its_request() -> None:
    spoken = range(1, 8)
    asked = protocol.open_message(
        with_header(version=7),
        keys=KEYS,
        expected=Expected(STUDY, "alpha"),
        max_body_bytes=CAP,
        spoken=spoken,
    )
    reply = protocol.seal_reply(SITE, asked, nonce="0" * 32, body=b"")
    assert protocol.read_header(reply, max_body_bytes=CAP, spoken=spoken).version == 7


def test_a_body_that_the_header_does_not_describe_is_not_opened() -> None:
    header = opened(request()).header
    with pytest.raises(BodyHashMismatch):
        opened(protocol.seal(SERVER, header, b"another"))


def test_a_message_in_two_pieces_is_the_message_in_one() -> None:
    whole = protocol.cut_envelope(request())
    assert bytes(whole) == request() and len(whole) == len(request())
    assert opened(whole) == opened(request())


@pytest.mark.parametrize("extra", [b"x", BODY])
def test_a_frame_with_more_than_its_signature_is_refused(extra: bytes) -> None:
    whole = protocol.cut_envelope(request())
    with pytest.raises(EnvelopeMalformed):
        opened(protocol.Envelope(whole.frame + extra, whole.body))


@pytest.mark.parametrize("cut", [0, 4, 7, 8, 100, -1])
def test_a_truncated_frame_is_refused(cut: int) -> None:
    whole = protocol.cut_envelope(request())
    with pytest.raises(EnvelopeMalformed):
        opened(protocol.Envelope(whole.frame[:cut], whole.body))


# --- bodies -------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=4), st.integers(0, 2**53 - 1), st.text(max_size=20))
def test_a_body_unpacks_to_what_was_packed(parts: list[bytes], number: int, text: str) -> None:
    body = pack_body({"n": number, "t": text}, *parts)
    meta, got = unpack_body(body, fields={"n": int, "t": str}, parts=len(parts))
    assert meta == {"n": number, "t": text}
    assert [bytes(part) for part in got] == parts


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\0\0\0", b"\0\0\0\5{}", b"\xff\xff\xff\xff{}", pack_body({}), pack_body({"n": "1"}),
        pack_body({"n": True}), pack_body({"n": 1, "m": 1}), pack_body({"n": 1}, b"one", b"two"),
        pack_body({"n": 1}, b"one")[:-1], pack_body({"n": 1}, b"one") + b"x", b"\0\0\0\2[]",
        b"\0\0\0\4null",
    ],
)  # fmt: skip
def test_a_body_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(EnvelopeMalformed):
        unpack_body(body, fields={"n": int}, parts=1)


@pytest.mark.parametrize("sizes", ["null", "[-1,4]", "[1.5]", "[true]", '["3"]', "{}", "[3,0]"])
def test_parts_of_impossible_sizes_are_refused(sizes: str) -> None:
    encoded = f'{{"parts":{sizes}}}'.encode()
    with pytest.raises(EnvelopeMalformed):
        unpack_body(len(encoded).to_bytes(4, "big") + encoded + b"abc", fields={}, parts=1)


# --- any bytes ----------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.binary(max_size=600))
def test_arbitrary_bytes_end_in_a_named_error(data: bytes) -> None:
    with pytest.raises(FedRadError):
        opened(data)
    with pytest.raises(FedRadError):
        opened(b"FRM1" + data)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_an_arbitrary_signed_header_ends_in_a_named_error(data: bytes) -> None:
    with pytest.raises(FedRadError):
        opened(framed(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(Header.__dataclass_fields__)), json_values)
def test_any_value_in_a_signed_header_opens_or_ends_in_a_named_error(field: str, value: Any) -> None:
    try:
        message = opened(with_header(**{field: value}))
    except FedRadError:
        return
    assert asdict(message.header)[field] == value or field == "answers"


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_an_arbitrary_body_ends_in_a_named_error(data: bytes) -> None:
    with pytest.raises(EnvelopeMalformed):
        unpack_body(data, fields={"n": int, "records": list}, parts=2)


@settings(max_examples=200)
@given(json_values)
def test_any_meta_of_a_body_ends_in_a_named_error(value: Any) -> None:
    encoded = canonical_json(value)
    with pytest.raises(EnvelopeMalformed):
        unpack_body(len(encoded).to_bytes(4, "big") + encoded, fields={"n": int}, parts=0)
