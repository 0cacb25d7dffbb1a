"""A site's side of enrolment: keys made here, bundles installed only where they fit, rotation, renewal."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from client.enrolment import (
    certificate_fits_key,
    certificate_path,
    finish_rotation,
    install_bundle,
    load_ec_key,
    node_key_path,
    read_enrolled,
    renewal_request,
    request_enrolment,
    request_rotation,
    reserve_room,
    rotation_answer_request,
    set_keys_aside,
    tls_key_path,
    verify_operator,
)
from client.home import SiteHome, create_home, open_home
from common.enrolment import (
    Ask,
    SignedBundle,
    fingerprint_of,
    format_request,
    parse_request,
    sign_bundle,
    verify_request,
    verify_rotations,
    verify_site_request,
)
from common.errors import (
    CertificateInvalid,
    EnrolmentInvalid,
    FingerprintMismatch,
    KeyFileInvalid,
    SignatureInvalid,
    SiteNotEnrolled,
)
from common.identity import SigningKey, fingerprint
from server.consortium import ServerHome, create_server_home
from server.enrolment import approve, read_site, renew, rotate
from tests.full_disk import room_for

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
KEYS = ("tls.key", "node.key", "message.key", "witness.key")


@pytest.fixture()
def server(tmp_path: Path) -> ServerHome:
    return create_server_home(tmp_path / "srv", consortium="lab", address="localhost:8443", now=NOW)


def new_home(tmp_path: Path, server: ServerHome, site: str = "north") -> SiteHome:
    return create_home(
        tmp_path / site, site=site, operator_key=server.message_key().public, data=tmp_path, bases={}
    )


def answer(server: ServerHome, home: SiteHome, *, now: datetime = NOW) -> SignedBundle:
    request = request_enrolment(home, software="fedrad 0.1.0", now=now)
    return approve(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=now)


def test_four_keys_are_made_at_the_site_and_none_is_in_the_request(
    tmp_path: Path, server: ServerHome
) -> None:
    home = new_home(tmp_path, server)
    request = request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    verify_request(request)
    data = format_request(request)
    for name in KEYS:
        path = home.directory / "keys" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        secret = b"".join(path.read_bytes().split(b"\n")[1:-2])
        assert secret and secret not in data.replace(b"\\n", b"")
    assert b"PRIVATE" not in data


def test_asked_again_the_request_is_the_same(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    first = request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    assert request_enrolment(home, software="fedrad 0.1.0", now=NOW + timedelta(days=1)) == first
    (home.directory / "keys" / "tls.key").unlink()
    assert request_enrolment(home, software="fedrad 0.1.0", now=NOW) != first


def test_a_bundle_makes_the_site_enrolled_for_a_week(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    with pytest.raises(SiteNotEnrolled):
        read_enrolled(home)
    enrolled = install_bundle(home, answer(server, home))
    assert (enrolled.consortium, enrolled.host, enrolled.port) == ("lab", "localhost", 8443)
    assert enrolled.not_after == NOW + timedelta(days=7)
    assert enrolled.renew_after == NOW + timedelta(days=7) * 2 / 3


def test_the_operators_key_is_believed_after_the_call_only(tmp_path: Path, server: ServerHome) -> None:
    home = replace(new_home(tmp_path, server), operator_key="")
    signed = answer(server, home)
    with pytest.raises(SignatureInvalid):
        install_bundle(home, signed)
    with pytest.raises(FingerprintMismatch):
        verify_operator(signed, fingerprint_read_out="0000 0000 0000 0000 0000 0000 0000 0000")
    verify_operator(signed, fingerprint_read_out=fingerprint(server.message_key().public).upper())


def test_a_bundle_of_another_site_operator_or_authority_is_refused(
    tmp_path: Path, server: ServerHome
) -> None:
    home, south = new_home(tmp_path, server), new_home(tmp_path, server, "south")
    signed = answer(server, home)
    with pytest.raises(EnrolmentInvalid, match="for site north"):
        install_bundle(home, answer(server, south))
    with pytest.raises(SignatureInvalid):
        install_bundle(home, sign_bundle(signed.bundle, SigningKey.generate()))
    install_bundle(home, signed)
    other = create_server_home(tmp_path / "other", consortium="lab", address="localhost:8443", now=NOW)
    request = request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    elsewhere = approve(other, other.authority(), request, fingerprint=fingerprint_of(request.keys), now=NOW)
    with pytest.raises(CertificateInvalid, match="expected this authority"):
        install_bundle(home, sign_bundle(elsewhere.bundle, server.message_key()))


def test_a_certificate_of_another_key_is_refused(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    signed = answer(server, home)
    tls_key_path(home).unlink()
    request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    with pytest.raises(CertificateInvalid, match="this site's TLS key"):
        install_bundle(home, signed)


def test_renewal_keeps_the_key_and_moves_the_end(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    key, later = tls_key_path(home).read_bytes(), NOW + timedelta(days=5)
    request = renewal_request(home, now=later, nonce="ab" * 16)
    assert request.request.ask is Ask.RENEW
    verify_site_request(request, message_key=home.message_key().public)
    signed = renew(server, server.authority(), "north", request.request.argument, now=later)
    assert install_bundle(home, signed).not_after == later + timedelta(days=7)
    assert tls_key_path(home).read_bytes() == key


@pytest.mark.parametrize("message_keys", [False, True])
def test_rotation_serves_with_the_old_keys_until_the_answer_is_in(
    tmp_path: Path, server: ServerHome, message_keys: bool
) -> None:
    home = new_home(tmp_path, server)
    old = install_bundle(home, answer(server, home))
    before = {name: (home.directory / "keys" / name).read_bytes() for name in KEYS}
    request = request_rotation(home, software="fedrad 0.1.0", now=NOW, message_keys=message_keys)
    assert request == parse_request(format_request(request))
    assert {name: (home.directory / "keys" / name).read_bytes() for name in KEYS} == before
    assert read_enrolled(home) == old
    signed = rotate(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=NOW)
    install_bundle(home, signed)
    changed = {name for name in KEYS if (home.directory / "keys" / name).read_bytes() != before[name]}
    assert changed == ({*KEYS} if message_keys else {"tls.key", "node.key"})
    assert not (home.directory / "next").exists()
    assert home.message_key().public == request.keys.message_key
    install_bundle(home, signed)  # a second time: nothing moves any more


def test_new_keys_put_the_old_ones_aside(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    old = {name: (home.directory / "keys" / name).read_bytes() for name in KEYS}
    aside = set_keys_aside(home, now=NOW)
    assert aside is not None and {name: (aside / name).read_bytes() for name in KEYS} == old
    with pytest.raises(SiteNotEnrolled):
        read_enrolled(home)
    request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    assert not {(home.directory / "keys" / name).read_bytes() for name in KEYS} & set(old.values())


def test_a_rotation_asked_twice_keeps_its_new_keys(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    first_bundle = answer(server, home)
    install_bundle(home, first_bundle)
    first = request_rotation(home, software="fedrad 0.1.0", now=NOW)
    second = request_rotation(home, software="fedrad 0.1.0", now=NOW)
    assert first.keys.node_key == second.keys.node_key
    verify_rotations(second, read_site(server, "north").enrolled)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    node_key_path(home).chmod(0o640)
    with pytest.raises(KeyFileInvalid, match="0600"):
        load_ec_key(node_key_path(home))


def test_keys_are_taken_from_systemds_credentials(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    request_enrolment(home, software="fedrad 0.1.0", now=NOW)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    public = home.message_key().public
    for name in KEYS:
        (home.directory / "keys" / name).rename(credentials / f"fedrad-{name}")
    opened = open_home(home.directory, credentials=credentials)
    assert opened.message_key().public == public
    assert tls_key_path(opened) == credentials / "fedrad-tls.key"
    with pytest.raises(KeyFileInvalid):
        open_home(home.directory).message_key()


def test_an_enrolled_site_without_a_key_makes_no_other(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    for name in KEYS:
        kept = (home.directory / "keys" / name).read_bytes()
        (home.directory / "keys" / name).unlink()
        again = new_home(tmp_path, server)
        with pytest.raises(KeyFileInvalid, match="--new-keys"):
            request_enrolment(again, software="fedrad 0.1.0", now=NOW)
        assert not (home.directory / "keys" / name).exists()
        (home.directory / "keys" / name).write_bytes(kept)
        (home.directory / "keys" / name).chmod(0o600)
    assert request_enrolment(home, software="fedrad 0.1.0", now=NOW).keys.site == "north"


def test_a_rotation_of_a_key_that_is_a_credential_is_refused_at_every_step(
    tmp_path: Path, server: ServerHome
) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    held, free = credentials / "fedrad-tls.key", home.directory / "keys" / "tls.key"
    opened = open_home(home.directory, credentials=credentials)

    free.rename(held)
    with pytest.raises(KeyFileInvalid, match="credential"):  # the operator's answer would end the old keys
        request_rotation(opened, software="fedrad 0.1.0", now=NOW)
    held.rename(free)
    signed = rotated(server, opened)
    free.rename(held)
    with pytest.raises(KeyFileInvalid, match="credential"):
        rotation_answer_request(opened, now=NOW, nonce="ab" * 16)
    with pytest.raises(KeyFileInvalid, match="credential"):
        install_bundle(opened, signed)
    held.rename(free)
    assert rotation_answer_request(opened, now=NOW, nonce="ab" * 16) is not None
    install_bundle(opened, signed)


def test_a_rotation_of_a_key_that_another_unit_holds_is_refused(tmp_path: Path, server: ServerHome) -> None:
    """The link's unit has no credential of the node key; the relay's has, and would keep the old one."""
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    rotated(server, home)
    (home.directory / "keys" / "node.key").rename(tmp_path / "fedrad-node.key")
    with pytest.raises(KeyFileInvalid, match=r"node\.key: .*credential"):
        rotation_answer_request(home, now=NOW, nonce="ab" * 16)


def rotated(server: ServerHome, home: SiteHome, *, message_keys: bool = False) -> SignedBundle:
    """Let the site ask for new keys and the operator answer."""
    request = request_rotation(home, software="fedrad 0.1.0", now=NOW, message_keys=message_keys)
    return rotate(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=NOW)


def key_bytes(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in KEYS}


def killed(act: Callable[[], object], *, step: int) -> bool:
    """Do it in a process of its own that dies by SIGKILL just before its `step`-th change to the disk."""
    child = os.fork()
    if child == 0:
        try:
            _die_at(step)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def _die_at(step: int) -> None:
    done = count()

    def deadly(really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*arguments, **more)

        return call

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def test_a_kill_at_any_step_of_new_keys_leaves_the_old_or_the_new_site(
    tmp_path: Path, server: ServerHome
) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    signed = rotated(server, home, message_keys=True)
    old, new = key_bytes(home.directory / "keys"), key_bytes(home.directory / "next")
    outcomes = set()
    for step in count():
        copy = replace(home, directory=tmp_path / f"killed-at-{step}")
        shutil.copytree(home.directory, copy.directory)
        whole = not killed(lambda copy=copy: install_bundle(copy, signed), step=step)  # type: ignore[misc]
        finish_rotation(copy)
        after = key_bytes(copy.directory / "keys")
        assert after in (old, new), f"killed before change {step}"
        assert certificate_fits_key(copy), f"killed before change {step}"
        if after == old:  # the server is asked again, or the bundle is installed again
            assert rotation_answer_request(copy, now=NOW, nonce="ab" * 16) is not None
            install_bundle(copy, signed)
        assert key_bytes(copy.directory / "keys") == new and certificate_fits_key(copy)
        assert rotation_answer_request(copy, now=NOW, nonce="ab" * 16) is None
        outcomes.add(after == new)
        shutil.rmtree(copy.directory)
        if whole:
            break
    assert outcomes == {False, True} and step >= 11


def test_what_a_kill_left_is_finished_before_keys_are_made_or_put_aside(
    tmp_path: Path, server: ServerHome
) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    signed = rotated(server, home)
    new = (home.directory / "next" / "tls.key").read_bytes()
    for step in count():
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(home.directory, copy)
        killed(lambda copy=copy: install_bundle(replace(home, directory=copy), signed), step=step)  # type: ignore[misc]
        if (copy / "next" / "enrolment.json").is_file():
            break
    again = tmp_path / "again"
    shutil.copytree(copy, again)
    request_rotation(replace(home, directory=again), software="fedrad 0.1.0", now=NOW)
    assert (again / "keys" / "tls.key").read_bytes() == new != (again / "next" / "tls.key").read_bytes()
    aside = set_keys_aside(replace(home, directory=copy), now=NOW)
    assert aside is not None and (aside / "tls.key").read_bytes() == new
    assert not (copy / "next").exists()


def test_a_full_disk_leaves_the_old_keys_and_their_certificate(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    signed, old = rotated(server, home), key_bytes(home.directory / "keys")
    empty = tmp_path / "empty"
    empty.touch()
    with room_for(empty, 4096), pytest.raises(OSError):
        reserve_room(home)  # nothing is asked for
    reserve_room(home)
    for room in (0, 200):
        with room_for(empty, room), pytest.raises(OSError):
            install_bundle(home, signed)
        assert key_bytes(home.directory / "keys") == old and certificate_fits_key(home)
    install_bundle(home, signed)
    assert certificate_fits_key(home) and not (home.directory / "next").exists()
    assert not (home.directory / "tls" / "room").exists()


def test_the_certificate_is_public_and_the_key_is_not(tmp_path: Path, server: ServerHome) -> None:
    home = new_home(tmp_path, server)
    install_bundle(home, answer(server, home))
    assert b"PRIVATE" not in certificate_path(home).read_bytes()
    assert stat.S_IMODE((home.directory / "keys").stat().st_mode) == 0o700
