"""The operator's log: durable, forward only, and honest about damage."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import (
    EntryInvalid,
    LedgerInvalid,
    LogInUse,
    LogRewritten,
    LogTruncated,
    NoteSignatureInvalid,
)
from common.ledger.checkpoint import (
    cosign,
    log_key,
    open_checkpoint,
    parse_checkpoint,
    verify_ledger_proof,
    verify_quorum,
    witness_key,
)
from common.ledger.entries import OPERATOR, Entry, Incident, format_entry
from common.ledger.note import format_note
from common.ledger.witness import WitnessState
from server.log import Log
from tests.common.ledger.consortium import START_S, key_of

ORIGIN = "fedrad.example/ledger"
SITES = ("amber", "birch", "cedar")
WITNESSES = [witness_key(s, bytes.fromhex(key_of(s).public)) for s in SITES]


def incident(number: int, time_s: int = START_S) -> Entry:
    return Entry(time_s, "00" * 32, Incident(code="site-dropped", site="cedar", number=number, detail=""))


def opened(path: Path) -> Log:
    return Log(path, origin=ORIGIN, private_key=key_of(OPERATOR).private)


def filled(path: Path, count: int = 5) -> Path:
    with opened(path) as log:
        log.append([incident(i) for i in range(count)])
        log.checkpoint()
    return path


def test_entries_and_checkpoints_are_there_again_after_reopening(tmp_path: Path) -> None:
    with opened(filled(tmp_path)) as log:
        assert log.size == 5
        assert [entry.body for entry in log.entries()] == [incident(i).body for i in range(5)]
        assert log.latest is not None
        assert open_checkpoint(log.latest, log.key).root == log.root
        assert log.append([incident(5)]) == 5
        assert parse_checkpoint(log.checkpoint().text).size == 6
        assert log.leaf(5) == format_entry(incident(5))


def test_the_same_head_is_signed_once_and_keeps_its_cosignatures(tmp_path: Path) -> None:
    with opened(filled(tmp_path)) as log:
        note = log.checkpoint()
        line = cosign(note, name="amber", private_key=key_of("amber").private, time_s=1)
        log.add_cosignatures([line], witnesses=WITNESSES)
        assert len(log.checkpoint().signatures) == 2
    with opened(tmp_path) as log:
        verify_quorum(log.checkpoint(), WITNESSES, quorum=1)
        assert log.add_cosignatures([line], witnesses=WITNESSES) == log.latest


def test_truncated_log_file_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path) / "entries.jsonl"
    data = path.read_bytes()
    path.write_bytes(b"".join(data.splitlines(keepends=True)[:4]))
    with pytest.raises(LogTruncated, match="signed 5 entries, found 4"):
        opened(tmp_path)
    path.unlink()
    with pytest.raises(LogTruncated):
        opened(tmp_path)


def test_rewritten_log_file_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path) / "entries.jsonl"
    data = path.read_bytes()
    for bad in (data.replace(b'"number":2', b'"number":7'), data.replace(b"cedar", b"birch")):
        path.write_bytes(bad)
        with pytest.raises(LogRewritten):
            opened(tmp_path)
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(LogRewritten):
        opened(tmp_path)


def test_a_torn_append_after_the_checkpoint_is_cut_and_kept_aside(tmp_path: Path) -> None:
    path = filled(tmp_path) / "entries.jsonl"
    whole = format_entry(incident(5)) + b"\n"
    with path.open("ab") as file:
        file.write(whole + b'{"body":{"code":"half')
    with opened(tmp_path) as log:
        assert log.size == 6
        assert log.checkpoint()
    with path.open("ab") as file:
        file.write(b"\0" * 40 + b"\n" + whole)
    with opened(tmp_path) as log:
        assert log.size == 6
        assert log.append([incident(6)]) == 6
    assert whole in (tmp_path / "entries.jsonl.torn").read_bytes()


def test_a_checkpoint_file_of_another_key_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(NoteSignatureInvalid):
        Log(tmp_path, origin=ORIGIN, private_key=key_of("mallory").private)


def test_a_back_dated_entry_is_refused(tmp_path: Path) -> None:
    with opened(filled(tmp_path)) as log:
        with pytest.raises(EntryInvalid, match="back-dated"):
            log.append([incident(9, START_S - 1)])
        with pytest.raises(EntryInvalid, match="back-dated"):
            log.append([incident(9, START_S + 5), incident(9, START_S)])
        assert log.size == 5
        log.append([incident(9, START_S + 5)])


def test_a_cosignature_of_a_stranger_or_a_forged_one_is_refused(tmp_path: Path) -> None:
    with opened(filled(tmp_path)) as log:
        note = log.checkpoint()
        stranger = cosign(note, name="mallory", private_key=key_of("mallory").private, time_s=1)
        with pytest.raises(LedgerInvalid, match="not a witness"):
            log.add_cosignatures([stranger], witnesses=WITNESSES)
        good = cosign(note, name="amber", private_key=key_of("amber").private, time_s=1)
        with pytest.raises(NoteSignatureInvalid):
            log.add_cosignatures([replace(good, value=bytes(72))], witnesses=WITNESSES)
        assert log.latest == note


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with opened(filled(tmp_path)), pytest.raises(LogInUse):
        opened(tmp_path)


def test_sites_witness_each_round_and_prove_an_entry_offline(tmp_path: Path) -> None:
    states = {
        s: WitnessState(tmp_path / s, log=log_key(ORIGIN, bytes.fromhex(key_of(OPERATOR).public)))
        for s in SITES
    }
    with opened(tmp_path / "log") as log:
        for number in range(4):
            index = log.append([incident(number, START_S + number)])
            log.checkpoint()
            for site, state in states.items():
                request = log.cosign_request(state.seen.size if state.seen else 0)
                line = state.cosign(request, name=site, private_key=key_of(site).private, time_s=number)
                log.add_cosignatures([line], witnesses=WITNESSES)
        assert log.latest is not None
        verify_quorum(log.latest, WITNESSES, quorum=3)
        head = verify_ledger_proof(
            log.leaf(index), log.prove(index), log=log.key, witnesses=WITNESSES, quorum=3
        )
        assert head.size == 4
    assert len(list((tmp_path / "log" / "checkpoints").glob("*.note"))) == 4
    assert (tmp_path / "log" / "checkpoints" / "000000000004.note").read_bytes() == format_note(log.latest)


def test_a_proof_or_cosignature_before_the_first_checkpoint_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.append([incident(0)])
        with pytest.raises(LedgerInvalid):
            log.prove(0)
        with pytest.raises(LedgerInvalid):
            log.add_cosignatures([], witnesses=WITNESSES)
