"""A site's directory: settings, received studies, approval and its withdrawal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.home import (
    Decision,
    SiteHome,
    SiteHomeInvalid,
    approve_study,
    create_home,
    find_study,
    list_studies,
    open_home,
    read_approved_study,
    read_decision,
    read_study,
    receive_study,
    refuse_study,
    verify_data,
)
from common.config import Study, format_study
from common.errors import (
    BaseInvalid,
    DataInsufficient,
    KeyFileInvalid,
    ManifestInvalid,
    SignatureInvalid,
    StudyNotApproved,
    StudyUnknown,
)
from common.identity import Purpose, SigningKey
from tests.simulator import Consortium, build


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return build(tmp_path_factory.mktemp("home"), mode="plain")


@pytest.fixture
def home(world: Consortium, tmp_path: Path) -> SiteHome:
    """Site alpha's home with its real key, before it has received any study."""
    real = open_home(world.out / "sites" / "alpha")
    (tmp_path / "keys").mkdir(mode=0o700)
    (tmp_path / "keys" / "message.key").write_bytes(real.key_path.read_bytes())
    (tmp_path / "keys" / "message.key").chmod(0o600)
    return create_home(
        tmp_path, site="alpha", operator_key=real.operator_key, data=real.data, bases=real.bases
    )


def offer(
    world: Consortium, home: SiteHome, study: Study | None = None, key: SigningKey | None = None
) -> Study:
    manifest = format_study(study or world.study)
    return receive_study(home, manifest, (key or world.operator).sign(Purpose.STUDY, manifest))


def test_a_home_opens_to_what_was_made(home: SiteHome) -> None:
    assert open_home(home.directory) == home
    assert home.key_path.stat().st_mode & 0o777 == 0o600


def test_making_a_home_again_keeps_its_key(home: SiteHome) -> None:
    before = home.message_key().public
    again = create_home(
        home.directory, site="alpha", operator_key=home.operator_key, data=home.data, bases={}, epsilon=1.0
    )
    assert again.message_key().public == before
    assert open_home(home.directory).epsilon == 1.0


@pytest.mark.parametrize(
    "change",
    [{"epsilon": -1}, {"delta": 0}, {"epsilon": "9"}, {"operator_key": "ab"}, {"bases": []}, {"extra": 1},
     {"data": None}, {"site": 3}, {"epsilon": True}],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_file(home: SiteHome, change: dict[str, Any]) -> None:
    path = home.directory / "site.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SiteHomeInvalid, match=r"site\.json"):
        open_home(home.directory)


def test_an_operator_key_that_is_none_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SiteHomeInvalid, match="operator_key"):
        create_home(tmp_path / "new", site="alpha", operator_key="ab", data=tmp_path, bases={})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\x80"])
def test_no_settings_are_refused_with_the_remedy(home: SiteHome, content: bytes | None) -> None:
    path = home.directory / "site.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(SiteHomeInvalid):
        open_home(home.directory)


def test_a_received_study_waits_for_approval(world: Consortium, home: SiteHome) -> None:
    study = offer(world, home)
    assert list_studies(home) == [study.sha256]
    assert read_study(home, study.sha256) == study
    with pytest.raises(StudyNotApproved, match="approve or refuse"):
        read_approved_study(home, study.sha256)
    approve_study(home, study.sha256)
    assert read_approved_study(home, study.sha256) == study


def test_an_approval_can_be_withdrawn_and_given_again(world: Consortium, home: SiteHome) -> None:
    sha256 = offer(world, home).sha256
    approve_study(home, sha256)
    refuse_study(home, sha256, "no")
    with pytest.raises(StudyNotApproved):
        read_approved_study(home, sha256)
    approve_study(home, sha256)
    read_approved_study(home, sha256)


def test_a_decision_is_later_than_the_one_before_whatever_the_clock_says(
    world: Consortium, home: SiteHome
) -> None:
    sha256 = offer(world, home).sha256
    assert read_decision(home, sha256) == Decision("", 0)
    approval = approve_study(home, sha256, clock=lambda: 1000.9).hex()
    assert read_decision(home, sha256) == Decision(approval, 1000)
    refuse_study(home, sha256, "second thoughts", clock=lambda: 500.0)
    assert read_decision(home, sha256) == Decision("", 1001)
    approve_study(home, sha256, clock=lambda: 2000.0)
    assert read_decision(home, sha256) == Decision(approval, 2000)
    (home.study_directory(sha256) / "decided").unlink()  # a study approved under an earlier release
    assert read_decision(home, sha256) == Decision(approval, 0)


def test_receiving_a_refused_study_again_does_not_approve_it(world: Consortium, home: SiteHome) -> None:
    sha256 = offer(world, home).sha256
    refuse_study(home, sha256, "no")
    offer(world, home)
    with pytest.raises(StudyNotApproved):
        read_approved_study(home, sha256)


def test_a_study_that_the_operator_did_not_sign_is_refused(world: Consortium, home: SiteHome) -> None:
    with pytest.raises(SignatureInvalid):
        offer(world, home, key=SigningKey.generate())
    assert list_studies(home) == []


def test_a_study_of_another_operator_is_refused(world: Consortium, home: SiteHome) -> None:
    key = SigningKey.generate()
    other = replace(world.study, cohort=replace(world.study.cohort, operator_key=key.public))
    with pytest.raises(StudyNotApproved, match="operator key"):
        offer(world, home, other, key)


def test_a_draft_is_refused(world: Consortium, home: SiteHome) -> None:
    draft = replace(world.study, base=replace(world.study.base, files=()))
    with pytest.raises(ManifestInvalid, match=r"base\.files"):
        offer(world, home, draft)


def test_a_study_that_gives_this_site_another_key_cannot_be_approved(
    world: Consortium, home: SiteHome
) -> None:
    sites = tuple(
        replace(s, message_key="ab" * 32) if s.id == "alpha" else s for s in world.study.cohort.site
    )
    study = offer(world, home, replace(world.study, cohort=replace(world.study.cohort, site=sites)))
    with pytest.raises(StudyNotApproved, match="message key"):
        approve_study(home, study.sha256)


def test_a_manifest_altered_on_disk_is_refused(world: Consortium, home: SiteHome) -> None:
    sha256 = offer(world, home).sha256
    path = home.study_directory(sha256) / "study.json"
    path.write_bytes(path.read_bytes().replace(b'"rounds":3', b'"rounds":4'))
    with pytest.raises(StudyUnknown):
        read_study(home, sha256)


def test_a_study_is_found_by_id_or_prefix_and_an_unknown_one_refused(
    world: Consortium, home: SiteHome
) -> None:
    sha256 = offer(world, home).sha256
    assert find_study(home, "small") == find_study(home, sha256[:9]) == sha256
    with pytest.raises(StudyUnknown):
        find_study(home, "large")
    with pytest.raises(StudyUnknown):
        read_study(home, "ab" * 32)


def test_missing_key_data_and_base_are_named(home: SiteHome, tmp_path: Path) -> None:
    with pytest.raises(BaseInvalid, match="llava"):
        home.base_directory("llava")
    with pytest.raises(DataInsufficient):
        verify_data(replace(home, data=tmp_path / "none"))
    home.key_path.unlink()
    with pytest.raises(KeyFileInvalid):
        home.message_key()


@pytest.mark.parametrize(
    "wrong",
    [{"site": "North Clinic"}, {"site": ""}, {"epsilon": -3.0}, {"epsilon": float("nan")}, {"delta": 1.5}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"site": "north", "operator_key": "", "data": tmp_path, "bases": {}, **wrong}
    with pytest.raises(SiteHomeInvalid, match=next(iter(wrong))):
        create_home(tmp_path / "home", **settings)
    assert not (tmp_path / "home").exists()
    create_home(tmp_path / "home", **{**settings, "site": "north", "epsilon": 20.0, "delta": 1e-5})


def test_an_enrolled_sites_directory_does_not_become_another_sites(tmp_path: Path) -> None:
    for site in ("nroth", "north"):  # until it is enrolled, a slip can be mended
        create_home(tmp_path, site=site, operator_key="", data=tmp_path, bases={})
    (tmp_path / "enrolment.json").write_text("{}")
    with pytest.raises(SiteHomeInvalid, match="north, got south"):
        create_home(tmp_path, site="south", operator_key="", data=tmp_path, bases={})


@pytest.mark.parametrize("held", [b"", b"{", b"\xff", b"[" * 100_000, None])
def test_settings_that_cannot_be_read_do_not_ask_for_a_new_enrolment(
    tmp_path: Path, held: bytes | None
) -> None:
    """`None`: a folder lies where the file should be."""
    path = tmp_path / "site.json"
    path.mkdir() if held is None else path.write_bytes(held)
    with pytest.raises(SiteHomeInvalid, match=r"site\.json: expected (JSON|a file that)") as refused:
        open_home(tmp_path)
    assert "enrol" not in str(refused.value)
    with pytest.raises(SiteHomeInvalid, match="run `fedrad-site enrol`"):
        open_home(tmp_path / "none")
