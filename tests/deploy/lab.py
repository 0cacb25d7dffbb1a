"""A real consortium on loopback for slow tests: `fedrad-server up` with nginx, `fedrad-site up` per site."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.enrolment import install_bundle, request_enrolment
from client.home import SiteHome, approve_study, create_home, list_studies, open_home
from common.enrolment import fingerprint_of
from common.ledger.entries import RevocationReason
from common.model.tiny import tiny_base_directory
from deploy.local.flower import free_port
from deploy.local.guardian import marked_processes
from deploy.local.synthetic import write_synthetic_sites
from deploy.server.app import NODES_NAME, read_nodes
from server.consortium import ServerHome, create_server_home, open_server_home
from server.enrolment import approve, revoke
from server.studies import study_template
from server.submission import Submitted, submit_study

ROOT = Path(__file__).parents[2]


@dataclass
class RealConsortium:
    """Directories and processes of one consortium; `running` makes and ends it."""

    directory: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    server_name: str = "srv"  # another one after a restore

    @property
    def server_directory(self) -> Path:
        return self.directory / self.server_name

    @property
    def server(self) -> ServerHome:
        return open_server_home(self.server_directory)

    def home(self, site: str) -> SiteHome:
        return open_home(self.directory / site)

    def enrol(self, site: str, *, base: tuple[str, Path] | None = None, epsilon: float = 20.0) -> SiteHome:
        server, now = self.server, datetime.now(UTC)
        home = create_home(
            self.directory / site,
            site=site,
            operator_key=server.message_key().public,
            data=self.directory / "data" / site,
            bases=dict([base or ("tiny", tiny_base_directory())]),
            epsilon=epsilon,
        )
        request = request_enrolment(home, software="fedrad 0.1.0", now=now)
        signed = approve(
            server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=now
        )
        install_bundle(home, signed)
        return home

    def revoke(self, site: str) -> None:
        server = self.server
        revoke(server, server.authority(), site, reason=RevocationReason.COMPROMISED, now=datetime.now(UTC))

    def submit(self, name: str, sites: tuple[str, ...], *, rounds: int, **changes: object) -> Submitted:
        """Submit a small seeded plain study; keyword arguments replace `key = value` lines."""
        text = study_template(id=name, base="tiny", sites=sites, mode="plain", rounds=rounds, patients=40)
        for key, value in {"sampling_rate": 0.3, "resamples": 50, "deadline_s": 120, **changes}.items():
            text, found = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", text)
            assert found == 1, key
        text += "\n[testing]\nseed = 3\n"
        return submit_study(self.server, text, source="test", base=tiny_base_directory())

    def approve(self, site: str) -> None:
        """Approve at the site whatever it has received; its link carries the approval."""
        self.wait(lambda: list_studies(self.home(site)), f"a study at {site}")
        for sha256 in list_studies(self.home(site)):
            approve_study(self.home(site), sha256)

    def start_server(self, *arguments: str, **more: str) -> None:
        self._start(
            "srv", "deploy.server.cli", "up", "--home", str(self.server_directory),
            *("--superlink-port", "0", "--api-port", "0", "--listen", f"127.0.0.1:{self.port}"), *arguments,
            **more,
        )  # fmt: skip

    def start_site(self, site: str, *arguments: str, python: str = sys.executable, **more: str) -> None:
        self._start(
            site, "deploy.site.cli", "up", "--home", str(self.directory / site), *arguments,
            python=python, **more,
        )  # fmt: skip

    def _start(self, name: str, *arguments: str, python: str = sys.executable, **more: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [python, "-m", *arguments],
                cwd=ROOT,
                env={**kept, "OMP_NUM_THREADS": "1", **more},
                stdout=log,
                stderr=log,
            )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, self.log(name)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()[-3000:]

    def status(self) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self.server_directory / "status.json").read_text())
        except FileNotFoundError:
            return {"sites": {}, "studies": {}, "programs": {}, "ready": False}
        return value

    def online(self, *sites: str) -> bool:
        known = self.status()["sites"]
        return all(known.get(site, {}).get("online") for site in sites)

    def study_state(self, name: str) -> str:
        return str(self.status()["studies"].get(name, {}).get("state", ""))

    def study_nodes(self, name: str) -> dict[str, int]:
        """Return the nodes that a study may speak to now."""
        return read_nodes(self.server_directory / "studies" / name / NODES_NAME)

    def events(self, study: str) -> list[dict[str, Any]]:
        path = self.server_directory / "studies" / study / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rounds(self, study: str) -> int:
        return sum(event["event"] == "round" for event in self.events(study))

    def wait(self, ready: Callable[[], Any], what: str, *, timeout_s: float = 240.0) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended: {self.log(name)}"
            assert time.monotonic() < end, f"expected {what}: {json.dumps(self.status(), indent=1)}"
            time.sleep(0.2)

    def environments(self) -> dict[str, dict[str, str]]:
        """Return the environment of every process of this consortium by its command line."""
        found = {}
        for pid in self.left_over():
            with contextlib.suppress(OSError):
                pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                found[command] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return found

    def pids(self, program: str) -> list[int]:
        """Return the processes of this consortium whose command line names a program."""
        found = []
        for pid in self.left_over():
            with contextlib.suppress(OSError):
                if program in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def left_over(self) -> list[int]:
        """Return the processes of this consortium's supervisors that are still there."""
        tokens = [path.read_text() for path in self.directory.glob("*/*/supervisor.token")]
        return [pid for token in tokens for pid in marked_processes(token)]


def listening_addresses(pids: set[int]) -> set[str]:
    """Return the local IPv4 and IPv6 addresses on which these processes accept connections."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                words = bytes.fromhex(fields[1].split(":")[0])
                turned = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, turned))
    return found


@contextlib.contextmanager
def running(
    directory: Path,
    *,
    enrolled: tuple[str, ...],
    patients: int = 24,
    base: tuple[str, Path] | None = None,
    epsilon: float = 20.0,
) -> Iterator[RealConsortium]:
    """Make a consortium whose sites have synthetic data; the caller starts what it wants."""
    consortium = RealConsortium(directory, free_port())
    create_server_home(
        directory / "srv", consortium="lab", address=f"localhost:{consortium.port}", now=datetime.now(UTC)
    )
    write_synthetic_sites(
        directory / "data", sites=enrolled, patients=dict.fromkeys(enrolled, patients), seed=77
    )
    for site in enrolled:
        consortium.enrol(site, base=base, epsilon=epsilon)
    try:
        yield consortium
    finally:
        for process in consortium.processes.values():
            process.terminate()
        for process in consortium.processes.values():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        end = time.monotonic() + 20
        while consortium.left_over() and time.monotonic() < end:
            time.sleep(0.1)
        assert not consortium.left_over()
