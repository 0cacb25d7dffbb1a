"""A site's directory: who it is, where its data and bases are, its keys, studies and state.

    site.json            site id, operator's public key, data folder, base folders, budget limits
    budget.jsonl         the privacy ledger (client/budget.py)
    keys/message.key     Ed25519, signs protocol messages and approvals (0600)
    keys/witness.key     Ed25519, cosigns the ledger's checkpoints (0600)
    keys/tls.key node.key  enrolment.json  tls/   what makes the connection (client/enrolment.py)
    studies/<sha256>/    study.json, operator.sig, approval.sig or refusal.json, decided (when, Unix seconds)
    state/<sha256>/      what the agent has served (client/state.py)
    cache/               vision features

The process that runs Flower code has no access to any of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import Study, format_study, parse_study, verify_resolved
from common.errors import (
    BaseInvalid,
    DataInsufficient,
    FedRadError,
    SignatureInvalid,
    StudyNotApproved,
    StudyUnknown,
)
from common.files import read_settings, write_atomic
from common.identity import Purpose, SigningKey, load_key, load_or_create_key, verify_signature


class SiteHomeInvalid(FedRadError):
    """A site's directory is missing, incomplete or has a wrong field."""


_SITE = r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?"


@dataclass(frozen=True)
class SiteHome:
    """Paths and settings of one site; `bases` maps a base's name in manifests to its directory.

    `epsilon` and `delta` are what the site allows in total, over all studies, for one patient. `credentials`
    is systemd's credential directory: a key that lies there as `fedrad-NAME` is read from there.
    """

    directory: Path
    site: str
    operator_key: str
    data: Path
    bases: dict[str, Path]
    epsilon: float = 20.0
    delta: float = 1e-5
    credentials: Path | None = None

    @property
    def budget_path(self) -> Path:
        return self.directory / "budget.jsonl"

    @property
    def key_path(self) -> Path:
        return self.key_file("message.key")

    @property
    def witness_key_path(self) -> Path:
        return self.key_file("witness.key")

    def key_file(self, name: str) -> Path:
        """Return where a private key lies: among systemd's credentials, or in `keys/`."""
        credential = self.credentials / f"fedrad-{name}" if self.credentials else None
        return credential if credential and credential.is_file() else self.directory / "keys" / name

    def witness_key(self) -> SigningKey:
        return load_key(self.witness_key_path)

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    def study_directory(self, sha256: str) -> Path:
        return self.directory / "studies" / sha256

    def state_directory(self, sha256: str) -> Path:
        return self.directory / "state" / sha256

    def message_key(self) -> SigningKey:
        return load_key(self.key_path)

    def base_directory(self, name: str) -> Path:
        """Return where a base lies at this site; raises BaseInvalid naming what to add."""
        if name not in self.bases:
            raise BaseInvalid(
                f"{self.directory / 'site.json'}: bases: expected a directory for base {name!r}, "
                f"got {', '.join(sorted(self.bases)) or 'none'}"
            )
        return self.bases[name]


def create_home(
    directory: Path,
    *,
    site: str,
    operator_key: str,
    data: Path,
    bases: dict[str, Path],
    epsilon: float = 20.0,
    delta: float = 1e-5,
) -> SiteHome:
    """Make or update a site's directory and its message key; an existing key is kept.

    Raises SiteHomeInvalid, before anything is written, for settings that `open_home` would refuse, and for
    another id than an enrolled site has.
    """
    verify_settings(site=site, operator_key=operator_key, epsilon=epsilon, delta=delta)
    if (directory / "enrolment.json").is_file() and (known := open_home(directory).site) != site:
        raise SiteHomeInvalid(f"{directory}: expected its site, {known}, got {site}; choose another --home")
    home = SiteHome(directory, site, operator_key, data, bases, epsilon, delta)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    (directory / "keys").mkdir(exist_ok=True, mode=0o700)
    if not (directory / "enrolment.json").is_file():  # an enrolled site's keys may be systemd's credentials
        load_or_create_key(home.key_path)
        load_or_create_key(home.witness_key_path)
    value = {
        "site": site,
        "operator_key": operator_key,
        "data": str(data.absolute()),
        "bases": {name: str(path.absolute()) for name, path in sorted(bases.items())},
        "epsilon": epsilon,
        "delta": delta,
    }
    write_atomic(directory / "site.json", (json.dumps(value, indent=2) + "\n").encode())
    return home


def verify_settings(*, site: object, operator_key: object, epsilon: object, delta: object) -> None:
    """Raise SiteHomeInvalid naming the first setting that is none; an operator's key may still be empty."""
    if not isinstance(site, str) or not re.fullmatch(_SITE, site):
        raise SiteHomeInvalid(
            f"site: expected lower-case letters, digits and hyphens, such as north-clinic, got {site!r}"
        )
    if not isinstance(operator_key, str) or not re.fullmatch(r"(?:[0-9a-f]{64})?", operator_key):
        raise SiteHomeInvalid(f"operator_key: expected 64 hex digits, got {operator_key!r}")
    for name, value, most in (("epsilon", epsilon, 1e6), ("delta", delta, 1.0)):
        if type(value) not in (int, float) or not 0 < float(str(value)) < most:
            raise SiteHomeInvalid(f"{name}: expected a number above 0 and below {most:g}, got {value!r}")


def open_home(directory: Path, *, credentials: Path | None = None) -> SiteHome:
    """Read a site's directory; raises SiteHomeInvalid naming file and field.

    The operator's key is empty until the operator's bundle is installed (client/enrolment.py).
    """
    path = directory / "site.json"
    try:
        value = read_settings(path)
    except ValueError as error:
        raise SiteHomeInvalid(str(error)) from error
    if value is None:
        raise SiteHomeInvalid(f"{path}: expected a site's settings, got none; run `fedrad-site enrol`")
    fields = {"site", "operator_key", "data", "bases", "epsilon", "delta"}
    if not isinstance(value, dict) or set(value) != fields:
        raise SiteHomeInvalid(f"{path}: expected the fields {', '.join(sorted(fields))}")
    try:
        verify_settings(**{name: value[name] for name in ("site", "operator_key", "epsilon", "delta")})
    except SiteHomeInvalid as error:
        raise SiteHomeInvalid(f"{path}: {error}") from error
    if not isinstance(value["data"], str) or not value["data"]:
        raise SiteHomeInvalid(f"{path}: data: expected text, got {value['data']!r}")
    if not isinstance(value["bases"], dict):
        raise SiteHomeInvalid(f"{path}: bases: expected a table of directories by name")
    return SiteHome(
        directory,
        str(value["site"]),
        str(value["operator_key"]),
        Path(str(value["data"])),
        {str(name): Path(str(path)) for name, path in value["bases"].items()},
        float(value["epsilon"]),
        float(value["delta"]),
        credentials,
    )


def verify_site_folder(directory: Path, *, part: str) -> Path:
    """Return the folder of a site's `part`; raises SiteHomeInvalid where neither it nor site.json is.

    A site that only serves a release by folder has no settings; a mistyped folder has nothing.
    """
    if not (directory / part).is_dir() and not (directory / "site.json").is_file():
        raise SiteHomeInvalid(f"{directory}: expected a site's directory, got none; is --home right?")
    return directory / part


def receive_study(home: SiteHome, manifest: bytes, operator_signature: bytes) -> Study:
    """Store a study offered by the operator; it runs only after `approve_study`.

    Raises ManifestInvalid, SignatureInvalid, or StudyNotApproved when the operator is not this site's.
    """
    study = parse_study(manifest)
    verify_resolved(study)
    if study.cohort.operator_key != home.operator_key:
        raise StudyNotApproved(
            f"study {study.study.id}: expected operator key {home.operator_key[:16]}… (this site's), "
            f"got {study.cohort.operator_key[:16]}…"
        )
    verify_signature(home.operator_key, Purpose.STUDY, manifest, operator_signature)
    directory = home.study_directory(study.sha256)
    write_atomic(directory / "operator.sig", operator_signature.hex().encode())
    write_atomic(directory / "study.json", manifest)
    return study


def approve_study(home: SiteHome, sha256: str, *, clock: Callable[[], float] = time.time) -> bytes:
    """Sign a received study for this site; returns the 64-byte approval, which is also stored."""
    study = read_study(home, sha256)
    key = home.message_key()
    if study.site(home.site).message_key != key.public:
        raise StudyNotApproved(
            f"study {study.study.id}: cohort.site {home.site}: expected this site's message key "
            f"{key.public[:16]}…, got {study.site(home.site).message_key[:16]}…"
        )
    approval = key.sign(Purpose.APPROVAL, format_study(study))
    directory = home.study_directory(sha256)
    _note_time(directory, clock())  # first: killed after it, what is told is what stands
    write_atomic(directory / "approval.sig", approval.hex().encode())
    (directory / "refusal.json").unlink(missing_ok=True)
    return approval


def refuse_study(home: SiteHome, sha256: str, reason: str, *, clock: Callable[[], float] = time.time) -> None:
    """Withdraw or deny this site's approval; the agent refuses the study from the next message on."""
    read_study(home, sha256)
    directory = home.study_directory(sha256)
    _note_time(directory, clock())
    write_atomic(directory / "refusal.json", json.dumps({"reason": reason}).encode())
    (directory / "approval.sig").unlink(missing_ok=True)


@dataclass(frozen=True)
class Decision:
    """This site's word on a study: its approval in hex, empty for none; when, 0 where that is not known."""

    approval: str
    decided_s: int


def read_decision(home: SiteHome, sha256: str) -> Decision:
    """Read what this site has decided about a study, and when; raises OSError for what cannot be read."""
    directory = home.study_directory(sha256)
    try:
        approval = (directory / "approval.sig").read_text().strip()
    except FileNotFoundError:
        approval = ""
    return Decision(approval, _time_noted(directory))


def _note_time(directory: Path, now_unix_s: float) -> None:
    """Write down when a decision was made: after the one before it, whatever the clock says."""
    decided_s = max(int(now_unix_s), _time_noted(directory) + 1)
    write_atomic(directory / "decided", str(decided_s).encode())


def _time_noted(directory: Path) -> int:
    try:
        text = (directory / "decided").read_text()
    except FileNotFoundError:
        return 0
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else 0


def read_study(home: SiteHome, sha256: str) -> Study:
    """Read a received study and verify hash and operator signature; raises StudyUnknown."""
    directory = home.study_directory(sha256)
    try:
        manifest = (directory / "study.json").read_bytes()
        signature = bytes.fromhex((directory / "operator.sig").read_text().strip())
    except (OSError, ValueError) as error:
        raise StudyUnknown(f"expected a study received by this site, got {sha256[:16]}…") from error
    study = parse_study(manifest)
    if study.sha256 != sha256:
        raise StudyUnknown(f"{directory}: expected the study of this hash, got {study.sha256[:16]}…")
    verify_signature(home.operator_key, Purpose.STUDY, manifest, signature)
    return study


def read_approved_study(home: SiteHome, sha256: str) -> Study:
    """Read a study that the operator signed and this site approved; raises StudyNotApproved."""
    study = read_study(home, sha256)
    path = home.study_directory(sha256) / "approval.sig"
    try:
        approval = bytes.fromhex(path.read_text().strip())
        verify_signature(study.site(home.site).message_key, Purpose.APPROVAL, format_study(study), approval)
    except (OSError, ValueError, SignatureInvalid) as error:
        raise StudyNotApproved(
            f"study {study.study.id}: expected this site's approval, got none; `fedrad-site study show "
            f"{sha256[:12]}`, then approve or refuse it"
        ) from error
    return study


def read_approval(home: SiteHome, study: Study) -> bytes:
    """Return this site's 64-byte signature of an approved study's manifest."""
    return bytes.fromhex((home.study_directory(study.sha256) / "approval.sig").read_text().strip())


def list_studies(home: SiteHome) -> list[str]:
    """List the hashes of received studies."""
    root = home.directory / "studies"
    return sorted(p.parent.name for p in root.glob("*/study.json"))  # it is written last


def find_study(home: SiteHome, prefix: str) -> str:
    """Resolve a hash prefix or a study id to one received study; raises StudyUnknown."""
    found = [
        sha
        for sha in list_studies(home)
        if sha.startswith(prefix) or read_study(home, sha).study.id == prefix
    ]
    if len(found) != 1:
        raise StudyUnknown(f"expected one received study named {prefix!r}, got {len(found)}")
    return found[0]


def verify_data(home: SiteHome) -> None:
    """Raise DataInsufficient unless the site's data folder is there."""
    if not (home.data / "pairs.jsonl").is_file():
        raise DataInsufficient(f"{home.data}: expected prepared data (pairs.jsonl), got none")
