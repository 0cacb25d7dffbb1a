"""The leaf file: torn tails are cut and kept, one writer at a time, what was appended is there again."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BodyTooLarge, LedgerInvalid, LogInUse
from common.ledger.storage import MAX_LEAF_BYTES, LeafFile
from tests.full_disk import room_for

LEAVES = [b"one", b"two", "dreißig".encode(), b"4" * 1000]


def filled(path: Path) -> Path:
    with LeafFile(path) as file:
        file.append(LEAVES[:2])
        file.append(LEAVES[2:])
    return path


def test_leaves_are_there_again_after_reopening(tmp_path: Path) -> None:
    with LeafFile(filled(tmp_path / "log")) as file:
        assert file.size == 4
        assert [file.read(i) for i in range(4)] == LEAVES == list(file.leaves())
        file.append([b"five"])
        assert file.read(4) == b"five"
        assert list(file.leaves())[-1] == b"five"


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 1020))
def test_a_write_torn_at_any_byte_loses_only_the_unfinished_leaf(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = filled(tmp_path_factory.mktemp("torn") / "log")
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    expected = whole[:cut].split(b"\n")[:-1]
    with LeafFile(path) as file:
        assert list(file.leaves()) == expected
        file.append([b"next"])
    torn = path.with_name("log.torn")
    assert (torn.read_bytes() if torn.exists() else b"") == whole[:cut].rpartition(b"\n")[2]
    assert path.read_bytes() == b"".join(leaf + b"\n" for leaf in [*expected, b"next"])


def test_leaves_that_do_not_fit_on_the_disk_are_not_there_and_the_next_are_whole(tmp_path: Path) -> None:
    path = filled(tmp_path / "log")
    with LeafFile(path) as file:
        with room_for(path, 20), pytest.raises(OSError, match="File too large"):
            file.append([b"ten bytes.", b"and these do not fit"])
        assert file.size == 4
        file.append([b"next"])
        assert [file.read(i) for i in range(5)] == [*LEAVES, b"next"]
    with LeafFile(path) as file:
        assert list(file.leaves()) == [*LEAVES, b"next"]


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with LeafFile(tmp_path / "log"), pytest.raises(LogInUse):
        LeafFile(tmp_path / "log")
    LeafFile(tmp_path / "log").close()


@pytest.mark.parametrize("leaf", [b"", b"a\nb", b"\n"])
def test_a_leaf_that_is_not_one_line_is_refused_and_nothing_is_written(leaf: bytes, tmp_path: Path) -> None:
    with LeafFile(tmp_path / "log") as file:
        with pytest.raises(LedgerInvalid):
            file.append([b"good", leaf])
        with pytest.raises(BodyTooLarge):
            file.append([b"x" * (MAX_LEAF_BYTES + 1)])
        assert file.size == 0
    assert (tmp_path / "log").read_bytes() == b""


def test_a_leaf_outside_the_file_is_refused(tmp_path: Path) -> None:
    with LeafFile(filled(tmp_path / "log")) as file, pytest.raises(LedgerInvalid, match="leaf 4"):
        file.read(4)


def test_cut_keeps_the_bytes_aside(tmp_path: Path) -> None:
    with LeafFile(filled(tmp_path / "log")) as file:
        file.cut(3)
        assert list(file.leaves()) == LEAVES[:3]
        file.cut(0)
        assert list(file.leaves()) == []
    assert (tmp_path / "log.torn").read_bytes() == LEAVES[3] + b"\n" + b"\n".join(LEAVES[:3]) + b"\n"
