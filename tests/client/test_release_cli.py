"""A site's releases, users and tokens by command: a mistyped folder is not an empty site."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.access import AccessLog, Action
from client.cli import app
from client.home import SiteHomeInvalid

MAY = 1_778_000_000


@pytest.mark.parametrize(
    "command",
    [
        "access list",
        "access shred --before 2026-06",
        "model list",
        "model verify",
        "token list",
        "token add me",
    ],
)
def test_a_folder_that_is_not_there_is_refused_and_not_made(tmp_path: Path, command: str) -> None:
    home = tmp_path / "hoem"
    result = CliRunner().invoke(app, [*command.split(), "--home", str(home)])
    assert isinstance(result.exception, SiteHomeInvalid) and "--home" in str(result.exception)
    assert not home.exists()


def test_a_site_that_served_has_its_records(tmp_path: Path) -> None:
    AccessLog(tmp_path / "access").record(user="dr.lin", action=Action.DRAFT, model_version=3, time_s=MAY)
    result = CliRunner().invoke(app, ["access", "list", "--home", str(tmp_path)])
    assert result.exit_code == 0 and "2026-05-05 16:53:20 UTC  dr.lin draft model 3" in result.output
