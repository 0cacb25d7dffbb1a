"""Publishing: thresholds, keys, versions, and nothing without a ledger proof."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root

from common.errors import ReleaseUnproven, RepositoryInvalid
from common.ledger.entries import OPERATOR
from common.ledger.output_checks import PROOF_NAME
from common.ledger.release_proof import list_files, verify_release_folder
from server.releases import (
    OnlineKeys,
    RoleKeys,
    initialise,
    install_root,
    propose_root,
    publish_release,
    published_versions,
    refresh,
    sign_root,
)
from tests.common.ledger.consortium import ORIGIN, key_of
from tests.server_releases import KEYS, NOW, ONLINE, ROOT_SIGNERS, Consortium


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


def test_versions_are_published_in_order(consortium: Consortium) -> None:
    consortium.publish(1)
    consortium.publish(2)
    assert published_versions(consortium.repository) == [1, 2]
    names = {p.name for p in (consortium.repository / "metadata").iterdir()}
    assert {"1.root.json", "3.targets.json", "3.snapshot.json", "timestamp.json"} <= names


def test_a_release_without_its_ledger_proof_is_not_published(consortium: Consortium) -> None:
    folder = consortium.release(1)
    (folder / PROOF_NAME).unlink()
    with pytest.raises(ReleaseUnproven, match=PROOF_NAME):
        publish_release(
            consortium.repository,
            folder,
            trusts=[consortium.trust],
            targets=key_of("targets"),
            online=ONLINE,
            now=NOW,
        )
    assert published_versions(consortium.repository) == []


def test_the_same_version_twice_or_an_older_one_is_not_published(consortium: Consortium) -> None:
    first = consortium.publish(1)
    consortium.publish(2)
    with pytest.raises(RepositoryInvalid, match="after 2"):
        publish_release(
            consortium.repository,
            first,
            trusts=[consortium.trust],
            targets=key_of("targets"),
            online=ONLINE,
            now=NOW,
        )


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_key_that_the_root_does_not_name_publishes_nothing(role: str, consortium: Consortium) -> None:
    wrong = key_of("mallory")
    keys = {"targets": key_of("targets"), "snapshot": key_of("snapshot"), "timestamp": key_of("timestamp")}
    keys[role] = wrong
    folder = consortium.release(1)
    with pytest.raises(RepositoryInvalid, match=role):
        publish_release(
            consortium.repository, folder, trusts=[consortium.trust], targets=keys["targets"],
            online=OnlineKeys(snapshot=keys["snapshot"], timestamp=keys["timestamp"]), now=NOW,
        )  # fmt: skip


def test_a_root_below_the_hospitals_threshold_is_refused(tmp_path: Path, consortium: Consortium) -> None:
    with pytest.raises(RepositoryInvalid, match="root"):
        install_root(tmp_path / "other", consortium.signed_root(1, (OPERATOR,)))
    with pytest.raises(RepositoryInvalid, match="root"):
        install_root(consortium.repository, consortium.signed_root(2, ("birch",)))
    with pytest.raises(RepositoryInvalid, match="threshold"):
        propose_root(RoleKeys((KEYS.root[0],), 2, *[KEYS.targets] * 3), version=1, now=NOW)


def test_the_next_root_needs_the_signatures_of_the_one_before(consortium: Consortium) -> None:
    with pytest.raises(RepositoryInvalid, match="expected version 2, got 3"):
        install_root(consortium.repository, consortium.signed_root(3, ROOT_SIGNERS))
    install_root(consortium.repository, consortium.signed_root(2, ("amber", "birch")))
    taken_over = propose_root(
        RoleKeys((key_of("mallory").public,), 1, KEYS.targets, KEYS.snapshot, KEYS.timestamp),
        version=3,
        now=NOW,
    )
    with pytest.raises(RepositoryInvalid, match="root"):
        install_root(consortium.repository, sign_root(taken_over, key_of("mallory")))


@pytest.mark.parametrize("wrong", ["", "00", "zz" * 32, "0" * 63])
def test_a_key_that_is_none_makes_no_root(wrong: str) -> None:
    for keys in (replace(KEYS, root=(wrong,), threshold=1), replace(KEYS, snapshot=wrong)):
        with pytest.raises(RepositoryInvalid, match="64 hex digits"):
            propose_root(keys, version=1, now=NOW)


def test_what_is_no_root_is_neither_signed_nor_installed(consortium: Consortium) -> None:
    targets = max((consortium.repository / "metadata").glob("*.targets.json"))
    for wrong in (b"", b"{}", b"\xff", b"[" * 100_000, targets.read_bytes()):
        with pytest.raises(RepositoryInvalid, match="root: "):
            sign_root(wrong, key_of("amber"))
        with pytest.raises(RepositoryInvalid, match="root: "):
            install_root(consortium.repository, wrong)


def test_a_repository_without_a_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RepositoryInvalid, match="root first"):
        initialise(tmp_path, targets=key_of("targets"), online=ONLINE, now=NOW)
    with pytest.raises(RepositoryInvalid, match="targets metadata"):
        refresh(tmp_path, online=ONLINE, now=NOW)


def test_a_refresh_prolongs_without_the_offline_key(consortium: Consortium) -> None:
    consortium.publish(1)
    refresh(consortium.repository, online=ONLINE, now=NOW + timedelta(days=5))
    assert published_versions(consortium.repository) == [1]
    assert not (consortium.repository / "metadata" / "3.targets.json").exists()
    root = Metadata[Root].from_bytes((consortium.repository / "metadata" / "1.root.json").read_bytes())
    assert root.signed.roles["root"].threshold == 2


def test_a_rollback_is_published_only_with_its_ledger_proof(consortium: Consortium) -> None:
    consortium.publish(1)
    consortium.publish(2)
    leaf, proof = consortium.permit_rollback(2, 1)
    consortium.publish_rollback(leaf, proof)
    other, _ = consortium.permit_rollback(2, 7)
    with pytest.raises(ReleaseUnproven):
        consortium.publish_rollback(other, proof)
    leaf, proof = consortium.permit_rollback(9, 8)
    with pytest.raises(RepositoryInvalid, match="published version"):
        consortium.publish_rollback(leaf, proof)


def test_a_folder_is_listed_as_its_ledger_entry_has_it(consortium: Consortium) -> None:
    folder = consortium.release(1)
    release, checkpoint = verify_release_folder(folder, [consortium.trust], version=1)
    assert release.files == list_files(folder)
    assert checkpoint.origin == ORIGIN
    (folder / "nested").mkdir()
    with pytest.raises(ReleaseUnproven, match="plain files"):
        list_files(folder)
