"""Enrolment as two people do it with files and a telephone: both programs' commands, in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from client.home import SiteHomeInvalid
from common.errors import EnrolmentInvalid, FingerprintMismatch, SiteRevoked
from deploy.server.cli import app as server_app
from deploy.site.cli import app as site_app


@pytest.fixture()
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command of either program with --json; a refusal is raised, as `run_program` would name it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def run(app: typer.Typer, *arguments: str) -> Any:
        app([*arguments, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


def enrol(call: Any, site: str = "north", *more: str) -> dict[str, Any]:
    found: dict[str, Any] = call(site_app, "enrol", site, "--data", "data", "--home", site, *more)
    return found


def test_two_people_enrol_renew_rotate_revoke_and_begin_again(call: Any) -> None:
    operator = call(server_app, "init", "lab", "--address", "localhost:8443", "--home", "srv")
    asked = enrol(call)
    approve = ("site", "approve", asked["request"], "--home", "srv", "--out", "north.bundle")
    with pytest.raises(FingerprintMismatch):
        call(server_app, *approve, "--fingerprint", operator["fingerprint"])
    call(server_app, *approve, "--fingerprint", asked["fingerprint"].upper())
    install = ("enrol", "--home", "north", "--bundle", "north.bundle")
    with pytest.raises(EnrolmentInvalid, match="telephone"):
        call(site_app, *install)
    with pytest.raises(FingerprintMismatch):
        call(site_app, *install, "--operator", asked["fingerprint"])
    shown = call(server_app, "show", "--home", "srv")
    assert call(site_app, *install, "--operator", shown["fingerprint"])["server"] == "localhost:8443"

    call(site_app, "renew", "--home", "north", "--out", "renewal.json")
    call(server_app, "site", "renew", "renewal.json", "--home", "srv", "--out", "north.bundle")
    call(site_app, *install)

    rotation = call(site_app, "rotate", "--home", "north")
    assert rotation["changes"] == ["tls", "node"]
    call(
        server_app, "site", "rotate", rotation["request"], "--fingerprint", rotation["fingerprint"],
        "--home", "srv", "--out", "north.bundle",
    )  # fmt: skip
    call(site_app, *install)

    [listed] = call(server_app, "site", "list", "--home", "srv")
    assert listed["state"] == "approved" and listed["message_key"] == asked["message_key"]
    assert call(server_app, "site", "revoke", "north", "--home", "srv")["state"] == "revoked"
    with pytest.raises(SiteRevoked):
        call(server_app, "site", "renew", "renewal.json", "--home", "srv")

    again = enrol(call, "north", "--new-keys")
    assert again["message_key"] != asked["message_key"]
    call(server_app, *approve, "--fingerprint", again["fingerprint"])
    call(site_app, *install)  # the operator is known by now
    assert call(site_app, "status", "--home", "north")["enrolled"]["consortium"] == "lab"


def test_a_study_goes_from_manifest_to_waiting_for_approvals(call: Any) -> None:
    call(server_app, "init", "lab", "--address", "localhost:8443", "--home", "srv")
    for site in ("north", "south"):
        asked = enrol(call, site)
        call(
            server_app, "site", "approve", asked["request"], "--fingerprint", asked["fingerprint"],
            "--home", "srv", "--out", f"{site}.bundle",
        )  # fmt: skip
    call(server_app, "study", "init", "chest.toml", "--sites", "north,south", "--mode", "plain")
    submitted = call(server_app, "study", "submit", "chest.toml", "--home", "srv")
    assert submitted["missing"] == {"north": "has not approved", "south": "has not approved"}
    shown = call(server_app, "show", "--home", "srv")
    call(site_app, "enrol", "--home", "north", "--bundle", "north.bundle", "--operator", shown["fingerprint"])
    call(site_app, "study", "receive", f"{submitted['directory']}/study.json", "--home", "north")
    approval = call(site_app, "study", "approve", "chest", "--home", "north")["approval"]
    taken = call(server_app, "study", "approval", "chest", "north", approval, "--home", "srv")
    assert taken["missing"] == {"south": "has not approved"}
    assert call(server_app, "study", "list", "--home", "srv")[0]["missing"] == taken["missing"]
    said = {"study": submitted["study"], "state": "waiting", "reason": "", "missing": {}}
    Path("srv/status.json").write_text(json.dumps({"studies": {"chest": said}}))
    [listed] = call(server_app, "study", "list", "--home", "srv")
    assert (listed["state"], listed["missing"]) == ("waiting", taken["missing"])
    Path("srv/status.json").write_text('{"studies": {"chest"')  # half-written by another hand
    assert "state" not in call(server_app, "study", "list", "--home", "srv")[0]
    withdrawn = call(server_app, "study", "approval", "chest", "north", "-", "--home", "srv")
    assert set(withdrawn["missing"]) == {"north", "south"}
    assert call(server_app, "study", "resume", "chest", "--home", "srv") == {"study": "chest"}


@pytest.mark.parametrize("arguments", [("enrol",), ("enrol", "north")])
def test_enrol_without_site_or_data_is_a_usage_error(call: Any, arguments: tuple[str, ...]) -> None:
    with pytest.raises(typer.BadParameter, match="SITE and --data"):
        call(site_app, *arguments)


def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("north/site.json").read_text())
    return found


@pytest.mark.parametrize("more", [(), ("--new-keys",), ("north",), ("north", "--data", "data", "--new-keys")])
def test_enrolling_again_keeps_what_the_hospital_had_set(call: Any, more: tuple[str, ...]) -> None:
    operator = "ab" * 32
    first = ("--epsilon", "5", "--delta", "1e-6", "--base", "big=bases/big", "--operator-key", operator)
    enrol(call, "north", *first)
    before = settings()
    assert (before["epsilon"], before["delta"], before["operator_key"]) == (5.0, 1e-6, operator)
    again = call(site_app, "enrol", "--home", "north", *more)
    assert settings() == before
    assert (again["epsilon"], again["delta"], again["changed"]) == (5.0, 1e-6, [])


def test_a_setting_changes_by_its_option_alone_and_a_weaker_limit_is_called_one(
    call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol(call, "north", "--epsilon", "5", "--base", "big=bases/big")
    before = settings()
    with pytest.raises(SiteHomeInvalid, match="epsilon"):
        enrol(call, "north", "--epsilon", "-1", "--new-keys")
    for key in ("", "ab"):
        with pytest.raises(SiteHomeInvalid, match="64 hex"):
            enrol(call, "north", "--operator-key", key, "--new-keys")
    assert settings() == before
    assert not list(Path("north").glob("keys-until-*"))
    site_app(["enrol", "--home", "north", "--epsilon", "8", "--json"], standalone_mode=False)
    said = capsys.readouterr()
    [change] = json.loads(said.out)["changed"]
    assert change.startswith("ε from 5 to 8, raised: a patient may lose more")
    assert f"changed: {change}" in said.err
    assert settings() == before | {"epsilon": 8.0}
    changed = enrol(
        call, "north", "--epsilon", "2", "--delta", "1e-4", "--base", "big=other", "--operator-key", "ab" * 32
    )["changed"]  # fmt: skip
    assert [line.split(",")[0] for line in changed[:2]] == ["ε from 8 to 2", "δ from 1e-05 to 0.0001"]
    assert "lowered" in changed[0] and "raised" in changed[1]
    assert [line.split()[:2] for line in changed[2:]] == [["base", "big"]]


def test_a_wrong_reason_is_a_usage_error(call: Any) -> None:
    with pytest.raises(typer.BadParameter, match="left, compromised"):
        call(server_app, "site", "revoke", "north", "--reason", "angry", "--home", "srv")
