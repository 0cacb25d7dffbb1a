"""A release's way through the ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import QuorumNotReached, ReleaseInvalid, ReleaseUnproven
from common.ledger.audit import verify_bundle
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of, verify_release_folder
from server.bundles import export_run
from server.cli import app
from server.release_log import ledger_head, log_release, make_release, prove_release, stated_data
from tests.simulator import Consortium, build


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Consortium]:
    made = build(tmp_path, mode="consortium", rounds=2)
    made.run()
    yield made
    made.close()


def test_a_release_is_made_logged_witnessed_and_proven(world: Consortium, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    make_release(world.server, folder, clock=world.clock)
    version = log_release(world.server, folder, site_epsilon=8.0, clock=world.clock)
    with pytest.raises(QuorumNotReached):
        prove_release(world.server, folder, version=version, clock=world.clock)
    with pytest.raises(ReleaseUnproven):
        verify_release_folder(folder, [trust_of(world.study)], allow_unprotected=True)
    world.run()  # the study has ended: this only has the log witnessed
    prove_release(world.server, folder, version=version, clock=world.clock)
    release, _ = verify_release_folder(folder, [trust_of(world.study)], allow_unprotected=True)
    assert (release.version, release.number) == (1, 1)
    assert ledger_head(world.server, clock=world.clock).witnesses == 4


def test_a_release_again_keeps_its_version_and_its_entry(world: Consortium, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    make_release(world.server, folder, clock=world.clock)
    first = log_release(world.server, folder, site_epsilon=8.0, clock=world.clock)
    size = ledger_head(world.server, clock=world.clock).size
    assert log_release(world.server, folder, site_epsilon=8.0, clock=world.clock) == first
    assert ledger_head(world.server, clock=world.clock).size == size


def test_the_card_names_data_in_buckets_both_epsilons_and_what_was_measured(
    world: Consortium, tmp_path: Path
) -> None:
    figures = {"finding_f1": 0.8125, "rouge_l": 0.5, "exact_match": 0.25, "n": 40}
    make_release(
        world.server, tmp_path / "release", clock=world.clock,
        evaluation={"metrics": {"federated": figures}, "by_group": {"alpha": figures}},
    )  # fmt: skip
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| alpha | <10 | " in card and "| federated | 0.812 |" in card
    assert "against anyone with this release" in card and "By site or subgroup" in card
    assert [use.site for use in stated_data(world.server, clock=world.clock)] == sorted(world.study.site_ids)


def test_a_study_that_has_not_ended_is_not_released(tmp_path: Path) -> None:
    unfinished = build(tmp_path, mode="plain", rounds=2)
    with pytest.raises(ReleaseInvalid, match="expected 2 rounds, got 0"):
        make_release(unfinished.server, tmp_path / "release")


def test_a_release_of_another_study_is_not_logged(world: Consortium, tmp_path: Path) -> None:
    other = build(tmp_path / "other", mode="plain", rounds=1)
    other.run()
    other.close()
    make_release(other.server, tmp_path / "release", clock=other.clock)
    with pytest.raises(Exception, match="expected"):
        log_release(world.server, tmp_path / "release", site_epsilon=0.0, clock=world.clock)


def test_the_audit_of_a_released_study_passes(world: Consortium, tmp_path: Path) -> None:
    folder = world.server / "releases" / "1"
    make_release(world.server, folder, clock=world.clock)
    from server.release_log import stated_site_epsilon

    site_epsilon = stated_site_epsilon(world.server, clock=world.clock)
    version = log_release(world.server, folder, site_epsilon=site_epsilon, clock=world.clock)
    world.run()
    prove_release(world.server, folder, version=version, clock=world.clock)
    bundle = export_run(world.server, exported_s=int(world.clock()), software="fedrad 0.1.0")
    report = verify_bundle(bundle, trusted=trust_of(world.study).log)
    assert [f for f in report.findings if f.status is Status.FAIL] == []
    assert {f.control: f.status for f in report.findings}["releases"] is Status.PASS


def test_the_commands_make_and_prove_say_what_comes_next(world: Consortium, tmp_path: Path) -> None:
    run: Callable[..., Any] = CliRunner().invoke
    folder = tmp_path / "release"
    made = run(app, ["release", "make", "--study", str(world.server), "--out", str(folder), "--json"])
    assert json.loads(made.stdout)["version"] == 1
    early = run(app, ["release", "prove", str(folder), "--study", str(world.server)])
    assert isinstance(early.exception, QuorumNotReached)
    world.clock.now = max(world.clock.now, 4_000_000_000.0)
    world.run()
    proven = run(app, ["release", "prove", str(folder), "--study", str(world.server), "--json"])
    assert json.loads(proven.stdout)["version"] == 1
