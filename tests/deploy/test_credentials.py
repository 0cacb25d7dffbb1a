"""Keys out of systemd's credential directory instead of `keys/`, on both sides, on plain processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.home import list_studies
from tests.deploy.lab import ROOT, RealConsortium, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


def give(directory: Path, *names: str) -> Path:
    """Move keys out of `keys/` to where systemd would show them to the unit."""
    credentials = directory.with_name(f"{directory.name}-credentials")
    credentials.mkdir(mode=0o700)
    for name in names:
        (directory / "keys" / name).rename(credentials / f"fedrad-{name}")
        (credentials / f"fedrad-{name}").chmod(0o400)
    return credentials


def approve(consortium: RealConsortium, site: str, credentials: str) -> subprocess.CompletedProcess[str]:
    """Approve the study as its site's engineer does, in a shell of its own."""
    command = ["client.cli", "study", "approve", "chest", "--home", str(consortium.directory / site)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CREDENTIALS_DIRECTORY": credentials}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_study_runs_on_credentials_alone(tmp_path: Path) -> None:
    with running(tmp_path, enrolled=("north", "south")) as consortium:
        consortium.submit("chest", ("north", "south"), rounds=2)
        held = {
            site: give(tmp_path / site, "message.key", "witness.key", "tls.key", "node.key")
            for site in ("north", "south")
        }
        held["srv"] = give(tmp_path / "srv", "message.key", "superexec.secret")
        for name in held:
            assert list((tmp_path / name / "keys").iterdir()) == []
        consortium.start_server(CREDENTIALS_DIRECTORY=str(held["srv"]))
        for site in ("north", "south"):
            consortium.start_site(site, CREDENTIALS_DIRECTORY=str(held[site]))
        for site in ("north", "south"):
            consortium.wait(lambda site=site: list_studies(consortium.home(site)), f"a study at {site}")
        without = approve(consortium, "north", "")
        assert without.returncode == 1 and "error: KeyFileInvalid" in without.stderr
        for site in ("north", "south"):
            assert approve(consortium, site, str(held[site])).returncode == 0
        consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end")
        for name in held:
            assert list((tmp_path / name / "keys").iterdir()) == []
