"""What a site refuses to run: TUF's attacks and the ledger's, each by name."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.releases import Current, ModelStore
from common.errors import (
    FedRadError,
    ReleaseSourceUnreachable,
    ReleaseStale,
    ReleaseUnproven,
    RollbackNotPermitted,
    VersionUnknown,
)
from common.ledger.entries import OPERATOR
from common.ledger.output_checks import ADAPTER_NAME, ENTRY_NAME, PROOF_NAME
from common.ledger.release_proof import format_trust, parse_trust
from server.releases import (
    OnlineKeys,
    RoleKeys,
    initialise,
    install_root,
    propose_root,
    refresh,
    sign_root,
)
from tests.common.ledger.consortium import adapter_file, key_of
from tests.server_releases import NOW, ONLINE, ROOT_SIGNERS, Consortium

USER = "local:radiology"


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path / "operator")


@pytest.fixture
def store(tmp_path: Path, consortium: Consortium) -> ModelStore:
    return trusting(tmp_path / "site", consortium)


def trusting(directory: Path, consortium: Consortium) -> ModelStore:
    store = ModelStore(directory)
    store.trust(consortium.root, consortium.trust)
    return store


def source(consortium: Consortium) -> str:
    return str(consortium.repository)


# --- the good path ----------------------------------------------------------------------------------------


def test_pull_verify_and_use_the_newest_release(consortium: Consortium, store: ModelStore) -> None:
    consortium.publish(1)
    consortium.publish(2)
    assert store.pull(source(consortium)) == 2
    assert store.versions() == [2]
    assert store.use(2, time_s=100, by=USER) == Current(2, 0)
    assert store.pull(source(consortium), version=1) == 1
    assert store.verify(1).version == 1
    assert (store.folder(2) / ADAPTER_NAME).read_bytes() == adapter_file(2)
    assert store.decisions() == [{"by": USER, "frm": 0, "time_s": 100, "to": 2, "why": "newer"}]


def test_a_copied_stick_serves_as_well_as_the_folder(
    consortium: Consortium, store: ModelStore, tmp_path: Path
) -> None:
    consortium.publish(1)
    shutil.copytree(consortium.repository, tmp_path / "usb stick")
    assert store.pull(str(tmp_path / "usb stick")) == 1
    assert store.pull((tmp_path / "usb stick").as_uri()) == 1


def test_pulling_again_verifies_what_is_held(consortium: Consortium, store: ModelStore) -> None:
    consortium.publish(1)
    store.pull(source(consortium))
    (store.folder(1) / "model-card.md").write_bytes(b"No limits.")
    with pytest.raises(ReleaseUnproven, match="model-card"):
        store.pull(source(consortium))
    with pytest.raises(ReleaseUnproven, match="model-card"):
        store.use(1, time_s=1, by=USER)


# --- TUF's attacks ----------------------------------------------------------------------------------------


def test_rollback_attack_with_old_metadata_is_refused(
    consortium: Consortium, store: ModelStore, tmp_path: Path
) -> None:
    consortium.publish(1)
    old = tmp_path / "old"
    shutil.copytree(consortium.repository, old)
    consortium.publish(2)
    store.pull(source(consortium))
    with pytest.raises(ReleaseStale):
        store.pull(str(old))


def test_freeze_attack_with_expired_metadata_is_refused(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=3)
    frozen = Consortium(tmp_path / "operator", now=past)
    frozen.publish(1, now=past)
    store = trusting(tmp_path / "site", frozen)
    with pytest.raises(ReleaseStale, match="expired"):
        store.pull(source(frozen))
    refresh(frozen.repository, online=ONLINE, now=NOW)
    assert store.pull(source(frozen)) == 1


def test_mix_and_match_attack_is_refused(consortium: Consortium, store: ModelStore) -> None:
    consortium.publish(1)
    consortium.publish(2)
    metadata = consortium.repository / "metadata"
    (metadata / "3.targets.json").write_bytes((metadata / "2.targets.json").read_bytes())
    with pytest.raises(FedRadError) as error:
        store.pull(source(consortium))
    assert isinstance(error.value, ReleaseStale | ReleaseUnproven)
    assert store.versions() == []


def test_a_compromised_timestamp_and_snapshot_key_cannot_add_a_release(
    consortium: Consortium, store: ModelStore
) -> None:
    """The thief re-signs timestamp and snapshot over a targets file that only the offline key can make."""
    consortium.publish(1)
    metadata = consortium.repository / "metadata"
    targets = json.loads((metadata / "2.targets.json").read_text())
    targets["signed"]["version"] = 3
    targets["signed"]["targets"]["v9/evil.bin"] = {"length": 4, "hashes": {"sha256": "00" * 32}}
    (metadata / "3.targets.json").write_text(json.dumps(targets))
    refresh(consortium.repository, online=ONLINE, now=NOW)
    with pytest.raises(ReleaseUnproven):
        store.pull(source(consortium))
    assert store.versions() == []


def test_a_timestamp_signed_with_a_stolen_other_key_is_refused(
    consortium: Consortium, store: ModelStore
) -> None:
    consortium.publish(1)
    from tuf.api.metadata import Metadata

    path = consortium.repository / "metadata" / "timestamp.json"
    metadata = Metadata.from_file(str(path))
    from securesystemslib.signer import CryptoSigner

    metadata.sign(CryptoSigner(key_of("mallory").private))
    path.write_bytes(metadata.to_bytes())
    with pytest.raises(ReleaseUnproven):
        store.pull(source(consortium))


def test_another_repository_under_another_root_is_refused(
    consortium: Consortium, store: ModelStore, tmp_path: Path
) -> None:
    keys = {role: key_of(f"mallory {role}") for role in ("root", "targets", "snapshot", "timestamp")}
    forged = tmp_path / "forged"
    public = {role: key.public for role, key in keys.items()}
    root = propose_root(
        RoleKeys((public["root"],), 1, public["targets"], public["snapshot"], public["timestamp"]),
        version=1,
        now=NOW,
    )
    install_root(forged, sign_root(root, keys["root"]))
    online = OnlineKeys(snapshot=keys["snapshot"], timestamp=keys["timestamp"])
    initialise(forged, targets=keys["targets"], online=online, now=NOW)
    with pytest.raises(ReleaseUnproven):
        store.pull(str(forged))


@pytest.mark.parametrize("how", ["swap", "grow", "drop"])
def test_adapter_swapped_in_the_repository_is_refused(
    how: str, consortium: Consortium, store: ModelStore
) -> None:
    consortium.publish(1)
    (path,) = (consortium.repository / "targets" / "v1").glob(f"*.{ADAPTER_NAME}")
    if how == "drop":
        path.unlink()
    else:
        path.write_bytes(adapter_file(99) if how == "swap" else path.read_bytes() + b"x")
    with pytest.raises((ReleaseUnproven, ReleaseSourceUnreachable)):
        store.pull(source(consortium))
    assert store.versions() == [] and not list((store.directory / "versions").iterdir())


# --- the ledger's attacks: the thief holds every TUF key, only the ledger stands in the way -----------------


def replace_in(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


def republished(consortium: Consortium, change: Callable[[Path], None]) -> None:
    """Publish a changed folder with the operator's real TUF keys, past the server's own check."""
    from server import releases

    folder = consortium.release(1)
    change(folder)
    files = {f"v1/{p.name}": p.read_bytes() for p in folder.iterdir()}
    releases._publish(consortium.repository, files, targets=key_of("targets"), online=ONLINE, now=NOW)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda f: (f / PROOF_NAME).unlink(), PROOF_NAME),
        (lambda f: (f / ENTRY_NAME).unlink(), ENTRY_NAME),
        (lambda f: (f / ADAPTER_NAME).write_bytes(adapter_file(99)), ADAPTER_NAME),
        (lambda f: (f / "loader.py").write_bytes(b"import os"), "extra file loader.py"),
        (lambda f: (f / "model-card.md").unlink(), "model-card.md"),
        (lambda f: (f / "study.json").write_bytes(b"{}"), "study.json"),
        (lambda f: replace_in(f / ENTRY_NAME, b'"version":1', b'"version":2'), "ledger proof"),
    ],
)  # fmt: skip
def test_release_not_in_the_ledger_is_refused_although_tuf_accepts_it(
    change: Callable[[Path], None], message: str, consortium: Consortium, store: ModelStore
) -> None:
    republished(consortium, change)
    with pytest.raises(ReleaseUnproven, match=message):
        store.pull(source(consortium))
    assert store.versions() == []


def test_a_proof_below_the_witness_quorum_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    original = consortium.ledger.checkpoint
    consortium.ledger.checkpoint = lambda cosigners=None: original(("amber",))  # type: ignore[method-assign]
    republished(consortium, lambda folder: None)
    with pytest.raises(ReleaseUnproven, match="expected cosignatures of 2"):
        trusting(tmp_path / "site", consortium).pull(source(consortium))


def test_a_version_under_another_number_is_refused(consortium: Consortium, store: ModelStore) -> None:
    from server import releases

    folder = consortium.release(1)
    files = {f"v5/{p.name}": p.read_bytes() for p in folder.iterdir()}
    releases._publish(consortium.repository, files, targets=key_of("targets"), online=ONLINE, now=NOW)
    with pytest.raises(ReleaseUnproven, match="expected version 5, got 1"):
        store.pull(source(consortium))


# --- switching and going back -----------------------------------------------------------------------------


@pytest.fixture
def two(consortium: Consortium, store: ModelStore) -> ModelStore:
    for version in (1, 2):
        consortium.publish(version)
        store.pull(source(consortium))
        store.use(version, time_s=version, by=USER)
    return store


def test_an_older_version_without_permission_or_pin_is_refused(two: ModelStore) -> None:
    with pytest.raises(RollbackNotPermitted):
        two.rollback(time_s=3, by=USER)
    assert two.current() == Current(2, 1)


def test_a_local_pin_goes_back_and_is_recorded(two: ModelStore) -> None:
    assert two.rollback(time_s=3, by=USER, pin_reason="drafts were worse here") == Current(1, 2)
    assert two.decisions()[-1]["why"] == "pin: drafts were worse here"
    with pytest.raises(RollbackNotPermitted, match="one line"):
        two.use(2, time_s=4, by=USER, pin_reason="two\nlines")


def test_a_permission_in_the_ledger_goes_back(consortium: Consortium, two: ModelStore) -> None:
    leaf, proof = consortium.permit_rollback(2, 1)
    consortium.publish_rollback(leaf, proof)
    two.pull(source(consortium))
    assert two.rollback(time_s=3, by=USER) == Current(1, 2)
    assert two.decisions()[-1]["why"] == "permitted: worse-at-a-site"


def test_a_forged_permission_is_refused(consortium: Consortium, two: ModelStore) -> None:
    leaf, proof = consortium.permit_rollback(2, 1)
    (two.directory / "rollbacks").mkdir()
    bad = {"entry": leaf.decode().replace("worse", "worst"), "proof": proof.decode()}
    (two.directory / "rollbacks" / "2-1.json").write_text(json.dumps(bad))
    with pytest.raises(ReleaseUnproven):
        two.rollback(time_s=3, by=USER)


def test_a_torn_last_decision_is_cut_off_before_the_next(two: ModelStore) -> None:
    path = two.directory / "decisions.jsonl"
    before = two.decisions()
    path.write_bytes(path.read_bytes() + b'{"by": "local')
    assert two.decisions() == before
    two.rollback(time_s=300, by=USER, pin_reason="a look at the older one")
    assert [decision["to"] for decision in two.decisions()] == [*(d["to"] for d in before), 1]


def test_using_the_current_version_again_changes_nothing(two: ModelStore) -> None:
    assert two.use(2, time_s=9, by=USER) == Current(2, 1)
    assert len(two.decisions()) == 2


# --- clear refusals ---------------------------------------------------------------------------------------


def test_an_unknown_version_source_or_missing_trust_is_named(
    consortium: Consortium, store: ModelStore, tmp_path: Path
) -> None:
    with pytest.raises(VersionUnknown, match="published versions"):
        store.pull(source(consortium))
    consortium.publish(1)
    with pytest.raises(VersionUnknown, match="got 7"):
        store.pull(source(consortium), version=7)
    with pytest.raises(VersionUnknown, match="pull it first"):
        store.use(1, time_s=1, by=USER)
    with pytest.raises(VersionUnknown, match="previous"):
        store.rollback(time_s=1, by=USER)
    with pytest.raises(ReleaseSourceUnreachable, match="metadata"):
        store.pull(str(tmp_path / "nowhere"))
    with pytest.raises(ReleaseSourceUnreachable, match="scheme"):
        store.pull("http://models.example/repository")
    with pytest.raises(ReleaseUnproven, match="enrol first"):
        ModelStore(tmp_path / "fresh").pull(source(consortium))


def test_a_pinned_root_or_ledger_is_never_replaced(consortium: Consortium, store: ModelStore) -> None:
    store.trust(consortium.root, consortium.trust)
    with pytest.raises(ReleaseUnproven, match="never replaced"):
        store.trust(consortium.signed_root(1, ROOT_SIGNERS), consortium.trust)
    assert parse_trust(format_trust(consortium.trust)) == consortium.trust


def test_a_symbolic_link_out_of_the_repository_is_not_followed(
    consortium: Consortium, store: ModelStore, tmp_path: Path
) -> None:
    consortium.publish(1)
    (path,) = (consortium.repository / "targets" / "v1").glob(f"*.{ADAPTER_NAME}")
    (tmp_path / "outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ReleaseSourceUnreachable):
        store.pull(source(consortium))


def test_a_new_root_signed_by_the_old_threshold_is_followed(
    consortium: Consortium, store: ModelStore
) -> None:
    install_root(consortium.repository, consortium.signed_root(2, (OPERATOR, "birch")))
    consortium.publish(1)
    assert store.pull(source(consortium)) == 1


# --- a version that could not be run ----------------------------------------------------------------------


def test_a_version_that_failed_is_put_back_and_is_no_way_back_to_it(
    consortium: Consortium, store: ModelStore
) -> None:
    for version in (1, 2):
        consortium.publish(version)
        store.pull(source(consortium))
    first = store.use(1, time_s=1, by=USER)
    store.use(2, time_s=2, by=USER)
    assert store.put_back(2, first, time_s=3, by="local:canary", why="CanaryFailed")
    assert store.current() == Current(1, 0)
    assert store.decisions()[-1] == {
        "by": "local:canary", "frm": 2, "time_s": 3, "to": 1, "why": "failed: CanaryFailed",
    }  # fmt: skip
    with pytest.raises(VersionUnknown, match="expected a previous"):
        store.rollback(time_s=4, by=USER)
    assert store.use(2, time_s=5, by=USER) == Current(2, 1)  # it may be tried again


def test_a_later_decision_is_not_put_back(consortium: Consortium, store: ModelStore) -> None:
    for version in (1, 2):
        consortium.publish(version)
        store.pull(source(consortium))
    first = store.use(1, time_s=1, by=USER)
    assert not store.put_back(2, first, time_s=3, by="local:canary", why="CanaryFailed")
    assert len(store.decisions()) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"version":1}', '{"version":"1","previous":0}', "{"])
def test_a_damaged_choice_of_version_is_named(store: ModelStore, text: str) -> None:
    assert store.current() is None
    store.directory.mkdir(parents=True, exist_ok=True)
    (store.directory / "current.json").write_text(text)
    with pytest.raises(VersionUnknown, match=r"current\.json"):
        store.current()


def test_decisions_of_two_processes_wait_for_each_other(consortium: Consortium, store: ModelStore) -> None:
    consortium.publish(1)
    store.pull(source(consortium))
    with (store.directory / ".deciding.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as threads:
            deciding = threads.submit(store.use, 1, time_s=1, by=USER)
            with pytest.raises(TimeoutError):
                deciding.result(0.2)
            assert store.current() is None
            fcntl.flock(other, fcntl.LOCK_UN)
            assert deciding.result(60) == Current(1, 0)


def test_what_is_no_signed_root_is_not_pinned(consortium: Consortium, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "fresh")
    targets = max((consortium.repository / "metadata").glob("*.targets.json"))
    for wrong in (b"", b"{}", b"a file of another kind", targets.read_bytes(), consortium.signed_root(1, ())):
        with pytest.raises(ReleaseUnproven, match="expected a release repository's"):
            store.trust(wrong, consortium.trust)
    assert not store.directory.exists()
    store.trust(consortium.root, consortium.trust)
