"""`pacs.toml`: who may send, where drafts go, how long to try.

Guarantees: unknown keys are refused; a line that leaves this machine is TLS; relative paths are relative to
the file. `EXAMPLE` is a complete, commented configuration that parses as it is.
"""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from client.data.receive import ReceiverPlan, verify_plan
from common.errors import PacsConfigInvalid, ReceiverRefused

MAX_CONFIG_BYTES = 1 << 16

EXAMPLE = """\
# What `fedrad-site serve --pacs pacs.toml` receives and where its drafts go. Paths are relative to this file.
directory = "pacs"            # queue and inbox, 0700; holds identified images until they are delivered
institution = ""              # InstitutionName of the reports, where the image has none
keep_days = 30                # how long the record of a delivered job stays

[listen]                      # the PACS sends chest radiographs here (C-STORE, C-ECHO)
ae_title = "FEDRAD"
address = "127.0.0.1"         # another address needs the three TLS files
port = 11112
senders = ["PACS"]            # AE titles that are admitted
# certificate = "tls/site.pem"
# private_key = "tls/site.key"
# authority = "tls/ca.pem"

[destination]                 # where the structured reports go (C-STORE); leave out to send none
ae_title = "PACS"
address = "127.0.0.1"
port = 4242
# certificate = "tls/site.pem"
# private_key = "tls/site.key"
# authority = "tls/ca.pem"

[fhir]                        # where DiagnosticReports go: a folder or a server's base URL; may be left out
directory = "fhir"
# url = "https://fhir.example.org/r4"
# token_file = "fhir.token"

[retry]                       # a delivery that fails is tried again: first_s, doubled up to most_s
first_s = 5.0
most_s = 900.0
attempts = 100                # then the job is put aside with its reason: fedrad-site pacs list
"""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Own certificate and key, and the authority that the other side's certificate comes from."""

    certificate: Path
    private_key: Path
    authority: Path


@dataclass(frozen=True, slots=True)
class Destination:
    """A DICOM node that takes structured reports."""

    ae_title: str
    address: str
    port: int
    tls: TlsFiles | None


@dataclass(frozen=True, slots=True)
class FhirTarget:
    """A folder or a server's base URL; exactly one is set."""

    directory: Path | None
    url: str
    token_file: Path | None


@dataclass(frozen=True, slots=True)
class Retry:
    """When a failed delivery is tried again, and how often in all."""

    first_s: float = 5.0
    most_s: float = 900.0
    attempts: int = 100

    def delay_s(self, attempts: int) -> float:
        """Return how long to wait after that many failed attempts (at least 1)."""
        return float(min(self.most_s, self.first_s * 2.0 ** min(attempts - 1, 60)))


@dataclass(frozen=True, slots=True)
class PacsConfig:
    """The PACS loop's settings; `listen.inbox` lies in `directory`."""

    directory: Path
    listen: ReceiverPlan
    destination: Destination | None
    fhir: FhirTarget | None
    retry: Retry
    institution: str
    keep_days: int


def read_pacs_config(path: Path) -> PacsConfig:
    """Read and check a configuration file; raises PacsConfigInvalid."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise PacsConfigInvalid(f"expected at most {MAX_CONFIG_BYTES} bytes, got more")
        return parse_pacs_config(path.read_text(encoding="utf-8"), folder=path.absolute().parent)
    except (OSError, UnicodeDecodeError) as error:
        raise PacsConfigInvalid(f"{path}: expected a TOML file, got {type(error).__name__}") from error
    except PacsConfigInvalid as error:
        raise PacsConfigInvalid(f"{path}: {error}") from error


def parse_pacs_config(text: str, *, folder: Path) -> PacsConfig:
    """Parse a configuration whose relative paths start at `folder`; raises PacsConfigInvalid."""
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PacsConfigInvalid(f"expected TOML: {error}") from error
    top = _Table(value, "", folder)
    directory = top.path("directory")
    listen = _Table(top.take("listen", dict), "listen", folder)
    tls = listen.tls()
    plan = ReceiverPlan(
        inbox=directory / "inbox",
        address=listen.take("address", str, "127.0.0.1"),
        port=listen.port(),
        ae_title=listen.title("ae_title"),
        senders=tuple(listen.take("senders", list)),
        certificate=tls.certificate if tls else None,
        private_key=tls.private_key if tls else None,
        authority=tls.authority if tls else None,
    )
    listen.done()
    if not all(isinstance(sender, str) for sender in plan.senders):
        raise PacsConfigInvalid("listen.senders: expected AE titles")
    try:
        verify_plan(plan)
    except (ReceiverRefused, ValueError) as error:
        raise PacsConfigInvalid(f"listen: {error}") from error
    config = PacsConfig(
        directory=directory,
        listen=plan,
        destination=_destination(top, folder),
        fhir=_fhir(top, folder),
        retry=_retry(top, folder),
        institution=top.take("institution", str, ""),
        keep_days=top.take("keep_days", int, 30),
    )
    top.done()
    if config.destination is None and config.fhir is None:
        raise PacsConfigInvalid("expected [destination], [fhir] or both, got none: drafts would go nowhere")
    if config.keep_days < 1 or len(config.institution) > 64:
        raise PacsConfigInvalid(
            "expected keep_days of at least 1 and an institution of at most 64 characters"
        )
    return config


def _destination(top: _Table, folder: Path) -> Destination | None:
    table = top.table("destination", folder)
    if table is None:
        return None
    found = Destination(table.title("ae_title"), table.take("address", str), table.port(), table.tls())
    table.done()
    if found.tls is None and not _is_loopback(found.address):
        raise PacsConfigInvalid("destination: expected the TLS files for an address that is not loopback")
    return found


def _fhir(top: _Table, folder: Path) -> FhirTarget | None:
    table = top.table("fhir", folder)
    if table is None:
        return None
    found = FhirTarget(
        directory=table.path("directory", required=False),
        url=table.take("url", str, "").rstrip("/"),
        token_file=table.path("token_file", required=False),
    )
    table.done()
    if (found.directory is None) == (not found.url):
        raise PacsConfigInvalid("fhir: expected either directory or url")
    parts = urlsplit(found.url)
    if found.url and not (
        parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))
    ):
        raise PacsConfigInvalid("fhir.url: expected https, or http on a loopback address")
    return found


def _retry(top: _Table, folder: Path) -> Retry:
    table = top.table("retry", folder)
    if table is None:
        return Retry()
    found = Retry(
        float(table.take("first_s", (int, float), 5.0)),
        float(table.take("most_s", (int, float), 900.0)),
        table.take("attempts", int, 100),
    )
    table.done()
    if not (0 < found.first_s <= found.most_s <= 86_400 and found.attempts >= 1):
        raise PacsConfigInvalid("retry: expected 0 < first_s <= most_s <= 86400 and at least one attempt")
    return found


class _Table:
    """A TOML table whose keys are taken one by one; what is left over is an error."""

    def __init__(self, value: dict[str, Any], name: str, folder: Path) -> None:
        self._value, self._name, self._folder = dict(value), name, folder

    def take(self, key: str, kind: Any, *default: Any) -> Any:
        where = f"{self._name}.{key}" if self._name else key
        if key not in self._value:
            if default:
                return default[0]
            raise PacsConfigInvalid(f"{where}: expected this key, got none")
        value = self._value.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise PacsConfigInvalid(f"{where}: expected another type, got {type(value).__name__}")
        return value

    def table(self, key: str, folder: Path) -> _Table | None:
        value = self.take(key, dict, None)
        return None if value is None else _Table(value, key, folder)

    def path(self, key: str, *, required: bool = True) -> Any:
        value = self.take(key, str) if required else self.take(key, str, "")
        return (self._folder / value) if value else None

    def title(self, key: str) -> str:
        value: str = self.take(key, str)
        if (
            not 1 <= len(value.strip()) <= 16
            or not value.isascii()
            or not value.isprintable()
            or "\\" in value
        ):
            raise PacsConfigInvalid(f"{self._name}.{key}: expected an AE title of 1 to 16 characters")
        return value

    def port(self) -> int:
        value: int = self.take("port", int)
        if not 0 <= value <= 65535:
            raise PacsConfigInvalid(f"{self._name}.port: expected a port number")
        return value

    def tls(self) -> TlsFiles | None:
        names = ("certificate", "private_key", "authority")
        paths = [self.path(name, required=False) for name in names]
        if not any(paths):
            return None
        if not all(paths):
            raise PacsConfigInvalid(f"{self._name}: expected {', '.join(names)} together, got some of them")
        return TlsFiles(*paths)

    def done(self) -> None:
        if self._value:
            raise PacsConfigInvalid(f"{self._name or 'pacs.toml'}: unknown key {sorted(self._value)[0]!r}")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
