"""Options that cannot be meant are refused as usage (exit code 2), before anything is made or started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from common.errors import ManifestInvalid
from common.ledger.cli import app as audit_app
from deploy.local.cli import app as local_app
from deploy.server.cli import app as server_app
from deploy.site.cli import app as site_app


def parameters(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command and option below a command, each with its name in full."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from parameters(inner, f"{path} {name}")
        return
    yield path, command
    for one in command.params:
        if one.param_type_name == "option":
            yield f"{path} {one.opts[0]}", one


@pytest.mark.parametrize("app", [site_app, server_app, local_app, audit_app])
def test_every_command_and_option_says_what_it_is(app: typer.Typer) -> None:
    assert [name for name, one in parameters(get_command(app), "") if not one.help] == []


@pytest.mark.parametrize(
    ("app", "command"),
    [
        (site_app, "link --port 99999"),
        (site_app, "link --port -1"),
        (site_app, "up --gateway-port 65536"),
        (site_app, "up --runtime-port 65536"),
        (site_app, "relay --relay-dir x --site a --agent unix:///x --gateway-port 0"),
        (site_app, "model verify 0"),
        (site_app, "data show x --seed -1"),
        (server_app, "up --api-port 99999"),
        (server_app, "up --superlink-port 99999"),
        (local_app, "demo --seed -1"),
        (local_app, "demo --engine nope"),
        (local_app, "run study.toml --data x --engine nope --out out"),
        (local_app, "base remake out --steps -1"),
        (local_app, "base smollm out --seed -1"),
    ],
)
def test_impossible_option_is_refused_as_usage(
    app: typer.Typer, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.output
    assert list(tmp_path.iterdir()) == []


def test_a_demo_of_no_mode_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(local_app, ["demo", "--mode", "nope", "--out", str(tmp_path / "demo")])
    assert isinstance(result.exception, ManifestInvalid) and "got 'nope'" in str(result.exception)
    assert not (tmp_path / "demo").exists()
