"""A newcomer's path: the operator's and the site's guide, followed word for word to a finished study.

Every `sh` block under a `<!-- step N role -->` comment is run in the order of N as its role, in its own home,
with nothing changed but the site's id on the second site. What people say on the telephone is taken from the
other side's terminal and typed in.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from client.home import list_studies, open_home, read_study
from server.checkpoint import read_records
from tests.client.data.site_folder import make_site, rows

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"<!-- step (\d+) (operator|site)( per-site)? -->\n```sh\n(.*?)```", re.DOTALL)
FINGERPRINT = re.compile(r"(?:[0-9a-f]{4} ){7}[0-9a-f]{4}")
SITES = ("north", "south")


@dataclass(frozen=True)
class Step:
    number: int
    role: str
    per_site: bool
    script: str


def steps() -> list[Step]:
    found = []
    for guide in ("operator-guide.md", "site-guide.md"):
        for number, role, per_site, script in STEP.findall((ROOT / "docs" / guide).read_text()):
            found.append(Step(int(number), role, bool(per_site), script))
    return sorted(found, key=lambda step: step.number)


@dataclass
class World:
    """One home per person, one mail folder, and what each one's terminal has shown."""

    directory: Path
    screens: dict[str, str] = field(default_factory=dict)
    background: list[int] = field(default_factory=list)

    def run(self, step: Step, person: str, site: str) -> None:
        script = step.script.replace("north", site) if step.role == "site" or step.per_site else step.script
        home = self.directory / person
        home.mkdir(exist_ok=True)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "HOME": str(home),
            "MAIL": str(self.directory / "mail"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        screen = home / f"step-{step.number}.txt"
        with screen.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=home, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            self.background.append(process.pid)
            process.communicate(self._heard(person, site).encode(), timeout=900)
        text = screen.read_text()
        self.screens[person] = self.screens.get(person, "") + text
        assert process.returncode == 0, f"step {step.number} as {person}:\n{script}\n{text}"

    def _heard(self, person: str, site: str) -> str:
        """Return what the other side reads out: the last fingerprint on its terminal."""
        other = site if person == "operator" else "operator"
        said = FINGERPRINT.findall(self.screens.get(other, ""))
        return f"{said[-1]}\n" if said else "\n"

    def end(self) -> None:
        for leader in self.background:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(leader, number)
                except ProcessLookupError:
                    break
                for _ in range(200):
                    if not _group_lives(leader):
                        break
                    time.sleep(0.1)


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_steps_of_both_guides_are_one_path() -> None:
    numbers = [step.number for step in steps()]
    assert numbers == list(range(1, 13))
    assert {step.role for step in steps()} == {"operator", "site"}


@pytest.fixture()
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    (tmp_path / "mail").mkdir()
    for number, site in enumerate(SITES):
        table = [
            {**row, "patient": f"{row['patient']}-{number}", "accession": f"{row['accession']}-{number}"}
            for row in rows(30)
        ]
        make_site(tmp_path / site / "export", table)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
def test_a_newcomer_reaches_a_finished_study(world: World) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8443)) == 0:
            pytest.skip("port 8443, which the guides use, is taken on this machine")
    for step in steps():
        if step.role == "site":
            for site in SITES:
                world.run(step, site, site)
        elif step.per_site:
            for site in SITES:
                world.run(step, "operator", site)
        else:
            world.run(step, "operator", "north")
    records = read_records(world.directory / "operator" / ".fedrad-server" / "studies" / "chest")
    assert len(records) == 3
    for site in SITES:
        home = open_home(world.directory / site / ".fedrad-site")
        [sha256] = list_studies(home)
        assert read_study(home, sha256).privacy.mode.value == "consortium"
        assert "is connected to localhost:8443" in world.screens[site]
        assert "3 of 3 rounds are done" in world.screens[site]
    assert "finished" in world.screens["operator"]
