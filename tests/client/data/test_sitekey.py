"""The site key file and what is derived from it."""

import stat
from pathlib import Path

import pytest

from client.data.sitekey import (
    SiteKey,
    date_shift,
    load_key,
    load_or_create_key,
    patient_pseudonym,
    study_pseudonym,
)
from common.errors import SiteKeyInvalid

KEY = SiteKey(bytes(range(32)))


def test_key_is_created_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep/site.key"
    first = load_or_create_key(path, fresh=bytes(32))
    second = load_or_create_key(path, fresh=bytes([1] * 32))
    assert first == second == SiteKey(bytes(32))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "site.key"
    load_or_create_key(path, fresh=bytes(32))
    path.chmod(mode)
    with pytest.raises(SiteKeyInvalid, match="0600"):
        load_key(path)


def test_missing_linked_or_malformed_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteKeyInvalid, match="found none"):
        load_key(tmp_path / "none")
    path = tmp_path / "site.key"
    load_or_create_key(path, fresh=bytes(32))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SiteKeyInvalid, match="plain file"):
        load_key(tmp_path / "link")
    path.write_text("abcd")
    with pytest.raises(SiteKeyInvalid, match="64 hex digits"):
        load_key(path)


def test_secret_is_not_shown(tmp_path: Path) -> None:
    assert KEY.secret.hex() not in repr(KEY)
    assert repr(KEY.secret) not in repr(KEY)


def test_pseudonyms_depend_on_key_and_purpose() -> None:
    assert patient_pseudonym(KEY, "MRN1") == patient_pseudonym(KEY, " MRN1 ")
    others = {
        patient_pseudonym(KEY, "MRN1"),
        patient_pseudonym(KEY, "MRN2"),
        patient_pseudonym(SiteKey(bytes(32)), "MRN1"),
        "p" + study_pseudonym(KEY, "MRN1")[1:],
    }
    assert len(others) == 4


def test_dates_of_a_patient_shift_together_into_the_past() -> None:
    shifts = {date_shift(KEY, f"p{n}").days for n in range(500)}
    assert date_shift(KEY, "p1") == date_shift(KEY, "p1")
    assert max(shifts) <= -1 and min(shifts) >= -3650 and len(shifts) > 400
