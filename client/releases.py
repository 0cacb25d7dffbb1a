"""Released models at a site: pulled through TUF and a ledger proof, switched atomically, decisions kept.

    trust/root.json  ledgers/*.json    the pinned TUF root and the logs that are believed
    tuf/                               metadata seen so far (python-tuf)
    versions/<n>/                      a release with its ledger entry and proof
    current.json                       the version in use and the one before
    decisions.jsonl                    every switch: when, from, to, why

Guarantees: a version gets into `versions/` only with a valid TUF signature chain and a ledger proof under the
witness quorum; `current.json` names only verified versions; a lower version needs a permission in the ledger
or a local pin with a reason, unless the higher one failed here before it served (`put_back`). Deciding is one
process at a time, by a lock. It runs nothing: see `common/model/release.py` and `client/serving`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.canonical import canonical_json, sha256_hex
from common.errors import (
    FedRadError,
    ReleaseSourceUnreachable,
    ReleaseStale,
    ReleaseUnproven,
    RollbackNotPermitted,
    VersionUnknown,
)
from common.files import append_durable, cut_torn_line, sync_directory, write_atomic
from common.ledger.entries import Release
from common.ledger.release_proof import (
    LedgerTrust,
    format_trust,
    parse_trust,
    verify_release_folder,
    verify_rollback,
)

MAX_TARGET_BYTES = 2 << 30
_TARGET = re.compile(r"v([1-9]\d{0,6})/([A-Za-z0-9][A-Za-z0-9._-]{0,99})")
_PIN_REASON = re.compile(r"[^\x00-\x1f]{1,200}")


@dataclass(frozen=True)
class Current:
    """The version in use, and the one to go back to (0 for none)."""

    version: int
    previous: int


class ModelStore:
    """The releases of one site; any number of processes may read, pull and decide."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def trust(self, root: bytes, ledger: LedgerTrust) -> None:
        """Pin the TUF root and a log that this site believes; an existing pin is never replaced.

        Raises ReleaseUnproven for another pin, and for a file that is no root that signs itself.
        """
        _verify_root(root)
        name = sha256_hex(ledger.log.name.encode())[:32]
        folder = self.directory / "trust"
        for path, data in (
            (folder / "root.json", root),
            (folder / "ledgers" / f"{name}.json", format_trust(ledger)),
        ):
            if path.exists() and path.read_bytes() != data:
                raise ReleaseUnproven(
                    f"{path}: expected the pinned one, got another; pins are never replaced"
                )
            write_atomic(path, data)

    @property
    def ledgers(self) -> tuple[LedgerTrust, ...]:
        """The logs that this site believes."""
        folder = self.directory / "trust" / "ledgers"
        found = tuple(parse_trust(path.read_bytes()) for path in sorted(folder.glob("*.json")))
        if not found:
            raise ReleaseUnproven(f"{folder}: expected the ledger trust, got none; enrol first")
        return found

    def versions(self) -> list[int]:
        folder = self.directory / "versions"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def folder(self, version: int) -> Path:
        """Return a held version's folder; raises VersionUnknown."""
        path = self.directory / "versions" / str(version)
        if not path.is_dir():
            raise VersionUnknown(f"expected one of versions {self.versions()}, got {version}; pull it first")
        return path

    def current(self) -> Current | None:
        """Return the version in use, None before the first; raises VersionUnknown for a damaged file."""
        path = self.directory / "current.json"
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise VersionUnknown(f"{path}: expected the version in use, got no JSON") from error
        if (
            not isinstance(value, dict)
            or set(value) != {"version", "previous"}
            or any(type(number) is not int for number in value.values())
        ):
            raise VersionUnknown(f"{path}: expected version and previous, got something else")
        return Current(**value)

    def decisions(self) -> list[dict[str, Any]]:
        path = self.directory / "decisions.jsonl"
        data = path.read_bytes() if path.is_file() else b""
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def pull(self, source: str, *, version: int | None = None, allow_unprotected: bool = False) -> int:
        """Fetch a version (default: the newest) from an https URL or a folder; returns the version.

        Raises ReleaseSourceUnreachable, ReleaseStale (expired or rolled-back metadata), ReleaseUnproven or
        VersionUnknown. Nothing of an unproven release stays on disk.
        """
        updater = self._updater(source)
        names = _refreshed(updater, self.directory / "tuf")
        offered = sorted({int(m.group(1)) for m in map(_TARGET.fullmatch, names) if m})
        if not offered or (version is not None and version not in offered):
            raise VersionUnknown(f"expected one of the published versions {offered}, got {version or 'none'}")
        chosen = version or offered[-1]
        self._fetch_rollbacks(updater, names)
        final = self.directory / "versions" / str(chosen)
        if final.is_dir():
            self.verify(chosen, allow_unprotected=allow_unprotected)
            return chosen
        staging = self.directory / "versions" / f".{chosen}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            for name in sorted(names):
                match = _TARGET.fullmatch(name)
                if match and int(match.group(1)) == chosen:
                    _download(updater, name, staging / match.group(2))
            verify_release_folder(staging, self.ledgers, version=chosen, allow_unprotected=allow_unprotected)
            os.replace(staging, final)
            sync_directory(final.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return chosen

    def verify(self, version: int, *, allow_unprotected: bool = False) -> Release:
        """Verify a held version again, file by file, against the ledger; raises ReleaseUnproven."""
        folder = self.folder(version)
        return verify_release_folder(
            folder, self.ledgers, version=version, allow_unprotected=allow_unprotected
        )[0]

    def use(
        self, version: int, *, time_s: int, by: str, pin_reason: str = "", allow_unprotected: bool = False
    ) -> Current:
        """Switch to a held version; a lower one needs a logged permission or `pin_reason`.

        Raises ReleaseUnproven, VersionUnknown or RollbackNotPermitted. The switch is one atomic rename.
        """
        self.verify(version, allow_unprotected=allow_unprotected)
        with self._deciding():
            before = self.current()
            if before is not None and before.version == version:
                return before
            why = "newer"
            if before is not None and version < before.version:
                why = self._permission(before.version, version, pin_reason)
            elif pin_reason:
                why = f"pin: {_checked_reason(pin_reason)}"
            now = Current(version, before.version if before else 0)
            self._decide(now, time_s=time_s, frm=now.previous, why=why, by=by)
            return now

    def put_back(self, failed: int, served: Current, *, time_s: int, by: str, why: str) -> bool:
        """Name `served` again where `failed` was chosen and could not be run; whether that was still so.

        It needs no permission: the failed version has answered nobody. A later decision is left alone.
        """
        with self._deciding():
            now = self.current()
            if now is None or now.version != failed:
                return False
            self._decide(served, time_s=time_s, frm=failed, why=f"failed: {why}", by=by)
            return True

    def rollback(self, *, time_s: int, by: str, pin_reason: str = "") -> Current:
        """Go back to the previous version, by a logged permission or a local pin with a reason."""
        current = self.current()
        if current is None or not current.previous:
            raise VersionUnknown("expected a previous version to go back to, got none")
        return self.use(current.previous, time_s=time_s, by=by, pin_reason=pin_reason)

    def _permission(self, frm: int, to: int, pin_reason: str) -> str:
        path = self.directory / "rollbacks" / f"{frm}-{to}.json"
        if path.is_file():
            value = json.loads(path.read_text())
            body = verify_rollback(
                value["entry"].encode(), value["proof"].encode(), self.ledgers, frm=frm, to=to
            )
            return f"permitted: {body.code}"
        if pin_reason:
            return f"pin: {_checked_reason(pin_reason)}"
        raise RollbackNotPermitted(
            f"expected a signed permission to go from version {frm} back to {to}, or a pin with a reason "
            "(--pin), got neither"
        )

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """Keep other processes and threads from deciding meanwhile."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".deciding.lock").open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _decide(self, now: Current, *, time_s: int, frm: int, why: str, by: str) -> None:
        line = canonical_json({"by": by, "frm": frm, "time_s": time_s, "to": now.version, "why": why})
        cut_torn_line(self.directory / "decisions.jsonl")
        append_durable(self.directory / "decisions.jsonl", line + b"\n")
        write_atomic(self.directory / "current.json", canonical_json(asdict(now)))

    def _fetch_rollbacks(self, updater: Any, names: frozenset[str]) -> None:
        for name in sorted(names):
            match = re.fullmatch(r"rollbacks/(\d{1,7}-\d{1,7}\.json)", name)
            if match:
                (self.directory / "rollbacks").mkdir(exist_ok=True)
                _download(updater, name, self.directory / "rollbacks" / match.group(1))

    def _updater(self, source: str) -> Any:
        from tuf.api import exceptions
        from tuf.ngclient import Updater

        root = self.directory / "trust" / "root.json"
        if not root.is_file():
            raise ReleaseUnproven(f"{root}: expected the pinned root, got none; enrol first")
        base, fetcher = _source(source)
        (self.directory / "tuf").mkdir(parents=True, exist_ok=True)
        try:
            return Updater(
                metadata_dir=str(self.directory / "tuf"),
                metadata_base_url=f"{base}/metadata/",
                target_base_url=f"{base}/targets/",
                fetcher=fetcher,
                bootstrap=root.read_bytes(),
            )
        except (exceptions.RepositoryError, exceptions.DownloadError) as error:
            raise _named(error) from error


def _source(source: str) -> tuple[str, Any]:
    """Return base URL and fetcher: https as it is, a folder or stick by reading files."""
    parts = urlsplit(source)
    if parts.scheme == "https":
        return source.rstrip("/"), None
    if parts.scheme not in ("", "file"):
        raise ReleaseSourceUnreachable(f"expected an https URL or a folder, got scheme {parts.scheme!r}")
    folder = Path(unquote(parts.path) if parts.scheme else source).absolute()
    if not (folder / "metadata").is_dir():
        raise ReleaseSourceUnreachable(f"{folder}: expected a release repository (metadata/), got none")
    return folder.as_uri(), _folder_fetcher(folder)


def _folder_fetcher(folder: Path) -> Any:
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient import FetcherInterface

    root = folder.resolve()

    class FolderFetcher(FetcherInterface):
        """Reads files under one folder; anything that leads out of it is not found."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            path = Path(unquote(urlsplit(url).path)).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                raise DownloadHTTPError(f"{path.name}: not in the repository", 404)
            return self._blocks(path)

        def _blocks(self, path: Path) -> Iterator[bytes]:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    yield block

    return FolderFetcher()


def _refreshed(updater: Any, metadata: Path) -> frozenset[str]:
    """Run TUF's client workflow and return the target names of the verified targets metadata."""
    from tuf.api import exceptions
    from tuf.api.metadata import Metadata, Targets

    try:
        updater.refresh()
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        raise _named(error) from error
    targets: Metadata[Targets] = Metadata.from_file(str(metadata / "targets.json"))
    return frozenset(targets.signed.targets)


def _download(updater: Any, name: str, path: Path) -> None:
    from tuf.api import exceptions

    try:
        info = updater.get_targetinfo(name)
        if info is None or info.length > MAX_TARGET_BYTES:
            raise ReleaseUnproven(f"{name}: expected a target of at most {MAX_TARGET_BYTES} bytes")
        updater.download_target(info, str(path))
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        raise _named(error) from error


def _named(error: Exception) -> FedRadError:
    """Name an error of python-tuf."""
    from tuf.api import exceptions

    if isinstance(error, exceptions.ExpiredMetadataError | exceptions.BadVersionNumberError):
        return ReleaseStale(f"release repository: {error}")
    if isinstance(error, exceptions.RepositoryError | exceptions.DownloadLengthMismatchError):
        return ReleaseUnproven(f"release repository: {error}")
    return ReleaseSourceUnreachable(f"release repository: {error}")


def _verify_root(root: bytes) -> None:
    """Raise ReleaseUnproven unless this is a TUF root that enough of its own keys have signed."""
    from tuf.api import exceptions
    from tuf.api.metadata import Metadata, Root

    try:
        metadata = Metadata[Root].from_bytes(root)
        if metadata.signed.type != Root.type:
            raise ReleaseUnproven(f"expected a release repository's root, got its {metadata.signed.type}")
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except exceptions.RepositoryError as error:
        raise ReleaseUnproven(f"expected a release repository's signed root, got: {error}") from error


def _checked_reason(reason: str) -> str:
    if not _PIN_REASON.fullmatch(reason):
        raise RollbackNotPermitted("expected a reason in one line of at most 200 characters")
    return reason
