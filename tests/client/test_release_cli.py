"""`fedrad-site access …` where no site is: a mistyped folder is not an empty log."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.access import AccessLog, Action
from client.cli import app
from common.errors import AccessLogInvalid

MAY = 1_778_000_000


@pytest.mark.parametrize("command", [("list",), ("shred", "--before", "2026-06")])
def test_a_folder_that_is_no_sites_has_no_access_log_and_gets_none(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    home = tmp_path / "hoem"
    result = CliRunner().invoke(app, ["access", *command, "--home", str(home)])
    assert isinstance(result.exception, AccessLogInvalid) and "--home" in str(result.exception)
    assert not home.exists()


def test_a_site_that_served_has_its_records(tmp_path: Path) -> None:
    AccessLog(tmp_path / "access").record(user="dr.lin", action=Action.DRAFT, model_version=3, time_s=MAY)
    result = CliRunner().invoke(app, ["access", "list", "--home", str(tmp_path)])
    assert result.exit_code == 0 and "dr.lin draft model 3" in result.output
