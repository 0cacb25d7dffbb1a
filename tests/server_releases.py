"""An operator's release repository for tests of both sides: real keys, a run study, releases on disk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from common.ledger.checkpoint import LedgerProof, format_ledger_proof
from common.ledger.entries import OPERATOR, ReleaseRollback
from common.ledger.release_proof import LedgerTrust, trust_of
from server.releases import (
    OnlineKeys,
    RoleKeys,
    initialise,
    install_root,
    propose_root,
    publish_release,
    publish_rollback,
    sign_root,
)
from tests.common.ledger.consortium import ORIGIN, Ledger, add_release, key_of, run_study, study

ROOT_SIGNERS = (OPERATOR, "amber", "birch")
KEYS = RoleKeys(
    root=tuple(key_of(name).public for name in ROOT_SIGNERS),
    threshold=2,
    targets=key_of("targets").public,
    snapshot=key_of("snapshot").public,
    timestamp=key_of("timestamp").public,
)
ONLINE = OnlineKeys(snapshot=key_of("snapshot"), timestamp=key_of("timestamp"))
NOW = datetime.now(UTC)


class Consortium:
    """A run study with two releases as folders, and a repository to publish them in."""

    def __init__(self, directory: Path, *, now: datetime = NOW) -> None:
        self.directory = directory
        self.repository = directory / "repository"
        self.ledger = Ledger(study(rounds=3))
        self.values = run_study(self.ledger, 3)
        self.trust: LedgerTrust = trust_of(self.ledger.manifest, origin=ORIGIN)
        self.root = self.signed_root(1, ROOT_SIGNERS[:2], now=now)
        install_root(self.repository, self.root)
        initialise(self.repository, targets=key_of("targets"), online=ONLINE, now=now)

    def signed_root(self, version: int, signers: tuple[str, ...], *, now: datetime = NOW) -> bytes:
        root = propose_root(KEYS, version=version, now=now)
        for name in signers:
            root = sign_root(root, key_of(name))
        return root

    def release(self, version: int) -> Path:
        site, epsilon = self.values[version - 1]
        _, files = add_release(self.ledger, version - 1, version=version, site=site, epsilon=epsilon)
        folder = self.directory / f"release-{version}"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    def publish(self, version: int, *, now: datetime = NOW) -> Path:
        folder = self.release(version)
        publish_release(
            self.repository, folder, trusts=[self.trust], targets=key_of("targets"), online=ONLINE, now=now
        )
        return folder

    def permit_rollback(self, frm: int, to: int) -> tuple[bytes, bytes]:
        index = self.ledger.add(ReleaseRollback(frm=frm, to=to, code="worse-at-a-site"), OPERATOR)
        note = self.ledger.checkpoint()
        proof = LedgerProof(index, self.ledger.tree.prove_inclusion(index), note)
        return self.ledger.leaves[index], format_ledger_proof(proof)

    def publish_rollback(self, leaf: bytes, proof: bytes) -> None:
        publish_rollback(
            self.repository,
            leaf,
            proof,
            trusts=[self.trust],
            targets=key_of("targets"),
            online=ONLINE,
            now=NOW,
        )
