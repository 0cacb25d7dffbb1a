"""Messages: one encoding each, and every other byte string ends in a named error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import BodyTooLarge, FedRadError, MessageMalformed, NotCanonical, SiteRepeated
from common.secagg import messages as m
from common.secagg.masking import MAX_LENGTH, chunk_count

SITES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)


def sized(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def some(size: int, count: int) -> st.SearchStrategy[tuple[bytes, ...]]:
    return st.lists(sized(size), min_size=count, max_size=count).map(tuple)


def rosters(least: int = 1) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(SITES, min_size=least, max_size=6).map(lambda sites: tuple(sorted(sites)))


def advertised(site: str) -> st.SearchStrategy[m.AdvertisedKeys]:
    return st.builds(m.AdvertisedKeys, sized(32), st.just(site), sized(32), sized(32), sized(32), sized(64))


def receipts(site: str) -> st.SearchStrategy[m.Receipt]:
    return st.builds(m.Receipt, st.just(site), sized(32), sized(64))


@st.composite
def key_sets(draw: st.DrawFn) -> m.KeySet:
    return m.KeySet(tuple(draw(advertised(site)) for site in draw(rosters())))


@st.composite
def shares(draw: st.DrawFn) -> m.Shares:
    count = draw(st.integers(1, 6))
    boxes, digests = some(m.BOX_BYTES, count - 1), some(32, count)
    return m.Shares(draw(sized(32)), draw(SITES), draw(boxes), draw(digests), draw(digests))


@st.composite
def openings(draw: st.DrawFn) -> m.Opening:
    roster = draw(rosters())
    return m.Opening(draw(sized(32)), roster, draw(some(m.BOX_BYTES, len(roster) - 1)))


@st.composite
def uploads(draw: st.DrawFn) -> m.Upload:
    length = draw(st.integers(1, 5 << 20))
    return m.Upload(
        draw(sized(32)), draw(SITES.flatmap(receipts)), length, draw(some(32, chunk_count(length)))
    )


@st.composite
def survivor_sets(draw: st.DrawFn) -> m.SurvivorSet:
    survivors = tuple(draw(receipts(site)) for site in draw(rosters()))
    return m.SurvivorSet(draw(sized(32)), survivors, draw(rosters() | st.just(())))


@st.composite
def reveals(draw: st.DrawFn) -> m.Reveal:
    shares_count = draw(st.integers(1, 6))
    count = draw(st.integers(1, shares_count))
    sealed = draw(sized(33 * shares_count + 16))
    locks, keys = draw(some(m.LOCK_BYTES, count)), draw(some(32, count))
    return m.Reveal(draw(sized(32)), draw(SITES), draw(sized(32)), sealed, locks, keys, draw(sized(64)))


Kind = tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]]
KINDS: dict[str, Kind] = {
    "keys": (SITES.flatmap(advertised), m.format_keys, m.parse_keys),
    "key set": (key_sets(), m.format_key_set, m.parse_key_set),
    "shares": (shares(), m.format_shares, m.parse_shares),
    "opening": (openings(), m.format_opening, m.parse_opening),
    "upload": (uploads(), m.format_upload, m.parse_upload),
    "survivor set": (survivor_sets(), m.format_survivor_set, m.parse_survivor_set),
    "reveal": (reveals(), m.format_reveal, m.parse_reveal),
}
REFUSALS = (MessageMalformed, NotCanonical, SiteRepeated, BodyTooLarge)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_parsing_what_was_formatted_gives_the_same_message(kind: str, data: st.DataObject) -> None:
    messages, format_message, parse_message = KINDS[kind]
    message = data.draw(messages)
    assert parse_message(format_message(message)) == message


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_bytes_parse_to_their_own_one_meaning_or_are_refused(kind: str, data: st.DataObject) -> None:
    messages, format_message, parse_message = KINDS[kind]
    whole = bytearray(format_message(data.draw(messages)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                whole[at] = data.draw(st.integers(0, 255))
            case "cut":
                del whole[at : at + data.draw(st.integers(1, 40))]
            case _:
                whole[at:at] = data.draw(st.binary(max_size=40))
        if not whole:
            whole = bytearray(b"F")
    check_canonical(parse_message, format_message, bytes(whole))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(body=st.binary(max_size=600))
@example(body=b"")
def test_any_bytes_parse_to_their_own_one_meaning_or_are_refused(kind: str, body: bytes) -> None:
    _, format_message, parse_message = KINDS[kind]
    check_canonical(parse_message, format_message, body)
    head = m.MAGIC + bytes([1 + list(KINDS).index(kind)])
    check_canonical(parse_message, format_message, head + body)


def check_canonical(parse: Callable[[bytes], Any], format: Callable[[Any], bytes], data: bytes) -> None:
    try:
        message = parse(data)
    except FedRadError as error:
        assert isinstance(error, REFUSALS)
        return
    assert format(message) == data


KEYS = m.AdvertisedKeys(bytes(32), "a", bytes(32), bytes(32), bytes(32), bytes(64))
RECEIPT = m.Receipt("a", bytes(32), bytes(64))


@pytest.mark.parametrize("kind", KINDS)
def test_message_of_another_type_or_version_is_refused(kind: str) -> None:
    parse = KINDS[kind][2]
    right = 1 + list(KINDS).index(kind)
    for head in (
        m.MAGIC + bytes([right % 7 + 1]),
        b"FRSA\x02" + bytes([right]),
        b"FRSB\x01" + bytes([right]),
    ):
        with pytest.raises(MessageMalformed, match="expected a secure aggregation message"):
            parse(head + bytes(500))


@pytest.mark.parametrize("kind", KINDS)
def test_message_over_its_size_cap_is_refused_before_it_is_read(kind: str) -> None:
    with pytest.raises(BodyTooLarge):
        KINDS[kind][2](bytes(m.MAX_MESSAGE_BYTES + 1))


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(MessageMalformed, match="expected the message's end"):
        m.parse_keys(m.format_keys(KEYS) + b"\x00")


def test_site_twice_in_a_list_is_refused() -> None:
    head = m.format_key_set(m.KeySet((KEYS,)))
    twice = head[:6] + b"\x02" + head[7:] * 2
    with pytest.raises(SiteRepeated):
        m.parse_key_set(twice)
    with pytest.raises(SiteRepeated):
        m.SurvivorSet(bytes(32), (RECEIPT, RECEIPT), ())


def test_sites_out_of_order_are_refused() -> None:
    with pytest.raises(NotCanonical):
        m.KeySet((replace(KEYS, site="b"), KEYS))


@pytest.mark.parametrize("site", ["", "A", "-a", "a-", "a_b", "é", "a" * 65, "a\n"])
def test_names_outside_the_alphabet_are_refused(site: str) -> None:
    with pytest.raises(MessageMalformed):
        replace(KEYS, site=site)


def test_more_than_64_sites_are_refused() -> None:
    with pytest.raises(MessageMalformed):
        m.KeySet(tuple(replace(KEYS, site=f"s{i:03d}") for i in range(65)))


def test_counts_that_do_not_match_are_refused() -> None:
    with pytest.raises(MessageMalformed):
        m.Shares(bytes(32), "a", (), (bytes(32),) * 2, (bytes(32),) * 2)
    with pytest.raises(MessageMalformed):
        m.Opening(bytes(32), ("a", "b"), ())
    with pytest.raises(MessageMalformed):
        m.Upload(bytes(32), RECEIPT, 10, (bytes(32),) * 2)
    with pytest.raises(MessageMalformed):
        m.Upload(bytes(32), RECEIPT, MAX_LENGTH + 1, (bytes(32),) * 257)
    for sealed, locks, keys in ((48, 1, 1), (50, 1, 1), (49, 2, 2), (49, 0, 0), (49, 1, 0)):
        with pytest.raises(MessageMalformed):
            lock, key = (bytes(m.LOCK_BYTES),) * locks, (bytes(32),) * keys
            m.Reveal(bytes(32), "a", bytes(32), bytes(sealed), lock, key, bytes(64))


@pytest.mark.parametrize("field", ["terms", "mask_public", "share_public", "commitment", "signature"])
def test_fields_of_another_size_are_refused(field: str) -> None:
    for size in (0, 31, 33, 65):
        changed: dict[str, Any] = {field: bytes(size)}
        with pytest.raises(MessageMalformed, match="expected a field"):
            replace(KEYS, **changed)


def test_largest_messages_stay_under_the_cap() -> None:
    sites = sorted(f"{i:02d}" + "x" * 62 for i in range(64))
    key_set = m.KeySet(tuple(replace(KEYS, site=site) for site in sites))
    dealt = m.Shares(bytes(32), sites[0], (bytes(82),) * 63, (bytes(32),) * 64, (bytes(32),) * 64)
    opening = m.Opening(bytes(32), tuple(sites), (bytes(82),) * 63)
    upload = m.Upload(bytes(32), replace(RECEIPT, site=sites[0]), MAX_LENGTH, (bytes(32),) * 256)
    survivors = m.SurvivorSet(bytes(32), tuple(replace(RECEIPT, site=s) for s in sites), ())
    locks, keys = (bytes(m.LOCK_BYTES),) * 64, (bytes(32),) * 64
    reveal = m.Reveal(bytes(32), sites[0], bytes(32), bytes(33 * 64 + 16), locks, keys, bytes(64))
    assert m.parse_key_set(m.format_key_set(key_set)) == key_set
    assert m.parse_shares(m.format_shares(dealt)) == dealt
    assert m.parse_opening(m.format_opening(opening)) == opening
    assert m.parse_upload(m.format_upload(upload)) == upload
    assert m.parse_survivor_set(m.format_survivor_set(survivors)) == survivors
    assert m.parse_reveal(m.format_reveal(reveal)) == reveal
