"""The bundle's one encoding: every cut, changed, added or hidden byte is refused; nothing is unpacked."""

import contextlib
import io
import random
import zipfile

import pytest

from common.errors import BodyTooLarge, BundleInvalid, FedRadError
from common.ledger import bundle as bundle_module
from common.ledger.bundle import Bundle, make_bundle, pack, parse_bundle
from tests.common.ledger.consortium import Ledger, bundle_of, open_study, study


@pytest.fixture(scope="module")
def small() -> Bundle:
    ledger = Ledger(study())
    open_study(ledger)
    return bundle_of(ledger)


@pytest.fixture(scope="module")
def data(small: Bundle) -> bytes:
    return pack(small)


def test_a_bundle_survives_the_round_trip(small: Bundle, data: bytes) -> None:
    assert parse_bundle(data) == small
    assert pack(parse_bundle(data)) == data


def test_a_bundle_truncated_at_each_byte_region_is_refused(data: bytes) -> None:
    step = max(1, len(data) // 400)
    for end in [*range(0, len(data), step), *range(len(data) - 200, len(data))]:
        with pytest.raises(BundleInvalid):
            parse_bundle(data[:end])


def test_bytes_added_before_after_or_between_are_refused(data: bytes) -> None:
    for bad in (data + b"\0", b"\0" + data, data[:100] + b"x" + data[100:], data + data):
        with pytest.raises(BundleInvalid):
            parse_bundle(bad)


def test_a_flipped_bit_changes_a_member_or_is_refused(small: Bundle, data: bytes) -> None:
    """What parses after a flip is another bundle, never the same one with hidden bytes."""
    draw = random.Random(7)
    for _ in range(300):
        at = draw.randrange(len(data))
        bad = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        with contextlib.suppress(FedRadError):
            assert parse_bundle(bad).members != small.members


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compression)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "releases/1/../../x", "releases/0/card", "releases/1/.hidden", "extra.txt",
     "checkpoints/1.note", "releases/1/a/b", "entries.jsonl/", "Entries.jsonl", "retained/0-1/amber.exe"],
)  # fmt: skip
def test_an_unexpected_or_escaping_member_name_is_refused(name: str, small: Bundle) -> None:
    with pytest.raises(BundleInvalid):
        parse_bundle(zipped([*small.members.items(), (name, b"x")]))
    with pytest.raises(BundleInvalid):
        make_bundle(log=small.log, exported_s=0, software="fedrad 0.1.0", members={name: b"x"})


def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zipped([("entries.jsonl", b"\0" * (64 << 20))], zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    with pytest.raises(BundleInvalid, match="no larger than the archive"):
        parse_bundle(bomb)
    with pytest.raises(BundleInvalid, match="uncompressed"):
        parse_bundle(zipped([("entries.jsonl", b"abc")], zipfile.ZIP_DEFLATED))


def test_a_doubled_or_missing_member_is_refused(small: Bundle) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        doubled = zipped([*small.members.items(), ("entries.jsonl", b"")])
    with pytest.raises(BundleInvalid, match="once"):
        parse_bundle(doubled)
    for name in ("entries.jsonl", "bundle.json"):
        rest = {n: d for n, d in small.members.items() if n != name}
        with pytest.raises(BundleInvalid, match=name):
            parse_bundle(bundle_module._zip(rest))


def test_an_oversized_bundle_is_refused(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 1000)
    with pytest.raises(BodyTooLarge):
        parse_bundle(data)


@pytest.mark.parametrize(
    "stated",
    [b"{}", b"not json", b'{"exported_s":1,"format":2,"log":"x","software":"y"}',
     b'{"exported_s":-1,"format":1,"log":"x","software":"y"}',
     b'{"exported_s":1,"format":1,"log":"x","software":"y"}'],
)  # fmt: skip
def test_a_malformed_bundle_json_is_refused(stated: bytes, small: Bundle) -> None:
    with pytest.raises(BundleInvalid, match="bundle\\.json"):
        parse_bundle(bundle_module._zip({**small.members, "bundle.json": stated}))
