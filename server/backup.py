"""Backup and restore of a study's or a whole server's directory: one file that another machine goes on from.

The file is a tar: every regular file, then `keys.sealed` where a passphrase was given, then
`fedrad-backup.json` with the size and SHA-256 of each. Copied is one moment of the directory: under the
studies' locks where no server holds them; else the copy is thrown away and made again until nothing changed
while it was made, which is a state as after a power cut and as resumable.

Guarantees: private keys are never written in clear (found by name and by content), they are left out or
sealed (scrypt, AES-256-GCM); a damaged, truncated or foreign file is refused before anything is in place; a
directory appears whole or not at all, and nothing is ever replaced. With a passphrase the whole file is
authenticated by it; without one the hashes tell damage, not malice (the SHA-256 that `backup` prints does).
It does not stop the old server. Two that go on from one state would ask the sites two different questions:
the sites refuse the second. A copy older than what the sites have seen is refused by them, and by the
witnesses: restore the newest one.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from common.canonical import canonical_json
from common.errors import BackupInvalid, BackupRefused
from common.files import sync_directory

FORMAT = 1
MANIFEST = "fedrad-backup.json"
SEALED = "keys.sealed"
MIN_PASSPHRASE = 12
_MAX_FILES = 1_000_000
_MAX_MANIFEST_BYTES = 256 << 20
_MAX_KEY_BYTES = 1 << 20
_BLOCK = 1 << 20
_NAME = re.compile(r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._+-]+(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._+-]+){0,15}")
_KEY_SUFFIXES = (".key", ".secret", ".p12", ".pfx", ".passphrase")
_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1}
# Made again by a server that starts: locks, sockets, logs of processes, half-written files, Flower's state.
_LEFT_OUT = re.compile(
    r"(?:.*/)?(?:lock|[^/]*\.(?:lock|sock|pid|partial)|\.[^/]*|core)|(?:run|logs|state)/.*"
)


@dataclass(frozen=True)
class Backup:
    """What was written or restored: files without keys, their bytes, key files, SHA-256 of the file."""

    files: int
    bytes: int
    keys: int
    sha256: str = ""
    left_out: tuple[str, ...] = ()


@dataclass
class _Copy:
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def write_backup(
    directory: Path,
    file: Path,
    *,
    passphrase: bytes | None,
    now_unix_s: int,
    attempts: int = 20,
    pause: Callable[[], None] = lambda: time.sleep(0.5),
) -> Backup:
    """Write a backup of `directory` to `file` (mode 0600); raises BackupRefused.

    `pause` is called between attempts while a running server changes files.
    """
    if file.exists():
        raise BackupRefused(f"{file}: expected no file here yet, got one; a backup is never replaced")
    if not directory.is_dir() or not any(directory.iterdir()):
        raise BackupRefused(f"{directory}: expected a server's or a study's directory, got none")
    if file.absolute().is_relative_to(directory.absolute()):
        raise BackupRefused(f"{file}: expected a place outside {directory}, got one in it")
    staging = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with _study_locks(directory):
            for _ in range(attempts):
                before = _signature(directory)
                try:
                    copy = _copy(directory, staging, passphrase=passphrase, now_unix_s=now_unix_s)
                except FileNotFoundError:
                    copy = None
                if copy is not None and _signature(directory) == before:
                    break
                pause()
            else:
                raise BackupRefused(
                    f"{directory}: expected it to stay still for one copy, got changes in all of {attempts}: "
                    "the server is in the middle of a round; try again, or stop it"
                )
        digest = _sha256(staging)
        os.link(staging, file)  # fails where the file has come to be
    except FileExistsError as error:
        raise BackupRefused(f"{file}: expected no file here yet, got one") from error
    finally:
        staging.unlink(missing_ok=True)
    sync_directory(file.absolute().parent)
    size = sum(int(member["bytes"]) for member in copy.members.values())
    keys = len(copy.keys) if passphrase else 0
    return Backup(len(copy.members), size, keys, digest, tuple(sorted(copy.left_out)))


def restore_backup(
    file: Path, directory: Path, *, passphrase: bytes | None, without_keys: bool = False
) -> Backup:
    """Unpack a backup into a directory that is not there or empty; raises BackupInvalid, BackupRefused."""
    if directory.is_symlink() or (
        directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise BackupRefused(f"{directory}: expected nothing or an empty directory, got something")
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True, mode=0o700)
    try:
        made = _unpack(file, staging, passphrase=passphrase, without_keys=without_keys)
        _verify_studies(staging)
        for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
            sync_directory(folder)
        if directory.exists():
            directory.rmdir()
        os.rename(staging, directory)
    except OSError as error:
        raise BackupRefused(f"{directory}: expected to write here, got {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_directory(directory.absolute().parent)
    return made


def read_passphrase(path: Path) -> bytes:
    """Return a file's first line; raises BackupInvalid where it is shorter than 12 bytes or unreadable."""
    try:
        line = path.read_bytes().splitlines()[:1]
    except OSError as error:
        raise BackupInvalid(f"{path}: expected a passphrase file, got {error.strerror}") from error
    if not line or len(line[0]) < MIN_PASSPHRASE:
        raise BackupInvalid(f"{path}: expected at least {MIN_PASSPHRASE} bytes in the first line, got fewer")
    return line[0]


def is_key(name: str, head: bytes) -> bool:
    """Whether a file is a private key or another secret: by its folder, its suffix or its first bytes."""
    path = Path(name)
    return (
        "keys" in path.parts[:-1]
        or path.suffix in _KEY_SUFFIXES
        or b"PRIVATE KEY-----" in head
        or b"AGE-SECRET-KEY-" in head
    )


# --- writing ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _study_locks(directory: Path) -> Iterator[None]:
    """Hold the lock of every study here that no server holds, so that none starts during the copy."""
    held = []
    try:
        for path in sorted({*directory.glob("lock"), *directory.glob("*/lock"), *directory.glob("*/*/lock")}):
            handle = path.open("r+")
            held.append(handle)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        for handle in held:
            handle.close()


def _signature(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for name, path in _walk(directory):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(directory):
        folders.sort()
        for name in sorted([*files, *(f for f in folders if (Path(folder) / f).is_symlink())]):
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            if not _LEFT_OUT.fullmatch(relative):
                yield relative, path


def _copy(directory: Path, staging: Path, *, passphrase: bytes | None, now_unix_s: int) -> _Copy:
    copy = _Copy()
    staging.unlink(missing_ok=True)
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with (
        os.fdopen(descriptor, "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, path in _walk(directory):
            if path.is_symlink() or not path.is_file() or not _NAME.fullmatch(name):
                copy.left_out.append(name)
                continue
            with path.open("rb") as source:
                _add(tar, copy, name, source)
        sealing = _seal(tar, copy, passphrase) if passphrase else None
        manifest = {
            "format": FORMAT, "made_unix_s": now_unix_s, "files": copy.members, "sealing": sealing,
            "left_out": sorted(copy.left_out) + (sorted(copy.keys) if sealing is None else []),
        }  # fmt: skip
        if sealing is not None:
            sealing["mac"] = hmac.new(sealing.pop("mac_key"), canonical_json(manifest), "sha256").hexdigest()
        _add_bytes(tar, MANIFEST, canonical_json(manifest))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    return copy


def _add(tar: tarfile.TarFile, copy: _Copy, name: str, source: IO[bytes]) -> None:
    status = os.fstat(source.fileno())
    mode = 0o600 if status.st_mode & 0o077 == 0 else 0o644
    head = source.read(4096)
    source.seek(0)
    if is_key(name, head):
        data = source.read(_MAX_KEY_BYTES + 1)
        if len(data) > _MAX_KEY_BYTES:
            raise BackupRefused(f"{name}: expected a key file of at most 1 MiB, got more")
        copy.keys[name] = {"mode": mode, "data": base64.b64encode(data).decode()}
        return
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = status.st_size, mode, 0
    reader = _Hashing(source, status.st_size)
    tar.addfile(info, reader)  # type: ignore[arg-type]
    copy.members[name] = {"bytes": status.st_size, "mode": mode, "sha256": reader.digest.hexdigest()}


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o600
    tar.addfile(info, io.BytesIO(data))


class _Hashing:
    """A file that is hashed as it is read, and that has exactly `size` bytes, padded where it shrank."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        self._source, self._left, self.digest = source, size, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._source.read(wanted)
        data += bytes(wanted - len(data))  # shrunk under us: the signature differs, this copy is thrown away
        self._left -= wanted
        self.digest.update(data)
        return data


def _seal(tar: tarfile.TarFile, copy: _Copy, passphrase: bytes) -> dict[str, Any]:
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    key, mac_key = _derive(passphrase, salt)
    sealed = AESGCM(key).encrypt(nonce, canonical_json(copy.keys), SEALED.encode())
    _add_bytes(tar, SEALED, sealed)
    return {
        "kdf": "scrypt", **_SCRYPT, "salt": salt.hex(), "nonce": nonce.hex(),
        "sha256": hashlib.sha256(sealed).hexdigest(), "bytes": len(sealed), "mac_key": mac_key,
    }  # fmt: skip


def _derive(passphrase: bytes, salt: bytes) -> tuple[bytes, bytes]:
    made = Scrypt(salt=salt, length=64, n=_SCRYPT["n"], r=_SCRYPT["r"], p=_SCRYPT["p"]).derive(passphrase)
    return made[:32], made[32:]


# --- reading ----------------------------------------------------------------------------------------------


def _unpack(file: Path, staging: Path, *, passphrase: bytes | None, without_keys: bool) -> Backup:
    found: dict[str, dict[str, Any]] = {}
    small: dict[str, bytes] = {}
    try:
        with tarfile.open(file, mode="r|") as tar:
            for info in tar:
                if MANIFEST in small or len(found) >= _MAX_FILES:
                    raise BackupInvalid(f"{file.name}: expected nothing after {MANIFEST}, got more")
                if not info.isreg() or info.name in found or not _NAME.fullmatch(info.name):
                    raise BackupInvalid(f"{file.name}: expected regular files of plain names, each once")
                source = tar.extractfile(info)
                if source is None:
                    raise BackupInvalid(f"{file.name}: expected a file, got none")
                if info.name in (MANIFEST, SEALED):
                    if info.size > _MAX_MANIFEST_BYTES:
                        raise BackupInvalid(f"{file.name}: expected a smaller {info.name}")
                    small[info.name] = source.read()
                else:
                    found[info.name] = _write(staging / info.name, source, info)
    except (tarfile.TarError, EOFError) as error:
        raise BackupInvalid(f"{file.name}: expected a whole backup, got a damaged or cut one") from error
    except FileNotFoundError as error:
        raise BackupInvalid(f"{file}: expected a backup, got none") from error
    manifest = _manifest(file.name, small)
    for name in sorted(found.keys() | manifest["files"].keys()):
        if found.get(name) != manifest["files"].get(name):
            raise BackupInvalid(f"{file.name}: {name[:80]}: expected the bytes of the list, got others")
    keys = _restore_keys(
        file.name, staging, manifest, small, passphrase=passphrase, without_keys=without_keys
    )
    return Backup(len(found), sum(int(member["bytes"]) for member in found.values()), keys)


def _write(path: Path, source: IO[bytes], info: tarfile.TarInfo) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mode = 0o600 if info.mode & 0o077 == 0 else 0o644
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as target:
        while block := source.read(_BLOCK):
            target.write(block)
            digest.update(block)
            size += len(block)
        target.flush()
        os.fsync(target.fileno())
    return {"bytes": size, "mode": mode, "sha256": digest.hexdigest()}


def _manifest(name: str, small: dict[str, bytes]) -> dict[str, Any]:
    try:
        value = json.loads(small[MANIFEST])
        if value["format"] != FORMAT:
            raise BackupInvalid(f"{name}: expected backup format {FORMAT}, got {value['format']!r}")
        if set(value) != {"format", "made_unix_s", "files", "sealing", "left_out"}:
            raise BackupInvalid(f"{name}: expected the fields of a backup's list, got others")
        if not isinstance(value["files"], dict):
            raise BackupInvalid(f"{name}: expected a list of files, got none")
        return dict(value)
    except (KeyError, ValueError, TypeError) as error:
        raise BackupInvalid(f"{name}: expected {MANIFEST} at its end, got none: the file is cut") from error


def _restore_keys(
    name: str, staging: Path, manifest: dict[str, Any], small: dict[str, bytes], *,
    passphrase: bytes | None, without_keys: bool,
) -> int:  # fmt: skip
    sealing = manifest["sealing"]
    if (sealing is None) != (SEALED not in small):
        raise BackupInvalid(f"{name}: expected sealed keys where the list names them, and only there")
    if sealing is None or without_keys:
        return 0
    if passphrase is None:
        raise BackupInvalid(f"{name}: expected the passphrase of its keys, got none (or say --without-keys)")
    try:
        key, mac_key = _derive(passphrase, bytes.fromhex(sealing["salt"]))
        listed = {**manifest, "sealing": {k: v for k, v in sealing.items() if k != "mac"}}
        wanted = hmac.new(mac_key, canonical_json(listed), "sha256").hexdigest()
        if not hmac.compare_digest(wanted, str(sealing["mac"])):
            raise BackupInvalid(f"{name}: expected the passphrase that sealed it, got another (or damage)")
        nonce = bytes.fromhex(sealing["nonce"])
        keys = json.loads(AESGCM(key).decrypt(nonce, small[SEALED], SEALED.encode()))
    except (InvalidTag, KeyError, ValueError, TypeError) as error:
        raise BackupInvalid(f"{name}: expected whole sealed keys, got damaged ones") from error
    for path, entry in keys.items():
        if not _NAME.fullmatch(path) or (staging / path).exists():
            raise BackupInvalid(f"{name}: expected keys of plain names, each once")
        data = base64.b64decode(entry["data"], validate=True)
        info = tarfile.TarInfo(path)
        info.mode = 0o600
        _write(staging / path, io.BytesIO(data), info)
        (staging / path).parent.chmod(0o700)
    return len(keys)


def _verify_studies(staging: Path) -> None:
    """Raise unless every signed study in the directory verifies."""
    from server.checkpoint import read_signed_study

    for path in sorted(
        {*staging.glob("study.json"), *staging.glob("*/study.json"), *staging.glob("*/*/study.json")}
    ):
        if (path.parent / "operator.sig").is_file():
            read_signed_study(path.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
