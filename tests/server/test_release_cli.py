"""The commands of operator and site, end to end on files: root, publish, pull, use, export, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from client.home import approve_study, create_home, receive_study
from client.release_cli import access_app, model_app
from common.canonical import sha256_hex
from common.config import format_study
from common.errors import BundleInvalid, RollbackNotPermitted
from common.identity import Purpose, save_key
from common.ledger.audit import verify_file
from common.ledger.entries import OPERATOR
from common.ledger.release_proof import origin_of
from server.bundles import export_run
from server.release_cli import audit_app, release_app
from tests.common.ledger.consortium import Ledger, add_release, bundle_of, key_of, run_study, study

runner = CliRunner()


def run(app: typer.Typer, *arguments: object) -> Any:
    """Run a command with --json; a refusal is raised, as `run_program` would name it."""
    result = runner.invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


class Offices:
    """Folders of an operator and of site amber, and a finished run with one release."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.repository = directory / "repository"
        manifest = study(rounds=2)
        self.ledger = Ledger(manifest, origin=origin_of(manifest))
        values = run_study(self.ledger, 2)
        _, files = add_release(self.ledger, 1, site=values[-1][0], epsilon=values[-1][1])
        for name, data in files.items():
            write(self.run / "release" / name, data)
        for name, data in bundle_of(self.ledger).members.items():
            write(self.run / "server" / "ledger" / name, data)
        signature = key_of(OPERATOR).sign(Purpose.STUDY, format_study(manifest))
        write(self.run / "server" / "study.json", format_study(manifest))
        write(self.run / "server" / "operator.sig", signature.hex().encode())
        self.keys = {}
        for role in ("targets", "snapshot", "timestamp", "amber", OPERATOR):
            self.keys[role] = directory / "keys" / role
            save_key(key_of(role), self.keys[role])
        self.home = directory / "home"
        home = create_home(
            self.home, site="amber", operator_key=key_of(OPERATOR).public, data=directory, bases={}
        )
        (self.home / "keys" / "message.key").unlink()
        save_key(key_of("amber"), self.home / "keys" / "message.key")
        receive_study(home, format_study(manifest), signature)
        approve_study(home, manifest.sha256)

    @property
    def online(self) -> list[object]:
        return ["--snapshot-key", self.keys["snapshot"], "--timestamp-key", self.keys["timestamp"]]

    @property
    def publishing(self) -> list[object]:
        return ["--repository", self.repository, "--targets-key", self.keys["targets"], *self.online]


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def offices(tmp_path: Path) -> Offices:
    return Offices(tmp_path)


def publish(offices: Offices) -> Path:
    root = offices.directory / "1.root.json"
    public = [key_of(name).public for name in (OPERATOR, "amber")]
    run(
        release_app, "root", "propose", root, "--root-keys", ",".join(public), "--threshold", 2,
        "--targets", key_of("targets").public, "--snapshot", key_of("snapshot").public,
        "--timestamp", key_of("timestamp").public,
    )  # fmt: skip
    for name in (OPERATOR, "amber"):
        run(release_app, "root", "sign", root, "--key", offices.keys[name])
    run(release_app, "root", "install", root, *offices.publishing)
    run(
        release_app,
        "publish",
        offices.run / "release",
        "--study",
        offices.run / "server",
        *offices.publishing,
    )
    return root


def test_a_release_goes_from_the_operator_to_a_site_by_commands(offices: Offices) -> None:
    root = publish(offices)
    home = ["--home", offices.home]
    assert run(model_app, "trust", root, "--study", "demo", *home)["quorum"] == 2
    assert run(model_app, "pull", offices.repository, *home) == {"version": 1}
    assert run(model_app, "use", 1, *home) == {"version": 1, "previous": None}
    assert run(model_app, "verify", *home) == {"verified": [1]}
    listed = run(model_app, "list", *home)
    assert (listed["versions"], listed["current"]) == ([1], 1)
    assert run(release_app, "refresh", "--repository", offices.repository, *offices.online)["versions"] == [1]


def test_going_back_without_permission_is_refused_by_name(offices: Offices) -> None:
    root = publish(offices)
    home = ["--home", offices.home]
    run(model_app, "trust", root, "--study", "demo", *home)
    run(model_app, "pull", offices.repository, *home)
    run(model_app, "use", 1, *home)
    (offices.home / "models" / "current.json").write_text('{"previous":1,"version":2}')
    with pytest.raises(RollbackNotPermitted):
        run(model_app, "rollback", *home)
    assert run(model_app, "rollback", "--pin", "worse here", *home)["version"] == 1


@pytest.mark.parametrize("adapters", [True, False])
def test_a_run_is_exported_and_verified(adapters: bool, offices: Offices) -> None:
    out = offices.directory / "audit.zip"
    flag = "--with-adapters" if adapters else "--no-with-adapters"
    value = run(audit_app, "export", "--run", offices.run, "--out", out, flag)
    assert value["entries"] == len(offices.ledger.leaves)
    report = verify_file(out, trusted=offices.ledger.log)
    assert report.passed
    assert report.bundle_sha256 == sha256_hex(out.read_bytes())


def test_a_folder_without_a_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match="with a ledger"):
        export_run(tmp_path, exported_s=0, software="fedrad 0")


def test_the_access_log_is_listed_and_shredded_by_commands(tmp_path: Path) -> None:
    (tmp_path / "site.json").touch()
    assert run(access_app, "list", "--home", tmp_path)["records"] == []
    assert run(access_app, "shred", "--before", "2030-01", "--home", tmp_path) == {"shredded": []}


@pytest.mark.parametrize("app", [release_app, audit_app, model_app, access_app])
def test_every_command_has_help_and_wrong_usage_exits_2(app: typer.Typer) -> None:
    assert runner.invoke(app, ["--help"]).exit_code == 0
    assert runner.invoke(app, ["no-such-command"]).exit_code == 2
