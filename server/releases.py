"""Publish releases as a TUF repository of static files: any web server, folder or stick can carry it.

    metadata/<N>.root.json <N>.targets.json <N>.snapshot.json timestamp.json
    targets/v<version>/<hash>.<file>          the release, its ledger entry and offline proof
    targets/rollbacks/<hash>.<from>-<to>.json permissions to run an older version

Guarantees: root needs its threshold of signatures (operator and hospitals), targets its offline key; nothing
is published without a ledger proof; files appear whole and timestamp.json last, so a reader never sees half a
release. Keys are passed in; where they are kept is the operator's business. See SECURITY.md for lifetimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from common.canonical import canonical_json
from common.errors import RepositoryInvalid
from common.files import write_atomic
from common.identity import SigningKey
from common.ledger.entries import ReleaseRollback, parse_entry
from common.ledger.release_proof import LedgerTrust, verify_release_folder, verify_statement

ROOT_LIFETIME = timedelta(days=365)
TARGETS_LIFETIME = timedelta(days=180)
SNAPSHOT_LIFETIME = timedelta(days=7)
TIMESTAMP_LIFETIME = timedelta(days=1)


@dataclass(frozen=True)
class RoleKeys:
    """Public keys (64 hex digits) of each role; root needs `threshold` of its keys."""

    root: tuple[str, ...]
    threshold: int
    targets: str
    snapshot: str
    timestamp: str


@dataclass(frozen=True)
class OnlineKeys:
    """The two keys that a publishing machine holds; alone they cannot add or change a release."""

    snapshot: SigningKey
    timestamp: SigningKey


def propose_root(keys: RoleKeys, *, version: int, now: datetime) -> bytes:
    """Make an unsigned root for the operator and hospitals to sign (`sign_root`)."""
    if not 1 <= keys.threshold <= len(set(keys.root)):
        raise RepositoryInvalid(
            f"root: expected a threshold from 1 to {len(set(keys.root))}, got {keys.threshold}"
        )
    root = Root(version=version, expires=_expiry(now, ROOT_LIFETIME), consistent_snapshot=True)
    for public in keys.root:
        root.add_key(_tuf_key(public), Root.type)
    for role, public in (
        (Targets.type, keys.targets),
        (Snapshot.type, keys.snapshot),
        (Timestamp.type, keys.timestamp),
    ):
        root.add_key(_tuf_key(public), role)
    root.roles[Root.type].threshold = keys.threshold
    return bytes(Metadata(root).to_bytes())


def sign_root(root: bytes, key: SigningKey) -> bytes:
    """Add one signature to a proposed root; raises RepositoryInvalid for what is none."""
    metadata = _parse_root(root)
    metadata.sign(_signer(key), append=True)
    return bytes(metadata.to_bytes())


def install_root(repository: Path, root: bytes) -> None:
    """Place a signed root in a repository; raises RepositoryInvalid below its threshold or the one before."""
    metadata = _parse_root(root)
    folder = repository / "metadata"
    previous = _latest(folder, Root.type)
    try:
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
        if previous is not None:
            old: Metadata[Root] = Metadata.from_file(str(previous))
            old.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
            if metadata.signed.version != old.signed.version + 1:
                raise RepositoryInvalid(
                    f"root: expected version {old.signed.version + 1}, got {metadata.signed.version}"
                )
        elif metadata.signed.version != 1:
            raise RepositoryInvalid(f"root: expected version 1 first, got {metadata.signed.version}")
    except RepositoryError as error:
        raise RepositoryInvalid(f"root: {error}") from error
    write_atomic(folder / f"{metadata.signed.version}.root.json", root)


def initialise(repository: Path, *, targets: SigningKey, online: OnlineKeys, now: datetime) -> None:
    """Write the first, empty targets, snapshot and timestamp of a repository that has a root."""
    if _latest(repository / "metadata", Root.type) is None:
        raise RepositoryInvalid(f"{repository}: expected a root first, got none")
    _publish(repository, {}, targets=targets, online=online, now=now)


def publish_release(
    repository: Path,
    folder: Path,
    *,
    trusts: Sequence[LedgerTrust],
    targets: SigningKey,
    online: OnlineKeys,
    now: datetime,
    allow_unprotected: bool = False,
) -> int:
    """Publish a release folder that holds its ledger entry and proof; returns its version.

    Raises ReleaseUnproven, or RepositoryInvalid for a version that is not newer than those published.
    """
    release, _ = verify_release_folder(folder, trusts, allow_unprotected=allow_unprotected)
    newest = max(published_versions(repository), default=0)
    if release.version <= newest:
        raise RepositoryInvalid(f"expected a version after {newest}, got {release.version}")
    files = {f"v{release.version}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    _publish(repository, files, targets=targets, online=online, now=now)
    return release.version


def publish_rollback(
    repository: Path,
    leaf: bytes,
    proof: bytes,
    *,
    trusts: Sequence[LedgerTrust],
    targets: SigningKey,
    online: OnlineKeys,
    now: datetime,
) -> None:
    """Publish a logged permission to run an older version; raises ReleaseUnproven."""
    verify_statement(leaf, proof, trusts)
    body = parse_entry(leaf).body
    if not isinstance(body, ReleaseRollback) or body.to not in published_versions(repository):
        raise RepositoryInvalid("expected the entry of a rollback to a published version, got another")
    name = f"rollbacks/{body.frm}-{body.to}.json"
    data = canonical_json({"entry": leaf.decode(), "proof": proof.decode()})
    _publish(repository, {name: data}, targets=targets, online=online, now=now)


def refresh(repository: Path, *, online: OnlineKeys, now: datetime) -> None:
    """Sign a fresh snapshot and timestamp over the same targets: readers see that nothing was withheld."""
    folder = repository / "metadata"
    path = _latest(folder, Targets.type)
    if path is None:
        raise RepositoryInvalid(f"{repository}: expected targets metadata, got none")
    targets: Metadata[Targets] = Metadata.from_file(str(path))
    _sign_snapshot(folder, targets.signed.version, online=online, now=now)


def published_versions(repository: Path) -> list[int]:
    """List the versions in the newest targets metadata, in order."""
    path = _latest(repository / "metadata", Targets.type)
    if path is None:
        return []
    metadata: Metadata[Targets] = Metadata.from_file(str(path))
    names = {name.split("/")[0] for name in metadata.signed.targets if name.startswith("v")}
    return sorted(int(name[1:]) for name in names)


def _publish(
    repository: Path, files: Mapping[str, bytes], *, targets: SigningKey, online: OnlineKeys, now: datetime
) -> None:
    folder = repository / "metadata"
    path = _latest(folder, Targets.type)
    if path is None:
        metadata = Metadata(Targets(version=1, expires=_expiry(now, TARGETS_LIFETIME)))
    else:
        metadata = Metadata[Targets].from_file(str(path))
        metadata.signed.version += 1
    for name, data in files.items():
        info = TargetFile.from_data(name, data, ["sha256"])
        parent, _, base = name.rpartition("/")
        write_atomic(repository / "targets" / parent / f"{info.hashes['sha256']}.{base}", data)
        metadata.signed.targets[name] = info
    metadata.signed.expires = _expiry(now, TARGETS_LIFETIME)
    metadata.sign(_signer(targets))
    _check_role(folder, Targets.type, metadata)
    write_atomic(folder / f"{metadata.signed.version}.targets.json", metadata.to_bytes())
    _sign_snapshot(folder, metadata.signed.version, online=online, now=now)


def _sign_snapshot(folder: Path, targets_version: int, *, online: OnlineKeys, now: datetime) -> None:
    path = _latest(folder, Snapshot.type)
    version = int(path.name.split(".")[0]) if path else 0
    snapshot = Metadata(Snapshot(version=version + 1, expires=_expiry(now, SNAPSHOT_LIFETIME)))
    snapshot.signed.meta["targets.json"] = MetaFile(version=targets_version)
    snapshot.sign(_signer(online.snapshot))
    _check_role(folder, Snapshot.type, snapshot)
    write_atomic(folder / f"{snapshot.signed.version}.snapshot.json", snapshot.to_bytes())
    timestamp_path = folder / "timestamp.json"
    seen = Metadata[Timestamp].from_file(str(timestamp_path)).signed.version if timestamp_path.exists() else 0
    timestamp = Metadata(Timestamp(version=seen + 1, expires=_expiry(now, TIMESTAMP_LIFETIME)))
    timestamp.signed.snapshot_meta = MetaFile(version=snapshot.signed.version)
    timestamp.sign(_signer(online.timestamp))
    _check_role(folder, Timestamp.type, timestamp)
    write_atomic(timestamp_path, timestamp.to_bytes())


def _check_role(
    folder: Path, role: str, metadata: Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp]
) -> None:
    """Raise RepositoryInvalid unless the root accepts this signature, before anything is written."""
    path = _latest(folder, Root.type)
    if path is None:
        raise RepositoryInvalid(f"{folder}: expected a root first, got none")
    root: Metadata[Root] = Metadata.from_file(str(path))
    try:
        root.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        raise RepositoryInvalid(f"{role}: the key is not the one that the root names") from error


def _latest(folder: Path, role: str) -> Path | None:
    paths: Sequence[Path] = list(folder.glob(f"*.{role}.json"))
    return max(paths, key=lambda p: int(p.name.split(".")[0]), default=None)


def _expiry(now: datetime, lifetime: timedelta) -> datetime:
    return (now.astimezone(UTC) + lifetime).replace(microsecond=0)


def _parse_root(root: bytes) -> Metadata[Root]:
    try:
        metadata = Metadata[Root].from_bytes(root)
    except RepositoryError as error:
        raise RepositoryInvalid(f"root: {error}") from error
    if metadata.signed.type != Root.type:
        raise RepositoryInvalid(f"root: expected root metadata, got {metadata.signed.type}")
    return metadata


def _signer(key: SigningKey) -> CryptoSigner:
    return CryptoSigner(key.private)


def _tuf_key(public: str) -> SSlibKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError as error:
        raise RepositoryInvalid(f"expected a public key of 64 hex digits, got {public[:80]!r}") from error
