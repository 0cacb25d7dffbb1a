"""The access log of one site: who did what with which model version, kept apart from what it said.

    access.jsonl               one record per line, each with the hash of the one before
    payloads/<month>/<id>      AES-256-GCM ciphertext of a draft, where the site keeps drafts
    keys/<month>.key           the month's 32-byte key (0600)
    lock                       held by who writes: the server, and `fedrad-site access` beside it

Guarantees: a record changed, dropped or reordered inside the log breaks the chain and is named; several
processes make one chain; a payload is bound to its record; destroying a month's key makes its payloads
unreadable for good while the records stay, whose commitments are keyed and tell nothing without that key. The
log is the site's: nothing of it leaves.
It cannot show that the last records were cut off, unless `head` was noted elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.errors import AccessLogInvalid, FedRadError, PayloadShredded
from common.files import append_durable, cut_torn_line, sync_directory, write_atomic

_MAX_LINE_BYTES = 4096
_GENESIS = "0" * 64
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._:-]{0,99}")
_MONTH = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])")


class Action(StrEnum):
    """What was done."""

    DRAFT = "draft"
    SIGN_OFF = "sign-off"
    DISCARD = "discard"
    SWITCH_MODEL = "switch-model"
    READ_PAYLOAD = "read-payload"
    SHRED = "shred"


@dataclass(frozen=True)
class AccessRecord:
    """One line: `commitment` is HMAC-SHA256 of the payload under the month's key, empty without payload."""

    id: str
    time_s: int
    user: str
    action: Action
    model_version: int
    commitment: str
    previous: str


class AccessLog:
    """An open access log; other processes may write it too, one record at a time."""

    def __init__(
        self, directory: Path, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        """Open or create the log and verify its chain; raises AccessLogInvalid."""
        self.directory = directory
        self._random = random_bytes
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._size, self.head = -1, _GENESIS
        with self._alone():
            pass

    def record(
        self, *, user: str, action: Action, model_version: int, time_s: int, payload: bytes | None = None
    ) -> AccessRecord:
        """Append one record durably, with its encrypted payload where there is one.

        The payload is on disk before the record that names it. Raises AccessLogInvalid for a user name that
        could hold free text.
        """
        if not _USER.fullmatch(user):
            raise AccessLogInvalid("expected a user name of letters, digits and @ . _ : -")
        month, identifier = _month(time_s), self._random(16).hex()
        commitment = ""
        with self._alone():
            if payload is not None:
                key = self._key(month)
                commitment = hmac.new(key, identifier.encode() + b"\0" + payload, hashlib.sha256).hexdigest()
                nonce = self._random(12)
                sealed = nonce + AESGCM(key).encrypt(nonce, payload, identifier.encode())
                write_atomic(self.directory / "payloads" / month / identifier, sealed, mode=0o600)
            record = AccessRecord(identifier, time_s, user, action, model_version, commitment, self.head)
            line = canonical_json(asdict(record))
            append_durable(self.directory / "access.jsonl", line + b"\n")
            self._size, self.head = self._size + len(line) + 1, sha256_hex(line)
        return record

    def records(self) -> Iterator[AccessRecord]:
        """Yield every record in order, verifying the chain; raises AccessLogInvalid."""
        return (record for record, _ in self._chain())

    def read_payload(self, record: AccessRecord) -> bytes:
        """Decrypt a record's payload and check its commitment; raises PayloadShredded or AccessLogInvalid."""
        month = _month(record.time_s)
        path = self.directory / "payloads" / month / record.id
        key_path = self._key_path(month)
        if not record.commitment or not key_path.is_file() or not path.is_file():
            raise PayloadShredded(f"record {record.id}: no payload, or its key of {month} was destroyed")
        key, sealed = key_path.read_bytes(), path.read_bytes()
        try:
            payload = AESGCM(key).decrypt(sealed[:12], sealed[12:], record.id.encode())
        except (InvalidTag, ValueError) as error:
            raise AccessLogInvalid(
                f"record {record.id}: the payload is not the one that was sealed"
            ) from error
        commitment = hmac.new(key, record.id.encode() + b"\0" + payload, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(commitment, record.commitment):
            raise AccessLogInvalid(f"record {record.id}: the payload is not the one that was committed to")
        return payload

    def shred_before(self, month: str, *, user: str, time_s: int) -> list[str]:
        """Destroy the keys and payloads of all months before `month` (YYYY-MM), on record; returns them."""
        if not _MONTH.fullmatch(month):
            raise AccessLogInvalid(f"expected a month as YYYY-MM, got {month[:10]!r}")
        folder = self.directory / "keys"
        doomed = sorted(p.stem for p in folder.glob("*.key") if p.stem < month) if folder.is_dir() else []
        for name in doomed:
            self.record(user=user, action=Action.SHRED, model_version=0, time_s=time_s)
            path = self._key_path(name)
            path.write_bytes(bytes(32))  # some file systems keep the block; the payloads go as well
            path.unlink()
            sync_directory(folder)
            for payload in (self.directory / "payloads" / name).glob("*"):
                payload.unlink()
        return doomed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing, and take up what they wrote; raises AccessLogInvalid."""
        path = self.directory / "access.jsonl"
        with (self.directory / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._size != (path.stat().st_size if path.is_file() else 0):
                size = len(cut_torn_line(path))
                hashes = [_GENESIS, *(digest for _, digest in self._chain())]
                if self.head not in hashes:
                    raise AccessLogInvalid(
                        "expected the access log to go on, got another one than was opened"
                    )
                self._size, self.head = size, hashes[-1]
            yield

    def _chain(self) -> Iterator[tuple[AccessRecord, str]]:
        path = self.directory / "access.jsonl"
        previous = _GENESIS
        if not path.is_file():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file):
                record = _parse(line.rstrip(b"\n"), number)
                if record.previous != previous:
                    raise AccessLogInvalid(f"access log line {number + 1}: does not follow the line before")
                previous = sha256_hex(line.rstrip(b"\n"))
                yield record, previous

    def _key_path(self, month: str) -> Path:
        return self.directory / "keys" / f"{month}.key"

    def _key(self, month: str) -> bytes:
        path = self._key_path(month)
        if not path.is_file():
            write_atomic(path, self._random(32), mode=0o600)
        return path.read_bytes()


def _parse(line: bytes, number: int) -> AccessRecord:
    where = f"access log line {number + 1}"
    try:
        value = parse_canonical(line, max_bytes=_MAX_LINE_BYTES)
    except FedRadError as error:
        raise AccessLogInvalid(f"{where}: {error}") from error
    kinds = {"id": str, "time_s": int, "user": str, "action": str, "model_version": int,
             "commitment": str, "previous": str}  # fmt: skip
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise AccessLogInvalid(f"{where}: expected the fields {', '.join(kinds)}")
    if any(type(value[name]) is not kind for name, kind in kinds.items()) or value["action"] not in set(
        Action
    ):
        raise AccessLogInvalid(f"{where}: a field has another type")
    return AccessRecord(**{**value, "action": Action(value["action"])})


def _month(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m")
