"""`fedrad-site up`: agent, link and relay as separate processes, kept up.

    agent       data, keys, budget, base model            the site's user
    link        TLS key; the only one with a network way  the site's user
    supernode   Flower's node key, loopback only          the relay's user
    superexec   FedRad's ClientApp, loopback only         the relay's user

Guarantees: each is started again when it ends; all end with SIGTERM and with a kill -9 of this process; with
`--relay-user` (this process is root then) the relay's user is not the site's and can open neither data nor
keys. It needs no port open to the outside, in or out, but the one to the server or the proxy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import deploy
from client.enrolment import node_key_path, read_enrolled
from client.heartbeat import whoami
from client.home import SiteHome
from common.errors import EngineFailed
from common.files import write_atomic
from common.logs import start_json_log
from deploy.local.flower import free_port
from deploy.site.relay import Relay, account_of, give_relay_files, relay_programs
from deploy.supervision import Account, Bearing, Program, Supervisor, supervisor

log = logging.getLogger("fedrad.up")

STATUS_NAME = "up.json"
_TICK_S = 0.5
_MAX_SOCKET_PATH = 100


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """How a site is run; ports of 0 are chosen free."""

    relay_user: str = ""
    relay_directory: Path | None = None
    run_directory: Path | None = None
    gateway_port: int = 0
    runtime_port: int = 0
    proxy: str = "none"


def run_site(home: SiteHome, options: SiteOptions, *, stop: threading.Event) -> None:
    """Run the whole site until `stop` is set; raises SiteNotEnrolled, EngineFailed, EngineBusy."""
    read_enrolled(home)
    layout = _Layout.of(home, options)
    with supervisor(home.directory / "run", logs=home.directory / "logs") as programs:
        handler = start_json_log(home.directory / "logs" / "up.jsonl")
        try:
            _Site(home, options, layout, programs).run(stop)
        finally:
            logging.getLogger("fedrad").removeHandler(handler)
            handler.close()


@dataclass(frozen=True)
class _Layout:
    """Where the relay's folder and the agent's socket are, and who runs what."""

    relay: Path
    socket: Path
    site: Account | None
    account: Account | None

    @classmethod
    def of(cls, home: SiteHome, options: SiteOptions) -> _Layout:
        directory = home.directory
        if not options.relay_user:
            relay = options.relay_directory or directory / "relay"
            run = options.run_directory or directory / "run"
            return cls(relay, _socket(run), None, None)
        if os.geteuid() != 0:
            raise EngineFailed(
                "--relay-user: expected to be started by root, which can be two users, got another; "
                "or start `fedrad-site agent`, `link` and `relay` by their own users (docs/site-guide.md)"
            )
        account = account_of(options.relay_user)
        owner = directory.stat()
        if owner.st_uid == account.uid:
            raise EngineFailed(f"--relay-user: expected another user than the one that owns {directory}")
        for path in (directory, home.data):
            verify_closed(path, account, options.relay_user)
        relay = options.relay_directory or directory.with_name(directory.name + "-relay")
        run = options.run_directory or directory.with_name(directory.name + "-run")
        run.mkdir(mode=0o750, parents=True, exist_ok=True)
        os.chown(run, owner.st_uid, account.gid)
        run.chmod(0o750)
        if owner.st_uid == 0:
            log.warning("the site's directory belongs to root: agent and link run as root")
        site = Account(owner.st_uid, owner.st_gid, (account.gid,))
        return cls(relay, _socket(run), site, account)


class _Site:
    """One running site."""

    def __init__(self, home: SiteHome, options: SiteOptions, layout: _Layout, programs: Supervisor) -> None:
        self._home, self._options, self._layout, self._programs = home, options, layout, programs
        self._gateway_port = options.gateway_port or free_port()
        self._relay = Relay(
            directory=layout.relay.absolute(),
            site=home.site,
            gateway_port=self._gateway_port,
            runtime_port=options.runtime_port or free_port(),
            agent=f"unix://{layout.socket.absolute()}",
            account=layout.account,
        )
        self._relaying = False
        self._status_path = home.directory / "run" / STATUS_NAME
        self._written = b""

    def run(self, stop: threading.Event) -> None:
        self._programs.start(self._agent())
        self._programs.start(self._link())
        bearing = Bearing()
        try:
            while not stop.wait(_TICK_S):
                with bearing.bear():
                    ended = self._programs.tick()
                    self._follow_relay("link" in ended)
                    self._write_status()
        finally:
            with contextlib.suppress(OSError):
                self._status_path.unlink(missing_ok=True)

    def _follow_relay(self, link_ended: bool) -> None:
        """Start the relay when its way out is there; start it anew when its keys have changed."""
        authority = self._home.directory / "run" / "gateway" / "ca.crt"
        if not authority.is_file() or self._programs.pid("link") is None or link_ended:
            return
        changed = give_relay_files(
            self._relay,
            node_key=node_key_path(self._home).read_bytes(),
            gateway_authority=authority.read_bytes(),
        )
        if not self._relaying:
            for program in relay_programs(self._relay):
                self._programs.start(program)
            self._relaying = True
        elif changed:
            log.info("the relay gets new keys")
            self._programs.restart("supernode")

    def _agent(self) -> Program:
        group = ("--socket-group", str(self._layout.account.gid)) if self._layout.account else ()
        return self._own(
            "agent",
            "client.cli",
            *("agent", "--home", str(self._home.directory.absolute())),
            *("--socket", str(self._layout.socket.absolute()), *group),
        )

    def _link(self) -> Program:
        return self._own(
            "link",
            "deploy.site.cli",
            *("link", "--home", str(self._home.directory.absolute()), "--port", str(self._gateway_port)),
            FEDRAD_PROXY=self._options.proxy,  # it may hold a password: no argument
        )

    def _own(self, name: str, module: str, *arguments: str, **more: str) -> Program:
        root = str(Path(deploy.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **more,
        }
        return Program(name, [sys.executable, "-m", module, *arguments], environment, self._layout.site)

    def _write_status(self) -> None:
        value = {
            "site": self._home.site,
            "programs": self._programs.state(),
            "socket": str(self._layout.socket),
            **whoami(),
        }
        data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
        if data != self._written:
            write_atomic(self._status_path, data)
            self._written = data
        else:
            with contextlib.suppress(OSError):
                os.utime(self._status_path)


def run_relay(relay: Relay, *, stop: threading.Event) -> None:
    """Run SuperNode and executor alone, as the user that this process has (systemd, containers)."""
    with supervisor(relay.directory / "run", logs=relay.directory / "logs") as programs:
        for program in relay_programs(relay):
            programs.start(program)
        while not stop.wait(_TICK_S):
            programs.tick()


def verify_closed(path: Path, account: Account, name: str) -> None:
    """Raise EngineFailed unless the folder can be entered neither by everybody nor by this account."""
    found = path.stat()
    bits = 0o007
    if found.st_gid == account.gid:
        bits |= 0o070
    if found.st_uid == account.uid or found.st_mode & bits:
        raise EngineFailed(
            f"{path}: expected a folder that {name} cannot enter, got mode {found.st_mode & 0o777:04o}; "
            "`chmod 700` it"
        )


def _socket(run: Path) -> Path:
    path = run / "agent.sock"
    if len(str(path.absolute())) > _MAX_SOCKET_PATH:
        raise EngineFailed(
            f"{path}: expected a socket path of at most {_MAX_SOCKET_PATH} characters; choose --run-dir"
        )
    return path
