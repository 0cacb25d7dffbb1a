"""The operator's directory: who the consortium is, where its server is reached, and every path below it.

    server.json          consortium, public address, host names          policy.toml   what may be changed
    keys/message.key     the operator's Ed25519 key                       keys/superexec.secret
    authority/           ca.crt, ca.key, crl.pem (server/authority.py)
    tls/                 server.pem, server.key: what the proxy shows
    sites/ID.json        the registry, one file per site (server/enrolment.py)
    studies/ID/          study directories (server/checkpoint.py), with approvals/SITE.sig, .decided (when)
    ledger/              enrolments, rotations and revocations (server/log.py)
    state/ proxy/ logs/  what `fedrad-server up` keeps
    status.json          what `fedrad-server up` knows, rewritten as it changes

Keys are files of mode 0600 in folders of mode 0700; in systemd's credential directory
(`fedrad-message.key`, `fedrad-ca.passphrase`) they are taken from there.
"""

from __future__ import annotations

import json
import re
import secrets
import tomllib
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.certificates import Authority
from common.errors import ConsortiumInvalid
from common.files import read_settings, write_atomic
from common.identity import SigningKey, load_key, load_or_create_key
from server.authority import (
    create_authority,
    open_authority,
    read_certificate,
    read_ec_key,
    renew_after,
)

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9a-f:]{2,45}\]")
_POLICY = """\
# What the operator may change; `fedrad-server up` reads it at start.
certificate_days = {certificate_days}       # lifetime of site and server certificates
renewal_grace_days = {renewal_grace_days}   # how long after its end a certificate may still be renewed
clock_skew_s = {clock_skew_s}          # tolerated between site and server, both ways
studies_at_once = {studies_at_once}         # further studies wait
study_retry_s = {study_retry_s}         # longest pause before a study that failed is tried again
"""


@dataclass(frozen=True)
class Policy:
    """What the operator may change."""

    certificate_days: float = 7.0
    renewal_grace_days: float = 30.0
    clock_skew_s: float = 300.0
    studies_at_once: int = 1
    study_retry_s: float = 600.0

    @property
    def lifetime(self) -> timedelta:
        return timedelta(days=self.certificate_days)


@dataclass(frozen=True)
class ServerHome:
    """Paths and settings of one consortium's server; `credentials` is systemd's directory or None."""

    directory: Path
    consortium: str
    address: str
    policy: Policy
    credentials: Path | None = None

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def key_path(self) -> Path:
        return _credential(self.credentials, "fedrad-message.key", self.directory / "keys" / "message.key")

    @property
    def superexec_secret(self) -> Path:
        return _credential(
            self.credentials, "fedrad-superexec.secret", self.directory / "keys" / "superexec.secret"
        )

    @property
    def authority_directory(self) -> Path:
        return self.directory / "authority"

    @property
    def crl(self) -> Path:
        return self.authority_directory / "crl.pem"

    @property
    def certificate(self) -> Path:
        return self.directory / "tls" / "server.pem"

    @property
    def certificate_key(self) -> Path:
        return self.directory / "tls" / "server.key"

    @property
    def sites(self) -> Path:
        return self.directory / "sites"

    @property
    def studies(self) -> Path:
        return self.directory / "studies"

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger"

    @property
    def log_origin(self) -> str:
        return f"fedrad/consortium/{self.consortium}"

    def message_key(self) -> SigningKey:
        return load_key(self.key_path)

    def authority(self, *, passphrase: bytes = b"") -> Authority:
        """Open the authority; the passphrase may lie in the credentials as `fedrad-ca.passphrase`."""
        if not passphrase and self.credentials is not None:
            path = self.credentials / "fedrad-ca.passphrase"
            passphrase = path.read_bytes().rstrip(b"\r\n") if path.is_file() else b""
        return open_authority(self.authority_directory, passphrase=passphrase)


def create_server_home(
    directory: Path,
    *,
    consortium: str,
    address: str,
    now: datetime,
    passphrase: bytes = b"",
    policy: Policy = Policy(),
) -> ServerHome:
    """Make a consortium: authority, operator key, server certificate, SuperExec secret, policy.

    Made again after a crash it completes what is missing and keeps what is there. Raises ConsortiumInvalid.
    """
    if not _NAME.fullmatch(consortium):
        raise ConsortiumInvalid(
            f"consortium: expected lower-case letters, digits and hyphens, got {consortium!r}"
        )
    _verify_address(address)
    settings = directory / "server.json"
    if settings.exists():
        raise ConsortiumInvalid(
            f"{directory}: expected no consortium here yet, got one; it is never replaced"
        )
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("keys", "authority", "tls"):
        (directory / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    home = ServerHome(directory, consortium, address, policy)
    load_or_create_key(home.key_path)
    if not home.superexec_secret.exists():
        write_atomic(home.superexec_secret, secrets.token_bytes(32), mode=0o600)
    if not (home.authority_directory / "ca.crt").exists():
        (home.authority_directory / "ca.key").unlink(missing_ok=True)
        create_authority(home.authority_directory, consortium=consortium, now=now, passphrase=passphrase)
    authority = home.authority(passphrase=passphrase)
    renew_server_certificate(home, authority, now=now, force=True)
    write_atomic(home.crl, authority.revoke([], now=now))
    write_atomic(directory / "policy.toml", _POLICY.format(**asdict(policy)).encode())
    value = {"consortium": consortium, "address": address}
    write_atomic(settings, (json.dumps(value, indent=2) + "\n").encode())
    return home


def open_server_home(directory: Path, *, credentials: Path | None = None) -> ServerHome:
    """Read a consortium's directory; raises ConsortiumInvalid naming file and field."""
    path = directory / "server.json"
    try:
        value = read_settings(path)
    except ValueError as error:
        raise ConsortiumInvalid(str(error)) from error
    if value is None:
        raise ConsortiumInvalid(
            f"{path}: expected a consortium's settings, got none; run `fedrad-server init`"
        )
    if not isinstance(value, dict) or value.keys() != {"consortium", "address"}:
        raise ConsortiumInvalid(f"{path}: expected the fields consortium and address")
    if not isinstance(value["consortium"], str) or not _NAME.fullmatch(value["consortium"]):
        raise ConsortiumInvalid(f"{path}: consortium: expected letters, digits, hyphens")
    _verify_address(value["address"])
    policy = _read_policy(directory / "policy.toml")
    return ServerHome(directory, value["consortium"], value["address"], policy, credentials)


def renew_server_certificate(
    home: ServerHome, authority: Authority, *, now: datetime, force: bool = False
) -> bool:
    """Sign the server's own certificate anew at two thirds of its lifetime; tell whether it was."""
    if not force and now < renew_after(read_certificate(home.certificate)):
        return False
    if not home.certificate_key.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomic(home.certificate_key, pem, mode=0o600)
    public = read_ec_key(home.certificate_key).public_key()
    hosts = dict.fromkeys((home.host.strip("[]"), "localhost", "127.0.0.1"))
    issued = authority.issue_server(hosts, public, now=now, lifetime=home.policy.lifetime)
    write_atomic(home.certificate, issued.public_bytes(Encoding.PEM))
    return True


def utc_now() -> datetime:
    return datetime.now(UTC)


def _read_policy(path: Path) -> Policy:
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConsortiumInvalid(f"{path}: expected a policy in TOML, got {error}") from error
    known = {one.name: one for one in fields(Policy)}
    for name, given in value.items():
        if name not in known:
            raise ConsortiumInvalid(f"{path}: {name}: expected one of {', '.join(known)}")
        whole = type(known[name].default) is int
        if type(given) not in ((int,) if whole else (int, float)) or given <= 0:
            raise ConsortiumInvalid(f"{path}: {name}: expected a positive number, got {given!r}")
    return Policy(**value)


def _verify_address(address: object) -> None:
    host, _, port = str(address).rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConsortiumInvalid(f"address: expected HOST:PORT, got {address!r}")


def _credential(directory: Path | None, name: str, otherwise: Path) -> Path:
    if directory is not None and (directory / name).is_file():
        return directory / name
    return otherwise
