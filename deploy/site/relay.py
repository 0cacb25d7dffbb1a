"""The relay: SuperNode and the executor of its ClientApp, as a user that has nothing to lose.

Below the relay's folder, which is all that this user can read of FedRad's:

    node.key         the Flower node key (transport only; the site's messages are signed by the agent)
    gateway-ca.pem   whom to believe at the gateway's loopback port
    tls/ superexec.secret homes/   between SuperNode and executor, made anew at each start

Guarantees: the two programs get a small environment of their own, talk to the gateway and to the agent's
socket only, and run FedRad's own installed ClientApp, whatever the server names.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import deploy
from common.errors import EngineFailed
from common.files import write_atomic
from deploy.local.certificates import LoopbackTls, write_loopback_tls
from deploy.local.flower import PRELOAD, Tuning, flower_environment
from deploy.supervision import Account, Program

CLIENT_APP = "client.app:app"
_HOST = "127.0.0.1"
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")
_KEPT_PREFIXES = ("FLWR_", "OMP_", "OPENBLAS_", "MALLOC_")
_TUNING = Tuning(task_poll_s=0.2)


@dataclass(frozen=True, kw_only=True)
class Relay:
    """Where the relay's things are and what it talks to; `account` None means this process's own user."""

    directory: Path
    site: str
    gateway_port: int
    runtime_port: int
    agent: str
    account: Account | None = None


def account_of(name: str) -> Account:
    """Look up an operating-system account; raises EngineFailed."""
    import pwd

    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise EngineFailed(f"--relay-user: expected an account of this machine, got {name!r}") from error
    if entry.pw_uid == 0:
        raise EngineFailed("--relay-user: expected an account without rights, got root")
    return Account(entry.pw_uid, entry.pw_gid)


def give_relay_files(relay: Relay, *, node_key: bytes, gateway_authority: bytes) -> bool:
    """Put the node key and the gateway's authority into the relay's folder; tell whether they changed."""
    relay.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    changed = False
    for name, data in (("node.key", node_key), ("gateway-ca.pem", gateway_authority)):
        path = relay.directory / name
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data, mode=0o600)
            changed = True
    _own(relay)
    return changed


def relay_programs(relay: Relay) -> list[Program]:
    """Make what the two programs share, and say how they are started; node key and authority are there."""
    for name in ("node.key", "gateway-ca.pem"):
        if not (relay.directory / name).is_file():
            raise EngineFailed(
                f"{relay.directory / name}: expected a file made by `fedrad-site relay-files`, got none"
            )
    lifetime = timedelta(days=3650)  # of these two processes: the authority's key is never written
    tls = write_loopback_tls(relay.directory / "tls", now=datetime.now(UTC), lifetime=lifetime)
    secret = relay.directory / "superexec.secret"
    write_atomic(secret, secrets.token_bytes(32), mode=0o600)
    shutil.rmtree(relay.directory / "homes", ignore_errors=True)
    programs = [_supernode(relay, tls, secret), _superexec(relay, tls, secret)]
    _own(relay)
    return programs


def _supernode(relay: Relay, tls: LoopbackTls, secret: Path) -> Program:
    return _program(
        relay,
        "supernode",
        "client.supernode",
        *("--superlink", f"{_HOST}:{relay.gateway_port}"),
        *("--root-certificates", str(relay.directory / "gateway-ca.pem")),
        *("--auth-supernode-private-key", str(relay.directory / "node.key")),
        *("--host", _HOST, "--port", str(relay.runtime_port)),
        *("--ssl-ca-certfile", str(tls.authority), "--ssl-certfile", str(tls.certificate)),
        *("--ssl-keyfile", str(tls.key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--node-config", f'site="{relay.site}" agent="{relay.agent}"'),
    )


def _superexec(relay: Relay, tls: LoopbackTls, secret: Path) -> Program:
    preload = [word for module in PRELOAD for word in ("--preload", module)]
    return _program(
        relay,
        "superexec",
        "deploy.local.executor",
        *("--poll-s", str(_TUNING.task_poll_s), *preload, "--app", CLIENT_APP),
        *("--runtime-api-address", f"{_HOST}:{relay.runtime_port}"),
        *("--root-certificates", str(tls.authority), "--superexec-auth-secret-file", str(secret)),
    )


def _program(relay: Relay, name: str, module: str, *arguments: str) -> Program:
    home = relay.directory / "homes" / name
    home.mkdir(parents=True)
    inherited = os.environ.get("PYTHONPATH", "")
    path = (Path(deploy.__file__).parents[1], *map(Path, filter(None, inherited.split(os.pathsep))))
    whole = flower_environment(home, path, _TUNING)
    own = {name: value for name, value in whole.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    command = [sys.executable, "-m", module, *arguments]
    return Program(name, command, {**own, "HOME": str(home)}, relay.account)


def _own(relay: Relay) -> None:
    """Give the folder and all in it to the relay's user."""
    if relay.account is None:
        return
    for path in (relay.directory, *relay.directory.rglob("*")):
        os.chown(path, relay.account.uid, relay.account.gid, follow_symlinks=False)
