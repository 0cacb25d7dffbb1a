"""Files on a disk that is full: what did not fit is not there, and what comes later is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.files import append_durable
from tests.full_disk import room_for


def test_an_append_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_durable(path, b"first\n")
    for room in (0, 3):
        with room_for(path, room), pytest.raises(OSError, match="File too large"):
            append_durable(path, b"second\n")
        assert path.read_bytes() == b"first\n"
    append_durable(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"
