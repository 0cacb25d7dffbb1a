"""`fedrad-server up`: SuperLink, SuperExec, the sites' endpoint and the proxy, kept up; studies started.

Everything but the proxy listens on loopback. Guarantees: TLS from end to end, node keys only of approved
sites (a revoked site's node is put out within seconds), process isolation with the SuperExec secret, no
telemetry, no code from outside; SIGTERM ends it cleanly, kill -9 leaves no process, and the same command
goes on with every study where it was. What it knows is in `status.json`, what happened in `logs/up.jsonl`.

It trusts whoever can run a process on this machine with the network of loopback: Flower's Control API has no
authentication, so the server's machine or container is the operator's alone.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx

import deploy
from common.certificates import Authority
from common.errors import ConsortiumInvalid, EngineFailed, FedRadError, ListenAddressInvalid
from common.files import write_atomic
from common.logs import start_json_log
from common.metrics_page import parse_listen
from deploy import tethered
from deploy.local.certificates import LoopbackTls, write_loopback_tls
from deploy.local.control import Control
from deploy.local.flower import Tuning, flower_environment, flower_program, free_port
from deploy.proxy.files import read_by, write_door
from deploy.proxy.render import Door, KnownNode
from deploy.server.endpoint import SiteEndpoint
from deploy.server.runs import StudyRuns
from deploy.supervision import RESTLESS_ENDS, Bearing, Program, Supervisor, supervisor
from server.connections import STATUS_NAME
from server.consortium import ServerHome, renew_server_certificate, utc_now
from server.enrolment import RegisteredSite, SiteState, read_sites, refresh_crl
from server.submission import broken_studies

log = logging.getLogger("fedrad.up")

_HOST = "127.0.0.1"
_TICK_S = 0.5
_RECONCILE_S = 10.0
_DAILY_S = 86_400.0
_START_S = 120.0
_FREE_S = 15.0  # in which a door that was just ended lets go of its port
_TUNING = Tuning(task_poll_s=0.2)


class Proxy(StrEnum):
    NGINX = "nginx"
    CADDY = "caddy"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where things listen; a port of 0 is chosen free. `listen` is the proxy's HOST:PORT."""

    listen: str
    proxy: Proxy = Proxy.NGINX
    superlink_port: int = 9400
    api_port: int = 9401


def run_server(
    home: ServerHome,
    authority: Authority,
    listening: Listening,
    *,
    stop: threading.Event,
    clock: Callable[[], datetime.datetime] = utc_now,
) -> None:
    """Run the consortium's server until `stop` is set; raises EngineBusy, ConsortiumInvalid."""
    logs = home.directory / "logs"
    with supervisor(home.directory / "state", logs=logs) as programs:
        handler = start_json_log(logs / "up.jsonl")
        try:
            server = _Server(home, authority, listening, programs, clock)
            with server.running():
                bearing = Bearing()
                while not stop.wait(_TICK_S):
                    with bearing.bear():
                        server.tick()
        finally:
            logging.getLogger("fedrad").removeHandler(handler)
            handler.close()


class _Server:
    """One running server: its programs, what it knows of sites, studies and time."""

    def __init__(
        self,
        home: ServerHome,
        authority: Authority,
        listening: Listening,
        programs: Supervisor,
        clock: Callable[[], datetime.datetime],
    ) -> None:
        self._home, self._authority, self._programs, self._clock = home, authority, programs, clock
        self._state = home.directory / "state"
        self._proxy = listening.proxy
        lifetime = datetime.timedelta(days=3650)  # of this process: the authority's key is never written
        self._tls: LoopbackTls = write_loopback_tls(self._state / "tls", now=clock(), lifetime=lifetime)
        self._endpoint = SiteEndpoint(home, authority, port=listening.api_port, clock=clock)
        self._address = f"{_HOST}:{listening.superlink_port or free_port()}"
        self._door = Door(
            listen=listening.listen,
            state=home.directory.absolute() / "proxy",
            logs=(home.directory / "logs").absolute(),
            certificate=home.certificate.absolute(),
            key=home.certificate_key.absolute(),
            authority=(home.authority_directory / "ca.crt").absolute(),
            crl=home.crl.absolute(),
            internal_authority=self._tls.authority.absolute(),
            superlink_port=int(self._address.rpartition(":")[2]),
            api_port=self._endpoint.port,
        )
        self._control = Control(self._address, self._tls.authority)
        self._runs = StudyRuns(home, self._control)
        self._sites: dict[str, RegisteredSite] = {}
        self._nodes: dict[str, int] = {}
        self._online: set[int] = set()
        self._studies: Mapping[str, object] = {}
        self._warnings: dict[str, str] = {}
        self._seen: object = None
        self._door_read = b""
        self._reconciled = self._daily = -1e9
        self._ready = False
        self._started = time.monotonic()
        self._written = b""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start everything; on leaving, stop what this process itself serves."""
        if self._proxy is not Proxy.NONE:
            verify_free(self._door.listen, within_s=_FREE_S)
        renew_server_certificate(self._home, self._authority, now=self._clock())
        refresh_crl(self._home, self._authority, now=self._clock())
        self._daily = time.monotonic()
        self._sites = read_sites(self._home)
        self._endpoint.start()
        try:
            self._write_door()
            self._programs.start(self._superlink())
            if self._proxy is not Proxy.NONE:
                self._door_read = read_by(self._door, caddy=self._proxy is Proxy.CADDY)
                self._programs.start(self._door_program())
            yield
        finally:
            self._endpoint.stop()
            self._control.close()
            with contextlib.suppress(OSError):
                self._write_end()

    def tick(self) -> None:
        """Keep programs up, the registry in force, and studies moving; a busy SuperLink is asked again."""
        ended = self._programs.tick()
        if "superlink" in ended:
            self._ready = False
        self._follow_registry()
        self._follow_time()
        studies: Mapping[str, object] = {}
        try:
            if not self._ready:
                self._ready = self._become_ready()
            if self._ready:
                self._reconcile()
                studies = self._runs.tick(self._nodes)
            self._warnings.pop("superlink", None)
        except (httpx.HTTPError, EngineFailed) as error:
            if time.monotonic() - self._started > _START_S:
                self._warnings["superlink"] = f"no answer from the SuperLink: {type(error).__name__}"
        except FedRadError as error:
            self._warnings["studies"] = f"{error.code}: {error}"
        self._studies = studies
        self._write_status()

    # --- the registry in force ----------------------------------------------------------------------------

    def _follow_registry(self) -> None:
        """Take a changed registry or revocation list to the proxy, and soon after to Flower."""
        seen = tuple(
            (str(path), path.stat().st_mtime_ns)
            for path in (*sorted(self._home.sites.glob("*.json")), self._home.crl)
            if path.exists()
        )
        if seen == self._seen:
            return
        self._sites = read_sites(self._home)
        self._reconciled = -1e9
        self._write_door()
        self._reload_door()
        self._seen = seen

    def _reconcile(self) -> None:
        """Make Flower's registered nodes those of the approved sites, and note who is connected."""
        if time.monotonic() - self._reconciled < _RECONCILE_S:
            return
        wanted = {site.node_key.encode(): name for name, site in self._approved().items()}
        known = self._control.nodes()
        for node, key in known.items():
            if key not in wanted:
                self._control.unregister_node(node)
                log.info("a node is put out")
        registered = {wanted[key]: node for node, key in known.items() if key in wanted}
        for key, name in wanted.items():
            if name not in registered:
                try:
                    registered[name] = self._control.register_node(key, name=name)
                    self._warnings.pop(f"node {name}", None)
                    log.info("the node of %s is registered", name, extra={"site": name})
                except (httpx.HTTPStatusError, EngineFailed):
                    self._warnings[f"node {name}"] = (
                        f"Flower does not take the node key of {name} again: ask for `fedrad-site rotate`"
                    )
        self._nodes = registered
        self._online = self._control.online_nodes()
        write_atomic(self._state / "nodes.json", json.dumps(registered, sort_keys=True).encode())
        self._reconciled = time.monotonic()

    def _approved(self) -> dict[str, RegisteredSite]:
        return {n: site for n, site in self._sites.items() if site.state is SiteState.APPROVED}

    def _become_ready(self) -> bool:
        """Tell whether the SuperLink answers; what must follow its start is done then."""
        if not self._control.is_up():
            return False
        if "superexec" not in self._programs.state():
            self._runs.forget_flower_runs()
            self._programs.start(self._superexec())
        self._reconciled = -1e9
        return True

    # --- certificates -------------------------------------------------------------------------------------

    def _follow_time(self) -> None:
        """Once a day: the server's own certificate when it is due, and a fresh revocation list."""
        if time.monotonic() - self._daily < min(_DAILY_S, self._home.policy.certificate_days * _DAILY_S / 20):
            return
        if renew_server_certificate(self._home, self._authority, now=self._clock()):
            log.info("the server certificate was renewed")
        refresh_crl(self._home, self._authority, now=self._clock())
        self._daily = time.monotonic()
        self._seen = None

    # --- programs -----------------------------------------------------------------------------------------

    def _superlink(self) -> Program:
        return self._flower(
            "superlink",
            (sys.executable, "-m", "deploy.server.superlink", str(self._home.policy.clock_skew_s)),
            *("--ssl-ca-certfile", str(self._tls.authority.absolute())),
            *("--ssl-certfile", str(self._tls.certificate.absolute())),
            *("--ssl-keyfile", str(self._tls.key.absolute())),
            *("--host", _HOST, "--port", self._address.rpartition(":")[2]),
            *("--database", str((self._state / "superlink.db").absolute()), "--enable-supernode-auth"),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(self._home.superexec_secret.absolute())),
            "--disable-runtime-dependency-installation",
        )

    def _superexec(self) -> Program:
        return self._flower(
            "superexec",
            (flower_program("flower-superexec"),),
            *("--runtime-api-address", self._address),
            *("--root-certificates", str(self._tls.authority.absolute())),
            *("--superexec-auth-secret-file", str(self._home.superexec_secret.absolute())),
        )

    def _flower(self, name: str, program: tuple[str, ...], *arguments: str) -> Program:
        home = (self._state / "homes" / name).absolute()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = (Path(deploy.__file__).parents[1],)
        return Program(name, [*program, *arguments], flower_environment(home, path, _TUNING))

    def _door_program(self) -> Program:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._door.state)}
        binary = find_proxy(self._proxy)
        if self._proxy is Proxy.NGINX:
            command = [binary, "-p", str(self._door.state), "-c", str(self._door.state / "nginx.conf")]
        else:
            command = [
                binary,
                "run",
                "--adapter",
                "caddyfile",
                "--config",
                str(self._door.state / "Caddyfile"),
            ]
        tether = [sys.executable, "-I", "-S", tethered.__file__, str(os.getpid())]
        return Program("proxy", [*tether, *command], environment)

    def _write_door(self) -> None:
        nodes = [KnownNode(name, site.node_key) for name, site in self._approved().items()]
        revoked = [
            int(one.serial, 16) for site in self._sites.values() for one in site.certificates if one.revoked_s
        ]
        write_door(self._door, nodes, revoked)

    def _reload_door(self) -> None:
        """Have the proxy read its files again where they changed; a site's renewal changes none."""
        before, self._door_read = self._door_read, read_by(self._door, caddy=self._proxy is Proxy.CADDY)
        if self._door_read == before or "proxy" not in self._programs.state():
            return
        if self._programs.pid("proxy") is None:
            return  # it reads them when it starts
        log.info("the proxy reads its files again")
        if self._proxy is Proxy.NGINX:
            self._programs.signal("proxy", signal.SIGHUP)
        else:
            self._programs.restart("proxy")

    # --- status -------------------------------------------------------------------------------------------

    def _write_status(self, *, running: bool = True) -> None:
        value = {
            "running": running,
            "consortium": self._home.consortium,
            "address": self._home.address,
            "ready": self._ready,
            "programs": self._programs.state() if running else {},
            "sites": {
                name: {
                    "state": site.state.value,
                    "online": self._nodes.get(name) in self._online,
                    "certificate_until_s": site.not_after_s,
                }
                for name, site in self._sites.items()
            },
            "studies": self._studies,
            "broken_studies": broken_studies(self._home) if self._ready else {},
            "warnings": dict(sorted({**self._warnings, **self._restless()}.items())),
        }
        data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
        if data != self._written:
            write_atomic(self._home.directory / STATUS_NAME, data)
            self._written = data

    def _write_end(self) -> None:
        """Say that nothing runs any more; after a kill the file stays as it was, and only the lock tells."""
        self._ready = False
        self._online.clear()
        self._write_status(running=False)

    def _restless(self) -> dict[str, str]:
        """Name the programs that do not stay up."""
        return {
            name: f"{name} does not stay up ({state['last_end']}): see logs/{name}.log"
            for name, state in self._programs.state().items()
            if not state["running"] and int(str(state["ends"])) >= RESTLESS_ENDS
        }


def verify_free(listen: str, *, within_s: float) -> None:
    """Wait until nothing listens on HOST:PORT; raises ListenAddressInvalid, saying what is in the way."""
    host, port = parse_listen(listen)
    end = time.monotonic() + within_s
    while True:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return
        except (OSError, OverflowError) as error:
            busy = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            if not busy or time.monotonic() > end:
                why = getattr(error, "strerror", "") or error
                raise ListenAddressInvalid(
                    f"{listen}: expected a free address of this machine, got: {why}"
                ) from error
        log.info("%s is taken; waiting for %s s at most", listen, within_s)
        time.sleep(1.0)


def find_proxy(proxy: Proxy) -> str:
    """Find the proxy's program; raises ConsortiumInvalid naming the package."""
    found = shutil.which(proxy.value, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ConsortiumInvalid(
            f"--proxy {proxy.value}: expected the program {proxy.value} (Debian: apt-get install "
            f"{'nginx-light' if proxy is Proxy.NGINX else 'caddy'}), got none; "
            "or --proxy none with a proxy of your own"
        )
    return found
