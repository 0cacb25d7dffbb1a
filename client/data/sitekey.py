"""The site key: 32 secret bytes from which pseudonyms, splits and date shifts of one hospital come.

Guarantees: the file is created once, readable by its owner only, and refused when others can read it;
each use derives its own key (HKDF-SHA-256), so a pseudonym says nothing about a split or a date shift.
It does not protect against someone who has the key: with it, pseudonyms of known patients can be found.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from common.errors import SiteKeyInvalid
from common.files import sync_directory

MAX_SHIFT_DAYS = 3650


@dataclass(frozen=True, slots=True)
class SiteKey:
    """The secret of a site; `repr` hides it."""

    secret: bytes = field(repr=False)

    def derive(self, purpose: str) -> bytes:
        """Return the 32-byte key for one purpose."""
        return HKDFExpand(SHA256(), 32, b"fedrad site key\x00" + purpose.encode()).derive(self.secret)


def load_or_create_key(path: Path, *, fresh: bytes) -> SiteKey:
    """Read the key file, or create it with `fresh` (32 random bytes) and mode 0600.

    Raises SiteKeyInvalid for another length, other content, a link, or a file that others can read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return load_key(path)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(fresh.hex() + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    sync_directory(path.parent)
    return load_key(path)


def load_key(path: Path) -> SiteKey:
    """Read the key file; raises SiteKeyInvalid."""
    try:
        status = os.lstat(path)
    except FileNotFoundError as error:
        raise SiteKeyInvalid(f"expected a site key at {path}, found none") from error
    if not stat.S_ISREG(status.st_mode):
        raise SiteKeyInvalid(f"expected a plain file at {path}, got another kind")
    if status.st_mode & 0o077:
        raise SiteKeyInvalid(
            f"expected mode 0600 on {path}, got {stat.S_IMODE(status.st_mode):04o}; chmod it"
        )
    text = path.read_bytes()[:1024].strip()
    if not re.fullmatch(rb"[0-9a-f]{64}", text):
        raise SiteKeyInvalid(f"expected 64 hex digits in {path}, got something else")
    return SiteKey(bytes.fromhex(text.decode()))


def patient_pseudonym(key: SiteKey, patient: str) -> str:
    """Return the 80-bit keyed pseudonym of a patient identifier."""
    return "p" + _tag(key, "patient pseudonym", patient)


def study_pseudonym(key: SiteKey, study: str) -> str:
    """Return the 80-bit keyed pseudonym of a study identifier."""
    return "s" + _tag(key, "study pseudonym", study)


def date_shift(key: SiteKey, patient: str) -> datetime.timedelta:
    """Return the one shift of all dates of a patient: 1 to 3650 days into the past."""
    digest = hmac.new(key.derive("date shift"), patient.encode(), hashlib.sha256).digest()
    return datetime.timedelta(days=-1 - int.from_bytes(digest[:8], "big") % MAX_SHIFT_DAYS)


def _tag(key: SiteKey, purpose: str, value: str) -> str:
    return hmac.new(key.derive(purpose), value.strip().encode(), hashlib.sha256).hexdigest()[:20]
