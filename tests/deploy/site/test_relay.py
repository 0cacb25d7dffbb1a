"""The relay's two programs: what they get to know, and as whom they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.home import create_home
from common.errors import EngineFailed
from deploy.local.flower import CARRIER_MEMORY
from deploy.site.relay import Relay, account_of, give_relay_files, relay_programs
from deploy.site.up import SiteOptions, _Layout, verify_closed
from deploy.supervision import Account
from tests.deploy.lab import ROOT, RealConsortium, running

NOBODY = "nobody"
SYSTEM_PYTHON = "/usr/bin/python3"


def relay(directory: Path) -> Relay:
    return Relay(
        directory=directory, site="north", gateway_port=1, runtime_port=2, agent="unix:///run/agent.sock"
    )


def test_the_relay_gets_its_own_files_and_a_small_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDRAD_PROXY", "http://user:s3cret@proxy:3128")
    monkeypatch.setenv("HOSPITAL_DATABASE", "s3cret")
    made = relay(tmp_path / "relay")
    assert give_relay_files(made, node_key=b"key", gateway_authority=b"ca")
    assert not give_relay_files(made, node_key=b"key", gateway_authority=b"ca")
    assert give_relay_files(made, node_key=b"new", gateway_authority=b"ca")
    programs = relay_programs(made)
    assert [program.name for program in programs] == ["supernode", "superexec"]
    for program in programs:
        assert "s3cret" not in " ".join([*program.command, *program.environment.values()])
        assert "FEDRAD_PROXY" not in program.environment
        assert program.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert CARRIER_MEMORY.items() <= program.environment.items()
        assert program.environment["HOME"].startswith(str(made.directory))
    assert "client.app:app" in programs[1].command
    for path in made.directory.rglob("*"):
        assert path.is_dir() or path.suffix in (".crt", ".pem") or path.stat().st_mode & 0o077 == 0, path


def test_a_relay_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="relay-files"):
        relay_programs(relay(tmp_path / "relay"))


@pytest.mark.parametrize(("name", "words"), [("no-such-user", "an account"), ("root", "without rights")])
def test_a_relay_user_must_be_an_account_without_rights(name: str, words: str) -> None:
    with pytest.raises(EngineFailed, match=words):
        account_of(name)


@pytest.mark.parametrize("mode", [0o701, 0o704, 0o755, 0o777])
def test_a_folder_that_the_relays_user_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    account = account_of(NOBODY)
    tmp_path.chmod(0o700)
    verify_closed(tmp_path, account, NOBODY)
    tmp_path.chmod(mode)
    with pytest.raises(EngineFailed, match="chmod 700"):
        verify_closed(tmp_path, account, NOBODY)


def test_the_relays_own_group_counts(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    verify_closed(tmp_path, Account(65534, 65534), NOBODY)
    with pytest.raises(EngineFailed, match="0750"):
        verify_closed(tmp_path, Account(65534, tmp_path.stat().st_gid), NOBODY)


@pytest.mark.skipif(os.geteuid() != 0, reason="as root it would go on")
def test_two_users_need_another_user_than_the_sites(tmp_path: Path) -> None:
    home = create_home(tmp_path / "north", site="north", operator_key="", data=tmp_path, bases={})
    os.chown(home.directory, 65534, 65534)
    with pytest.raises(EngineFailed, match="another user"):
        _Layout.of(home, SiteOptions(relay_user=NOBODY))


@pytest.fixture()
def open_directory() -> Iterator[Path]:
    """A folder below /tmp that every user may pass through (pytest's own are closed)."""
    directory = Path(f"/tmp/fedrad-two-users-{os.getpid()}")
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, user=NOBODY, group="nogroup", extra_groups=[], capture_output=True, text=True
    )


def pid_of(site: Path, program: str) -> int:
    found = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and program in (command := _command(entry))
        and (str(site) in command or str(site.with_name(site.name + "-relay")) in command)
    ]
    return found[0]


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
@pytest.mark.skipif(not Path(SYSTEM_PYTHON).exists(), reason="needs a Python that nobody may run")
def test_the_relays_user_serves_a_study_and_can_open_neither_data_nor_keys(open_directory: Path) -> None:
    with running(open_directory, enrolled=("north", "south")) as consortium:
        _serve_as_two_users(consortium)


def _serve_as_two_users(consortium: RealConsortium) -> None:
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    consortium.start_server()
    consortium.start_site("south")
    (consortium.directory / "data" / "north").chmod(0o700)
    consortium.start_site(
        "north", "--relay-user", NOBODY, python=SYSTEM_PYTHON,
        PYTHONPATH=os.pathsep.join([str(ROOT), packages]),
    )  # fmt: skip
    consortium.submit("chest", ("north", "south"), rounds=2)
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end", timeout_s=400)
    rounds = [event for event in consortium.events("chest") if event["event"] == "round"]
    assert [event["cohort"] for event in rounds] == [["north", "south"]] * 2

    home = consortium.directory / "north"
    for program in ("client.supernode", "deploy.local.executor"):
        pid = pid_of(home, program)
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        assert fields["Uid"].split() == ["65534"] * 4, program
        assert int(fields["CapEff"], 16) == 0 and fields["Groups"].split() == []
    secrets = [
        *(home / "keys").iterdir(),
        home / "site.json",
        home / "budget.jsonl",
        home / "run" / "gateway" / "server.key",
        Path(f"/proc/{pid_of(home, 'client.cli agent')}/environ"),
        Path(f"/proc/{pid_of(home, 'client.cli agent')}/mem"),
    ]
    images = sorted((consortium.directory / "data" / "north").rglob("*.png"))[:3]
    for path in (*secrets, *images, consortium.directory / "data" / "north" / "pairs.jsonl"):
        done = as_nobody("cat", str(path))
        assert done.returncode != 0 and "denied" in done.stderr and not done.stdout, path
    own = consortium.directory / "north-relay" / "node.key"
    assert "PRIVATE" in as_nobody("cat", str(own)).stdout
