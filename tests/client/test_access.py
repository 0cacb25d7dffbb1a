"""The access log: chained, keyed, shreddable, and free of free text."""

from pathlib import Path

import pytest

from client.access import AccessLog, Action
from common.errors import AccessLogInvalid, PayloadShredded
from tests.full_disk import room_for

MAY, JUNE = 1_778_000_000, 1_781_000_000
DRAFT = b"synthetic draft: lungs clear"


def filled(path: Path) -> AccessLog:
    log = AccessLog(path)
    log.record(user="dr.amber", action=Action.DRAFT, model_version=2, time_s=MAY, payload=DRAFT)
    log.record(user="dr.amber", action=Action.SIGN_OFF, model_version=2, time_s=MAY + 60)
    log.record(user="dr.birch", action=Action.DRAFT, model_version=3, time_s=JUNE, payload=DRAFT)
    return log


def test_records_and_payloads_are_there_again(tmp_path: Path) -> None:
    head = filled(tmp_path).head
    log = AccessLog(tmp_path)
    assert log.head == head
    records = list(log.records())
    assert [(r.user, r.action, r.model_version) for r in records] == [
        ("dr.amber", Action.DRAFT, 2), ("dr.amber", Action.SIGN_OFF, 2), ("dr.birch", Action.DRAFT, 3)
    ]  # fmt: skip
    assert log.read_payload(records[0]) == log.read_payload(records[2]) == DRAFT


def test_what_was_drafted_is_not_readable_or_guessable_from_the_log(tmp_path: Path) -> None:
    log = filled(tmp_path)
    first, _, third = log.records()
    assert first.commitment != third.commitment
    for path in [tmp_path / "access.jsonl", *(tmp_path / "payloads").glob("*/*")]:
        assert DRAFT not in path.read_bytes()
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "keys").iterdir())


def test_a_changed_dropped_or_reordered_record_is_named(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "access.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    spaced = lines[0][:-2] + b" }\n"
    for bad in (
        [lines[0].replace(b"amber", b"cedar"), *lines[1:]],
        [lines[0], lines[2]],
        [lines[1], lines[0], lines[2]],
        lines[1:],
        [b"{}\n", *lines],
        [spaced, *lines[1:]],
    ):
        path.write_bytes(b"".join(bad))
        with pytest.raises(AccessLogInvalid, match="line"):
            AccessLog(tmp_path)


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "access.jsonl"
    path.write_bytes(path.read_bytes() + b'{"action":"dra')
    log = AccessLog(tmp_path)
    log.record(user="dr.amber", action=Action.DISCARD, model_version=3, time_s=JUNE)
    assert len(list(AccessLog(tmp_path).records())) == 4


def test_a_record_that_did_not_fit_on_the_disk_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = filled(tmp_path)
    with room_for(tmp_path / "access.jsonl", 100), pytest.raises(OSError, match="File too large"):
        log.record(user="dr.amber", action=Action.DISCARD, model_version=3, time_s=JUNE)
    log.record(user="dr.birch", action=Action.DISCARD, model_version=3, time_s=JUNE)
    users = [record.user for record in AccessLog(tmp_path).records()]
    assert len(users) == 4 and users[-1] == "dr.birch"


def test_two_writers_make_one_chain(tmp_path: Path) -> None:
    """The server goes on while somebody shreds beside it."""
    server = filled(tmp_path)
    assert AccessLog(tmp_path).shred_before("2026-06", user="dpo", time_s=JUNE + 1) == ["2026-05"]
    server.record(user="dr.amber", action=Action.DRAFT, model_version=3, time_s=JUNE + 2, payload=DRAFT)
    assert [record.action for record in AccessLog(tmp_path).records()][3:] == [Action.SHRED, Action.DRAFT]


def test_a_log_that_was_cut_or_exchanged_under_a_writer_takes_no_record(tmp_path: Path) -> None:
    log = filled(tmp_path)
    path = tmp_path / "access.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    before = path.read_bytes()
    with pytest.raises(AccessLogInvalid, match="to go on"):
        log.record(user="dr.amber", action=Action.DISCARD, model_version=3, time_s=JUNE)
    assert path.read_bytes() == before


def test_shredding_a_month_destroys_its_payloads_and_keeps_its_records(tmp_path: Path) -> None:
    log = filled(tmp_path)
    first, _, third = log.records()
    assert log.shred_before("2026-06", user="dpo", time_s=JUNE + 1) == ["2026-05"]
    with pytest.raises(PayloadShredded, match="2026-05"):
        log.read_payload(first)
    assert log.read_payload(third) == DRAFT
    assert [r.action for r in AccessLog(tmp_path).records()][-1] is Action.SHRED
    assert not list((tmp_path / "payloads" / "2026-05").iterdir())
    with pytest.raises(AccessLogInvalid, match="YYYY-MM"):
        log.shred_before("June", user="dpo", time_s=JUNE)


def test_a_payload_put_under_another_record_or_changed_is_refused(tmp_path: Path) -> None:
    log = filled(tmp_path)
    first = next(log.records())
    path = tmp_path / "payloads" / "2026-05" / first.id
    sealed = path.read_bytes()
    (other,) = (tmp_path / "payloads" / "2026-06").iterdir()
    for bad in (sealed[:-1] + bytes([sealed[-1] ^ 1]), other.read_bytes(), b""):
        path.write_bytes(bad)
        with pytest.raises(AccessLogInvalid, match="sealed"):
            log.read_payload(first)


@pytest.mark.parametrize("user", ["", "Jane Doe, born 1931", "a\nb", "x" * 101])
def test_a_user_name_that_could_hold_free_text_is_refused(user: str, tmp_path: Path) -> None:
    with pytest.raises(AccessLogInvalid):
        AccessLog(tmp_path).record(user=user, action=Action.DRAFT, model_version=1, time_s=MAY)
