"""Keys: what signs what, and which files are refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import KeyFileInvalid, SignatureInvalid
from common.identity import (
    Purpose,
    SigningKey,
    fingerprint,
    load_key,
    load_or_create_key,
    save_key,
    verify_signature,
)

KEY = SigningKey.from_seed(b"k" * 32)


def test_a_signature_verifies_for_its_message_and_purpose() -> None:
    verify_signature(KEY.public, Purpose.STUDY, b"text", KEY.sign(Purpose.STUDY, b"text"))


@pytest.mark.parametrize("other", [purpose for purpose in Purpose if purpose is not Purpose.STUDY])
def test_a_signature_made_for_one_purpose_never_verifies_for_another(other: Purpose) -> None:
    with pytest.raises(SignatureInvalid):
        verify_signature(KEY.public, other, b"text", KEY.sign(Purpose.STUDY, b"text"))


def test_a_purpose_cannot_be_moved_into_the_message() -> None:
    text = b"\x00rest"
    with pytest.raises(SignatureInvalid):
        verify_signature(KEY.public, Purpose.STUDY, text + b"!", KEY.sign(Purpose.STUDY, text))


@pytest.mark.parametrize(
    ("public", "message", "cut"),
    [
        (SigningKey.from_seed(b"o" * 32).public, b"text", 64),
        (KEY.public, b"Text", 64),
        (KEY.public, b"text", 63),
    ],
)  # fmt: skip
def test_another_key_message_or_length_is_refused(public: str, message: bytes, cut: int) -> None:
    with pytest.raises(SignatureInvalid):
        verify_signature(public, Purpose.STUDY, message, KEY.sign(Purpose.STUDY, b"text")[:cut])


@pytest.mark.parametrize("public", ["", "zz" * 32, "ab", "ab" * 33])
def test_a_public_key_that_is_none_is_refused_by_name(public: str) -> None:
    with pytest.raises(SignatureInvalid):
        verify_signature(public, Purpose.STUDY, b"text", bytes(64))


def test_ed25519_is_that_of_rfc_8032() -> None:
    """Test vector 1 of RFC 8032: the public key of a seed."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert SigningKey.from_seed(seed).public == public


def test_a_key_file_is_for_its_owner_only_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "message.key"
    save_key(KEY, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path).public == KEY.public


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "message.key"
    save_key(KEY, path)
    with pytest.raises(KeyFileInvalid, match="never overwritten"):
        save_key(SigningKey.generate(), path)
    assert load_or_create_key(path).public == KEY.public


def test_a_key_is_made_where_there_is_none(tmp_path: Path) -> None:
    made = load_or_create_key(tmp_path / "message.key")
    assert load_key(tmp_path / "message.key").public == made.public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "message.key"
    save_key(KEY, path)
    path.chmod(mode)
    with pytest.raises(KeyFileInvalid, match="chmod 600"):
        load_key(path)


def test_a_missing_key_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KeyFileInvalid):
        load_key(tmp_path / "none.key")


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "message.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileInvalid):
        load_key(path)


@pytest.mark.parametrize("password", [None, b"secret"])
def test_a_key_of_another_kind_or_an_encrypted_one_is_refused(tmp_path: Path, password: bytes | None) -> None:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    private: X25519PrivateKey | object = X25519PrivateKey.generate()
    if password:
        encryption, private = serialization.BestAvailableEncryption(password), KEY.private
    path = tmp_path / "message.key"
    path.write_bytes(
        private.private_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
    )
    path.chmod(0o600)
    with pytest.raises(KeyFileInvalid):
        load_key(path)


def test_a_fingerprint_can_be_read_out_and_differs() -> None:
    words = fingerprint(KEY.public).split(" ")
    assert len(words) == 8 and all(len(word) == 4 for word in words)
    assert fingerprint(KEY.public) != fingerprint(SigningKey.from_seed(b"o" * 32).public)


def give_access(path: Path, *entries: tuple[int, int, int]) -> None:
    """Set a POSIX access list of (tag, permissions, id) beside the owner's, as the kernel stores it."""
    undefined = 0xFFFFFFFF
    whole = [(0x01, 4, undefined), *entries, (0x10, 4, undefined), (0x20, 0, undefined)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in whole)
    try:
        os.setxattr(path, "system.posix_acl_access", value)
    except OSError as error:
        pytest.skip(f"this file system has no access lists: {error.strerror}")
    assert path.stat().st_mode & 0o777 == 0o440


def test_a_credential_as_systemd_gives_it_to_a_services_user_is_read(tmp_path: Path) -> None:
    path = tmp_path / "fedrad-message.key"
    save_key(KEY, path)
    give_access(path, (0x02, 4, os.geteuid()), (0x04, 0, 0xFFFFFFFF))
    assert load_key(path).public == KEY.public


@pytest.mark.parametrize(
    "entries",
    [
        ((0x02, 4, 12345), (0x04, 0, 0xFFFFFFFF)),
        ((0x02, 4, os.geteuid()), (0x02, 4, 12345), (0x04, 0, 0xFFFFFFFF)),
        ((0x02, 4, os.geteuid()), (0x04, 4, 0xFFFFFFFF)),
        ((0x02, 4, os.geteuid()), (0x04, 0, 0xFFFFFFFF), (0x08, 4, 100)),
    ],
    ids=["another user", "two users", "the file's group", "another group"],
)
def test_an_access_list_that_lets_others_in_is_refused(
    tmp_path: Path, entries: tuple[tuple[int, int, int], ...]
) -> None:
    path = tmp_path / "message.key"
    save_key(KEY, path)
    give_access(path, *sorted(entries))
    with pytest.raises(KeyFileInvalid, match="0440"):
        load_key(path)


def test_a_key_that_its_group_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "message.key"
    save_key(KEY, path)
    path.chmod(0o440)
    with pytest.raises(KeyFileInvalid, match="0440"):
        load_key(path)
