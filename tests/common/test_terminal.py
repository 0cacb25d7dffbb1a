"""How a program ends: one line on stderr and its code, whatever went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from common.errors import BodyTooLarge
from common.terminal import INTERRUPTED, run_program


def ended(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["program"])
        run_program(app)
    return end.value.code, capsys.readouterr().err


def test_a_refusal_is_one_line_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(BodyTooLarge("too long"), capsys) == (1, "error: BodyTooLarge: too long\n")


def test_a_file_that_the_machine_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = PermissionError(13, "Permission denied", str(tmp_path / "keys"))
    line = f"error: PermissionError: {tmp_path}/keys: Permission denied\n"
    assert ended(error, capsys) == (1, line)


def test_interruption_says_that_the_command_goes_on_when_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(KeyboardInterrupt(), capsys)
    assert code == INTERRUPTED and "goes on where this one stopped" in text


def test_an_error_of_ours_is_not_hidden_in_a_line() -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise OSError("no file is named")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no file"):
        patch.setattr("sys.argv", ["program"])
        run_program(app)


_PROGRAM = """
import typer
from common.terminal import answer, run_program
app = typer.Typer()
@app.command()
def defect() -> None:
    report = "-".join(["Mustermann", "Erika"])
    raise ValueError("a defect")
@app.command()
def epsilon() -> None:
    answer({"ε": "≤ 8"}, as_json=True, text=str)
run_program(app)
"""


def run(command: str, *, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, command], capture_output=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "300"},
    )  # fmt: skip


def test_a_defect_shows_its_place_and_no_values() -> None:
    """What a program had in hand when it failed may be a report, a passphrase or a token."""
    ended = run("defect")
    assert ended.returncode == 1 and b"ValueError: a defect" in ended.stderr and b"defect" in ended.stderr
    assert b"Mustermann-Erika" not in ended.stderr


def test_a_terminal_without_greek_gets_json_all_the_same() -> None:
    ended = run("epsilon", encoding="ascii")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"ε": "≤ 8"}
