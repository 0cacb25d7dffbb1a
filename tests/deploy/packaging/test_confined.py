"""The site's containers as confined processes: the compose file's own commands, users, groups and mounts.

Each runs under its user and groups with no capability and no-new-privileges, on a root that is read-only
but for its volumes and /tmp, against a real server with nginx; the agent without any network, gate and relay
in one of their own whose only cable leads to the machine on which the link listens. What a container engine
adds beyond that (images, seccomp, cgroups, name resolution; a link of which only one port can be reached) is
not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.home import list_studies, open_home
from deploy.local.flower import free_port
from tests.deploy.lab import RealConsortium, running
from tests.deploy.packaging.commands import ROOT, composed
from tests.deploy.packaging.networks import attempt, greeter, inside, join, may_make_networks, network

SITE, SITE_USER, RELAY_USER = "north", 10001, 10002
PYTHON = "/usr/bin/python3"
TOOLS = may_make_networks() and all(map(shutil.which, ("nginx", PYTHON)))
LINK_END, RELAY_END, ELSEWHERE = "198.18.5.1", "198.18.5.2", "198.18.6.1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(ROOT.is_relative_to("/tmp"), reason="the services see a /tmp of their own"),
    pytest.mark.skipif(not TOOLS, reason="needs root, util-linux, iproute2, nginx, Debian's Python"),
]


class Confined:
    """The services of a compose file as processes of this machine."""

    def __init__(self, directory: Path, *, way: int) -> None:
        """way: a process in the network that gate and relay share."""
        self.directory, self.way = directory, way
        self.services: dict[str, Any] = composed("site")["services"]
        self.ports = {"link": free_port(), "gate": free_port(), "runtime": free_port()}
        self.folders = {
            "home": (directory / SITE, "/var/lib/fedrad"),
            "relay": (directory / "relay", "/var/lib/fedrad-relay"),
            "socket": (directory / "run", "/run/fedrad"),
        }

    def command(self, name: str) -> list[str]:
        """The service's command with this machine's paths, ports and Python."""
        service = self.services[name]
        words = [*service.get("entrypoint", ["fedrad-site"]), *service["command"]]
        return [word for given in words for word in self._here(name, str(given))]

    def _here(self, name: str, word: str) -> list[str]:
        if word == "fedrad-site":
            return [PYTHON, "-m", "deploy.site.cli"]
        if word == "python":
            return [PYTHON]
        for path, there in sorted(self.folders.values(), key=lambda pair: -len(pair[1])):
            word = word.replace(there, str(path)) if str(self.directory) not in word else word
        near = self.ports["gate"] if name in ("gate", "relay") else self.ports["link"]
        word = word.replace("link:9410", f"{LINK_END}:{self.ports['link']}").replace("9410", str(near))
        return [word.replace("9411", str(self.ports["runtime"]))]

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service confined as the compose file says."""
        service = self.services[name]
        volumes = [volume.split(":") for volume in service.get("volumes", [])]
        writable = [str(self.folders[v[0]][0]) for v in volumes if v[0] in self.folders and v[2:] != ["ro"]]
        return self.run(
            self.command(name), user=int(service["user"].split(":")[0]), writable=writable,
            groups=service.get("group_add", []), network=self._network(service), log=name,
        )  # fmt: skip

    def _network(self, service: dict[str, Any]) -> str:
        """`none`, `way` for the one that leads to the link only, or `host`."""
        mode = service.get("network_mode", "")
        if mode.startswith("service:"):
            return self._network(self.services[mode.removeprefix("service:")])
        if mode == "none":
            return mode
        return "way" if service["networks"] == ["way"] else "host"

    def run(
        self,
        command: list[str],
        *,
        user: int,
        writable: list[str],
        groups: list[str],
        network: str,
        log: str,
    ) -> subprocess.Popen[bytes]:
        mounts = "".join(f"mount --bind {path} {path} && " for path in writable)
        script = (
            f"mount --make-rprivate / && {mounts}mount -t tmpfs tmpfs /tmp && mount -o remount,bind,ro / && "
        )
        who = ["--reuid", str(user), "--regid", str(user)]
        who += ["--groups", ",".join(groups)] if groups else ["--clear-groups"]
        limits = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        script += 'exec setpriv "$@"'
        names = ["--mount", "--net"] if network == "none" else ["--mount"]
        enter = inside(self.way if network == "way" else None)
        with (self.directory / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [*enter, "unshare", *names, "sh", "-c", script, "sh", *who, *limits, "--", *command],
                cwd="/", stdout=output, stderr=output, env=environment(),
            )  # fmt: skip


def environment() -> dict[str, str]:
    """What a container would have, and where the packages are."""
    return {
        "PATH": "/usr/bin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "FEDRAD_PROXY": "none", "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONPATH": f"{ROOT}:{sysconfig.get_paths()['purelib']}",
    }  # fmt: skip


@pytest.fixture()
def directory() -> Iterator[Path]:
    """A folder that every user may pass through, outside /tmp."""
    made = Path(f"/var/tmp/fedrad-confined-{os.getpid()}")
    made.mkdir(mode=0o755)
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def own(path: Path, user: int, group: int, mode: int) -> None:
    for inner in (path, *path.rglob("*")):
        os.chown(inner, user, group)
    path.chmod(mode)


def as_site(confined: Confined, *arguments: str) -> tuple[int, str]:
    """Run a `fedrad-site` command as the site's user would in its container."""
    home = str(confined.folders["home"][0])
    process = confined.run(
        [PYTHON, "-m", "deploy.site.cli", *arguments, "--home", home], user=SITE_USER, writable=[home],
        groups=[], network="host", log="command",
    )  # fmt: skip
    code = process.wait(timeout=180)
    text = (confined.directory / "command.log").read_text()
    (confined.directory / "command.log").unlink()
    return code, text


def test_the_compose_files_services_carry_a_study_confined_as_they_are_there(directory: Path) -> None:
    with network() as way, running(directory, enrolled=(SITE,), patients=12) as consortium:
        join(None, way, addresses=(LINK_END, RELAY_END))
        confined = Confined(directory, way=way)
        assert composed("site")["networks"]["way"] == {"internal": True}
        for name, mode in (("relay", 0o2770), ("run", 0o750)):
            (directory / name).mkdir()
            own(directory / name, SITE_USER, RELAY_USER, mode)
        own(directory / SITE, SITE_USER, SITE_USER, 0o700)
        subprocess.run(["chmod", "--recursive", "a+rX", directory / "data"], check=True)
        consortium.start_server()
        consortium.wait(lambda: consortium.status()["ready"], "the server")

        code, text = as_site(confined, "doctor", "--json")
        findings = {one["check"]: one for one in json.loads(text)["findings"]}
        assert code == 0, text
        for check in ("enrolment", "certificate", "dns", "connection", "tls", "server", "clock", "data"):
            assert findings[check]["state"] == "ok", findings[check]

        for name in ("agent", "link", "handover", "gate", "relay"):
            consortium.processes[f"box-{name}"] = confined.start(name)
        wait(consortium, lambda: consortium.online(SITE), confined)
        consortium.submit("chest", (SITE,), rounds=2)
        wait(consortium, lambda: list_studies(open_home(directory / SITE)), confined)
        code, text = as_site(confined, "study", "approve", "chest")
        assert code == 0, text
        wait(consortium, lambda: consortium.rounds("chest") == 2, confined)

        # what the relay's user cannot do, as that user
        home = directory / SITE
        relay_sees = confined.run(
            ["/bin/sh", "-c", f"cat {home}/site.json || ls {home} || ls {home}/keys"],
            user=RELAY_USER, writable=[], groups=[], network="way", log="intruder",
        )  # fmt: skip
        assert relay_sees.wait(timeout=30) != 0
        assert (directory / "intruder.log").read_text().count("ermission denied") == 3

        # where it cannot go, as that user in that network
        with network() as outside:
            join(None, outside, addresses=("198.18.6.2", ELSEWHERE))
            with greeter(outside, ELSEWHERE) as port:
                assert attempt(None, ELSEWHERE, port) == "hello"
                assert attempt(way, ELSEWHERE, port, user=RELAY_USER) == "ENETUNREACH"
        assert attempt(way, "127.0.0.1", consortium.port, user=RELAY_USER) == "ECONNREFUSED"

        # a gateway with another authority (ten years later, or its files lost): the relay follows by itself
        link = consortium.processes.pop("box-link")
        link.terminate()
        link.wait(timeout=120)
        before = (directory / "relay" / "gateway-ca.pem").read_bytes()
        shutil.rmtree(home / "run" / "gateway")
        consortium.processes["box-link"] = confined.start("link")
        wait(consortium, lambda: (directory / "relay" / "gateway-ca.pem").read_bytes() != before, confined)
        wait(consortium, lambda: consortium.online(SITE) and gateway_connections(home) > 0, confined)


def gateway_connections(home: Path) -> int:
    try:
        return int(json.loads((home / "run" / "link.json").read_text())["connections"])
    except (OSError, ValueError, KeyError):
        return 0


def wait(consortium: RealConsortium, ready: Any, confined: Confined) -> None:
    until = time.monotonic() + 300
    while not ready():
        for name, process in consortium.processes.items():
            if process.poll() is not None:
                log = confined.directory / f"{name.removeprefix('box-')}.log"
                pytest.fail(f"{name} ended {process.returncode}: {log.read_text()[-3000:]}")
        if time.monotonic() > until:
            logs = {p.name: p.read_text()[-1200:] for p in confined.directory.glob("*.log")}
            pytest.fail(json.dumps({"status": consortium.status(), "logs": logs}, indent=1))
        time.sleep(0.3)
