"""Who may ask: bearer tokens kept as hashes, or names from client certificates.

    tokens.json      {name: {"sha256": hex, "admin": bool}}, mode 0600

Guarantees: a token is 32 random bytes and is shown once; the file holds only hashes; comparison takes the
same time for every token of the same length. It does not expire tokens by itself.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from common.errors import NotAuthenticated, ServingRefused
from common.files import write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,63}")
_PREFIX = "frt_"


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who asks; `admin` may switch releases."""

    name: str
    admin: bool = False


class TokenFile:
    """The tokens of one site; the file is read again when it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._users: dict[str, User] = {}

    def create(self, name: str, *, admin: bool = False) -> str:
        """Make a token for a name, in place of its former one, and return it; it cannot be shown again."""
        if not _NAME.fullmatch(name):
            raise ServingRefused("expected a user name of letters, digits and @ . _ -")
        token = _PREFIX + secrets.token_urlsafe(32)
        entries = self._read()
        entries[name] = {"sha256": _digest(token), "admin": admin}
        self._write(entries)
        return token

    def revoke(self, name: str) -> None:
        """Take a name's token away; raises ServingRefused for an unknown name."""
        entries = self._read()
        if entries.pop(name, None) is None:
            raise ServingRefused("expected the name of a token, got another")
        self._write(entries)

    def names(self) -> dict[str, bool]:
        """Return every name and whether it is an administrator's."""
        return {name: bool(entry["admin"]) for name, entry in sorted(self._read().items())}

    def user(self, token: str) -> User:
        """Return whose token this is; raises NotAuthenticated."""
        self._refresh()
        digest, found = _digest(token), None
        for known, user in self._users.items():
            if hmac.compare_digest(known, digest):
                found = user
        if found is None:
            raise NotAuthenticated("expected a valid token, got another")
        return found

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except OSError:
            self._users, self._seen = {}, None
            return
        if self._seen != (status.st_mtime_ns, status.st_ino):
            self._users = {
                str(entry["sha256"]): User(name, bool(entry["admin"])) for name, entry in self._read().items()
            }
            self._seen = (status.st_mtime_ns, status.st_ino)

    def _read(self) -> dict[str, dict[str, str | bool]]:
        if not self.path.is_file():
            return {}
        try:
            value = json.loads(self.path.read_text())
            if not isinstance(value, dict) or any(set(one) != {"sha256", "admin"} for one in value.values()):
                raise ValueError
        except (OSError, ValueError, TypeError) as error:
            raise ServingRefused(f"{self.path}: expected the tokens' hashes by name, got none") from error
        return value

    def _write(self, entries: dict[str, dict[str, str | bool]]) -> None:
        write_atomic(self.path, json.dumps(entries, indent=1, sort_keys=True).encode(), mode=0o600)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
