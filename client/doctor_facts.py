"""What the doctor looks at: the only part that touches machine, network, files and clock.

Each function gathers one part and turns what goes wrong into a fact, so that one broken thing hides no other.
It asks the enrolled server for nothing but a page that is not there, and sends no data to anybody.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import os
import platform
import shutil
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

from client.doctor import (
    BaseFacts,
    CertificateFacts,
    DataFacts,
    MachineFacts,
    ServerFacts,
    SiteFacts,
)
from client.hardware import Card, Wheel, measure_base
from client.home import SiteHome, list_studies, open_home, read_study
from client.proxy import connect_through, parse_proxy
from common.errors import FedRadError, ProxyUnsupported, ServerUnreachable

_PACKAGES = ("torch", "transformers", "peft", "flwr", "grpcio", "safetensors", "dp-accounting", "opacus")
_TIMEOUT_S = 10.0
_TRIAL = """\
import json, torch
cuda = torch.version.cuda or ""
built = torch._C._cuda_getArchFlags() if cuda else ""  # get_arch_list says nothing where the driver fails
value = {"version": torch.__version__, "cuda": cuda, "architectures": (built or "").split(), "kernel": ""}
if cuda and torch.cuda.is_available():
    try:
        a = torch.ones((64, 64), dtype=torch.float16, device="cuda")
        value["kernel"] = "ok" if float((a @ a).sum()) == 64.0 ** 3 else "a wrong result"
    except Exception as error:
        value["kernel"] = type(error).__name__
elif cuda:
    value["kernel"] = "torch finds no usable card"
print(json.dumps(value))
"""

Say = Callable[[str], None]


def gather(directory: Path, *, proxy: Callable[[str], str], hash_bases: bool, say: Say) -> SiteFacts:
    """Look at everything of a site and its machine."""
    now = time.time()
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        home = open_home(directory.absolute(), credentials=Path(credentials) if credentials else None)
    except FedRadError as error:
        machine = gather_machine([directory], say=say)
        return SiteFacts(now, machine, home_problem=f"{error.code}: {error}")
    machine = gather_machine([home.directory, home.data], say=say)
    say("site")
    certificate, address, problem = _enrolment(home)
    return SiteFacts(
        now_unix_s=now,
        machine=machine,
        site=home.site,
        enrolment_problem=problem,
        key_problems=_keys(home),
        certificate=certificate,
        server=_server(home, address, proxy, say) if address else None,
        data=_data(home.data),
        bases=tuple(_base(home, name, hash_files=hash_bases, say=say) for name in sorted(home.bases)),
        budget_problem=_budget(home),
        damaged_cases=_damaged_cases(home),
    )


# --- the machine ------------------------------------------------------------------------------------------


def gather_machine(directories: list[Path], *, say: Say) -> MachineFacts:
    """Look at Python, packages, cards, torch's build, memory and disks."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = ""
    say("cards")
    cards = find_cards()
    wheel, kernel = (None, "")
    if packages["torch"]:
        say("torch")
        wheel, kernel = try_torch()
    return MachineFacts(
        python=platform.python_version(),
        packages=packages,
        cards=cards,
        wheel=wheel,
        kernel=kernel if cards else "",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free_bytes=_disks(directories),
    )


def find_cards() -> tuple[Card, ...]:
    """Ask `nvidia-smi`; nothing where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    asked = "name,compute_cap,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_cards(done.stdout)


def parse_cards(text: str) -> tuple[Card, ...]:
    """Parse `nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version` (memory in MiB)."""
    cards = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        with contextlib.suppress(ValueError):
            name, capability, memory, driver = row
            major, _, minor = capability.partition(".")
            cards.append(Card(name, (int(major), int(minor)), int(memory) << 20, driver))
    return tuple(cards)


def try_torch() -> tuple[Wheel | None, str]:
    """Ask torch, in a process of its own, for its architectures, and let it compute on the first card."""
    import sys

    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL], capture_output=True, text=True, timeout=120.0, check=True
        )
        value = json.loads(done.stdout.splitlines()[-1])
        wheel = Wheel(str(value["version"]), str(value["cuda"]), tuple(map(str, value["architectures"])))
        return wheel, str(value["kernel"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        return None, f"torch cannot be imported: {type(error).__name__}"


def _disks(directories: list[Path]) -> dict[str, int]:
    found: dict[int, tuple[str, int]] = {}
    for directory in directories:
        there = next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))
        found.setdefault(there.stat().st_dev, (str(there), shutil.disk_usage(there).free))
    return dict(found.values())


# --- the site ---------------------------------------------------------------------------------------------


def _keys(home: SiteHome) -> tuple[str, ...]:
    problems = []
    folder = home.directory / "keys"
    if folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
        problems.append(f"keys/ has mode {stat.S_IMODE(folder.stat().st_mode):04o}, not 0700")
    for path in sorted(folder.glob("*.key")):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            problems.append(f"keys/{path.name} has mode {stat.S_IMODE(path.stat().st_mode):04o}, not 0600")
    try:
        home.message_key()
        home.witness_key()
    except FedRadError as error:
        problems.append(f"{error.code}: {error}")
    return tuple(problems)


def _enrolment(home: SiteHome) -> tuple[CertificateFacts | None, str, str]:
    """Return the certificate's facts, the server's address, and what is wrong with the enrolment."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    from client.enrolment import certificate_path, read_enrolled, tls_key_path

    try:
        enrolled = read_enrolled(home)
        certificate = x509.load_pem_x509_certificate(certificate_path(home).read_bytes())
    except (FedRadError, OSError, ValueError) as error:
        name = error.code if isinstance(error, FedRadError) else type(error).__name__
        return None, "", f"{name}: {error}"
    try:
        key = load_pem_private_key(tls_key_path(home).read_bytes(), password=None)
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        fits = key.public_key().public_bytes(*form) == certificate.public_key().public_bytes(*form)
    except (OSError, ValueError, TypeError):
        fits = False
    facts = CertificateFacts(
        certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp(),
        enrolled.renew_after.timestamp(), fits,
    )  # fmt: skip
    return facts, enrolled.address, ""


def _data(directory: Path) -> DataFacts:
    from client.data.store import read_card, read_pairs

    try:
        pairs = read_pairs(directory)
        counts = read_card(directory).get("counts", {})
    except (FedRadError, OSError) as error:
        name = error.code if isinstance(error, FedRadError) else type(error).__name__
        return DataFacts(str(directory), name)
    patients = counts.get("patients", {}) if isinstance(counts, dict) else {}
    missing = any(not (directory / image).is_file() for pair in pairs for image in pair.images)
    bucket = str(patients.get("train", "")) if isinstance(patients, dict) else ""
    return DataFacts(str(directory), patients=bucket, image_missing=missing)


def _base(home: SiteHome, name: str, *, hash_files: bool, say: Say) -> BaseFacts:
    from common.model.manifest import hash_base, tensor_shapes

    directory = home.bases[name]
    try:
        config = json.loads((directory / "config.json").read_bytes())
        size = measure_base(name, config, tensor_shapes(directory))
        if not hash_files:
            return BaseFacts(name, str(directory), size, hashed="not hashed")
        files = hash_base(directory, progress=lambda what: say(f"base {name}: {what}"))
    except (FedRadError, OSError, ValueError) as error:
        return BaseFacts(name, str(directory), problem=_named(error))
    pinned = []
    for sha256 in list_studies(home):
        try:
            study = read_study(home, sha256)
        except FedRadError:
            continue
        if study.base.name != name:
            continue
        if tuple(study.base.files) != files:
            problem = f"BaseHashMismatch: study {study.study.id} pins other files"
            return BaseFacts(name, str(directory), size, problem=problem)
        pinned.append(study.study.id)
    return BaseFacts(name, str(directory), size, hashed=f"{len(files)} files hashed", pinned_by=tuple(pinned))


def _budget(home: SiteHome) -> str:
    from client.budget import BudgetLimits, read_summary

    try:
        read_summary(home.budget_path, BudgetLimits(epsilon=home.epsilon, delta=home.delta))
    except (FedRadError, OSError) as error:
        return _named(error)
    return ""


def _damaged_cases(home: SiteHome) -> tuple[str, ...] | None:
    from client.serving.worklist import Worklist

    folder = home.directory / "serving" / "page" / "worklist"
    return tuple(Worklist(folder).damages()) if folder.is_dir() else None


def _named(error: Exception) -> str:
    return f"{error.code}: {error}" if isinstance(error, FedRadError) else type(error).__name__


# --- the network ------------------------------------------------------------------------------------------


def _server(home: SiteHome, address: str, proxy: Callable[[str], str], say: Say) -> ServerFacts:
    from client.enrolment import authority_path, certificate_path, tls_key_path

    say(f"server {address}")
    host = address.rpartition(":")[0].strip("[]")

    def context() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.load_verify_locations(cafile=str(authority_path(home)))
        made.load_cert_chain(str(certificate_path(home)), str(tls_key_path(home)))
        return made

    return probe_server(address, proxy=proxy(host), context=context)


def probe_server(
    address: str, *, proxy: str, context: Callable[[], ssl.SSLContext], clock: Callable[[], float] = time.time
) -> ServerFacts:
    """Go the way that the site's link goes: name, proxy, connection, TLS both ways, an answer with a date."""
    host, port = address.rpartition(":")[0].strip("[]"), int(address.rpartition(":")[2])
    try:
        where = parse_proxy(proxy)
    except ProxyUnsupported as error:
        return ServerFacts(address, "", failed="proxy", error=_named(error))
    shown = where.address if where else ""
    first = (where.host, where.port) if where else (host, port)
    try:
        found = socket.getaddrinfo(*first, type=socket.SOCK_STREAM)
    except OSError as error:
        return ServerFacts(address, shown, failed="dns", error=f"{first[0]}: {error.strerror or error}")
    addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))

    def failed(step: str, error: object) -> ServerFacts:
        return ServerFacts(address, shown, addresses, step, " ".join(str(error).split())[:200])

    started = clock()
    with contextlib.ExitStack() as stack:
        try:
            plain = stack.enter_context(socket.create_connection(first, timeout=_TIMEOUT_S))
        except OSError as error:
            return failed(
                "proxy" if where else "connect", f"{first[0]}:{first[1]}: {error.strerror or error}"
            )
        if where:
            try:
                connect_through(plain, where, host=host, port=port)
            except (OSError, ServerUnreachable) as error:
                return failed("proxy", f"{shown}: {error}")
        try:
            secure = stack.enter_context(context().wrap_socket(plain, server_hostname=host))
        except (OSError, ValueError) as error:
            reason = getattr(error, "verify_message", "") or error
            return failed("tls", f"{host}: {reason}")
        try:
            asked = clock()
            connection = http.client.HTTPConnection(host, port)
            connection.sock = secure
            connection.request("GET", "/fedrad/v1/doctor")
            response = connection.getresponse()
            response.read(1 << 16)
            date = (
                parsedate_to_datetime(response.headers["Date"]).timestamp()
                if response.headers["Date"]
                else None
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            return failed("answer", error)
        if response.status == 400 and date is None:
            return failed("answer", f"HTTP {response.status}")
        return ServerFacts(
            address, shown, addresses, date_unix_s=date, asked_unix_s=asked, took_s=clock() - started
        )
