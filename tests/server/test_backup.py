from __future__ import annotations

import fcntl
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from common.errors import BackupInvalid, BackupRefused, FedRadError
from server.backup import (
    MANIFEST,
    is_key,
    read_passphrase,
    restore_backup,
    write_backup,
)
from server.status import read_view
from tests.server.study_folder import eventful, serve_round, write_folder

PASSPHRASE = b"correct horse battery staple"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("server") / "study"
    eventful(directory)
    return directory


def backup(directory: Path, file: Path, passphrase: bytes | None = PASSPHRASE) -> Path:
    write_backup(directory, file, passphrase=passphrase, now_unix_s=1_800_000_000, pause=lambda: None)
    return file


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_what_is_restored_is_byte_for_byte_what_was_there(study: Path, tmp_path: Path) -> None:
    file = backup(study, tmp_path / "b.fedrad")
    made = restore_backup(file, tmp_path / "new", passphrase=PASSPHRASE)
    assert files_of(tmp_path / "new") == files_of(study)
    assert made.keys == 1
    key = tmp_path / "new" / "keys" / "message.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_passphrase_no_key_is_in_the_file(study: Path, tmp_path: Path) -> None:
    file = backup(study, tmp_path / "b.fedrad", None)
    key = (study / "keys" / "message.key").read_bytes().splitlines()[1]
    assert key not in file.read_bytes()
    made = restore_backup(file, tmp_path / "new", passphrase=None)
    assert made.keys == 0
    assert not (tmp_path / "new" / "keys").exists()
    assert read_view(tmp_path / "new").rounds_done == 9


def test_with_a_passphrase_no_key_is_in_the_file_in_clear(study: Path, tmp_path: Path) -> None:
    data = backup(study, tmp_path / "b.fedrad").read_bytes()
    assert (study / "keys" / "message.key").read_bytes().splitlines()[1] not in data
    assert b"PRIVATE KEY" not in data


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("keys/anything", b""), ("authority/ca.key", b""), ("keys2/superexec.secret", b""),
        ("notes.txt", b"-----BEGIN EC PRIVATE KEY-----\n"), ("x/y", b"-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)  # fmt: skip
def test_a_key_is_known_by_its_folder_its_suffix_or_its_first_bytes(name: str, head: bytes) -> None:
    assert is_key(name, head)


def test_public_files_are_no_keys() -> None:
    assert not is_key("authority/ca.crt", b"-----BEGIN CERTIFICATE-----")
    assert not is_key("records.jsonl", b"{}")


def test_another_passphrase_is_refused(study: Path, tmp_path: Path) -> None:
    file = backup(study, tmp_path / "b.fedrad")
    with pytest.raises(BackupInvalid, match="passphrase"):
        restore_backup(file, tmp_path / "new", passphrase=b"another passphrase")
    with pytest.raises(BackupInvalid, match="passphrase"):
        restore_backup(file, tmp_path / "new", passphrase=None)
    assert not (tmp_path / "new").exists()
    restore_backup(file, tmp_path / "new", passphrase=None, without_keys=True)
    assert not (tmp_path / "new" / "keys").exists()


def test_any_changed_byte_is_refused_and_nothing_is_left(study: Path, tmp_path: Path) -> None:
    data = backup(study, tmp_path / "b.fedrad").read_bytes()
    damaged, refused = tmp_path / "d.fedrad", 0
    for position in range(0, len(data), max(1, len(data) // 43)):
        damaged.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            restore_backup(damaged, tmp_path / "new", passphrase=PASSPHRASE)
        except FedRadError:
            refused += 1
            assert not (tmp_path / "new").exists()
        else:  # padding between members, which nothing reads
            assert files_of(tmp_path / "new") == files_of(study)
            shutil.rmtree(tmp_path / "new")
    assert refused > 35
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_refused(study: Path, tmp_path: Path, share: float) -> None:
    data = backup(study, tmp_path / "b.fedrad").read_bytes()
    end = data.rindex(b"left_out")
    (tmp_path / "c.fedrad").write_bytes(data[: int(end * share)])
    with pytest.raises(BackupInvalid):
        restore_backup(tmp_path / "c.fedrad", tmp_path / "new", passphrase=PASSPHRASE)


def test_a_list_changed_with_its_files_is_refused_by_the_passphrase(study: Path, tmp_path: Path) -> None:
    """Hashes alone would not tell: whoever changes a file changes its hash too."""
    file = backup(study, tmp_path / "b.fedrad")
    with tarfile.open(file) as old, tarfile.open(tmp_path / "m.fedrad", "w") as new:
        for info in old.getmembers():
            data = old.extractfile(info).read()  # type: ignore[union-attr]
            if info.name == "traffic.json":
                data = data.replace(b"271360", b"271361")
            if info.name == MANIFEST:
                import hashlib

                value = json.loads(data)
                changed = (study / "traffic.json").read_bytes().replace(b"271360", b"271361")
                value["files"]["traffic.json"]["sha256"] = hashlib.sha256(changed).hexdigest()
                data = json.dumps(value).encode()
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    with pytest.raises(BackupInvalid, match="passphrase"):
        restore_backup(tmp_path / "m.fedrad", tmp_path / "new", passphrase=PASSPHRASE)


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a//b", "a/./b"])
def test_a_member_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "e.fedrad", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(BackupInvalid, match="plain names"):
        restore_backup(tmp_path / "e.fedrad", tmp_path / "deep" / "new", passphrase=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "e.fedrad", "w") as tar:
        info = tarfile.TarInfo("rounds")
        info.type, info.linkname = kind, "/etc"
        tar.addfile(info)
    with pytest.raises(BackupInvalid, match="regular files"):
        restore_backup(tmp_path / "e.fedrad", tmp_path / "new", passphrase=None)


def test_nothing_is_ever_replaced(study: Path, tmp_path: Path) -> None:
    file = backup(study, tmp_path / "b.fedrad")
    with pytest.raises(BackupRefused, match="never replaced"):
        backup(study, file)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "something").touch()
    with pytest.raises(BackupRefused, match="empty directory"):
        restore_backup(file, tmp_path / "new", passphrase=PASSPHRASE)
    with pytest.raises(BackupRefused, match="outside"):
        backup(study, study / "b.fedrad")
    with pytest.raises(BackupRefused, match="expected a server"):
        backup(tmp_path / "none", tmp_path / "c.fedrad")


def test_an_empty_directory_takes_a_restore(study: Path, tmp_path: Path) -> None:
    file = backup(study, tmp_path / "b.fedrad")
    (tmp_path / "new").mkdir()
    restore_backup(file, tmp_path / "new", passphrase=PASSPHRASE)
    assert (tmp_path / "new" / "study.json").is_file()


def test_a_running_servers_directory_is_copied_at_one_moment(tmp_path: Path) -> None:
    study = write_folder(tmp_path / "study")
    serve_round(tmp_path / "study", study, 0)
    with (tmp_path / "study" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        backup(tmp_path / "study", tmp_path / "b.fedrad")
    restore_backup(tmp_path / "b.fedrad", tmp_path / "new", passphrase=PASSPHRASE)
    assert read_view(tmp_path / "new").rounds_done == 1


def test_while_a_server_writes_the_copy_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import backup as module

    directory = tmp_path / "study"
    study = write_folder(directory)
    serve_round(directory, study, 0)
    copies = []
    original = module._copy

    def copy_while_a_round_ends(*args: object, **named: object) -> object:
        made = original(*args, **named)  # type: ignore[arg-type]
        copies.append(1)
        if len(copies) < 3:
            serve_round(directory, study, len(copies))
        return made

    monkeypatch.setattr(module, "_copy", copy_while_a_round_ends)
    backup(directory, tmp_path / "b.fedrad")
    restore_backup(tmp_path / "b.fedrad", tmp_path / "new", passphrase=PASSPHRASE)
    assert len(copies) == 3
    assert files_of(tmp_path / "new") == files_of(directory)


def test_a_directory_that_never_stays_still_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import backup as module

    directory = tmp_path / "study"
    write_folder(directory)
    original = module._copy

    def copy_while_something_is_written(*args: object, **named: object) -> object:
        made = original(*args, **named)  # type: ignore[arg-type]
        with (directory / "log.jsonl").open("a") as file:
            file.write("\n")
        return made

    monkeypatch.setattr(module, "_copy", copy_while_something_is_written)
    with pytest.raises(BackupRefused, match="stay still"):
        write_backup(
            directory, tmp_path / "b.fedrad", passphrase=None, now_unix_s=0, attempts=3, pause=lambda: None
        )
    assert list(tmp_path.iterdir()) == [directory]


def test_locks_sockets_logs_and_links_are_left_out_and_named(study: Path, tmp_path: Path) -> None:
    server = tmp_path / "server"
    shutil.copytree(study, server / "studies" / "chest")
    (server / "logs").mkdir()
    (server / "logs" / "superlink.log").write_text("x")
    (server / "link").symlink_to("/etc/passwd")
    made = write_backup(server, tmp_path / "b.fedrad", passphrase=None, now_unix_s=0)
    assert made.left_out == ("link",)
    with tarfile.open(tmp_path / "b.fedrad") as tar:
        names = tar.getnames()
    assert "studies/chest/study.json" in names
    assert not {name for name in names if "lock" in name or "logs" in name or "link" in name}


def test_a_study_that_does_not_verify_is_not_put_in_place(study: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(study, broken)
    (broken / "operator.sig").write_text("00" * 64)
    backup(broken, tmp_path / "b.fedrad")
    with pytest.raises(FedRadError):
        restore_backup(tmp_path / "b.fedrad", tmp_path / "new", passphrase=PASSPHRASE)
    assert not (tmp_path / "new").exists()


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("short\n")
    with pytest.raises(BackupInvalid, match="at least 12"):
        read_passphrase(tmp_path / "p")
    (tmp_path / "p").write_bytes(PASSPHRASE + b"\n")
    assert read_passphrase(tmp_path / "p") == PASSPHRASE


def test_a_whole_server_moves_with_its_authority_registry_and_studies(study: Path, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from server.consortium import create_server_home, open_server_home

    server = tmp_path / "server"
    home = create_server_home(
        server,
        consortium="lab",
        address="localhost:8443",
        now=datetime.now(UTC),
        passphrase=b"of the authority",
    )
    shutil.copytree(study, home.studies / "chest")
    (server / "state").mkdir()
    (server / "state" / "superlink.db").write_bytes(b"made again by `up`")
    backup(server, tmp_path / "b.fedrad")
    restore_backup(tmp_path / "b.fedrad", tmp_path / "new", passphrase=PASSPHRASE)
    moved = open_server_home(tmp_path / "new")
    assert moved.message_key().public == home.message_key().public
    assert (
        moved.authority(passphrase=b"of the authority").pem
        == home.authority(passphrase=b"of the authority").pem
    )
    assert read_view(moved.studies / "chest").rounds_done == 9
    assert not (tmp_path / "new" / "state").exists()
