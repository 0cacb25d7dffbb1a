"""The acceptance test of an adapter on the operator's public set."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import AcceptanceSection
from common.errors import BaseHashMismatch, PublicSetInvalid
from common.model.lora import read_adapter
from common.model.tiny import tiny_base_directory
from server.acceptance import decide, due, open_judge, public_set_sha256, write_settings
from tests.simulator import Consortium, build, data_folder

TERMS = AcceptanceSection(every_rounds=2, max_increase=0.1, public_sha256="ab" * 32)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return shutil.copytree(data_folder() / "alpha", tmp_path / "public")


@pytest.fixture
def world(tmp_path: Path, public: Path) -> Consortium:
    terms = f'every_rounds = 2\nmax_increase = 0.1\npublic_sha256 = "{public_set_sha256(public)}"'
    world = build(tmp_path, mode="plain", rounds=3, acceptance=terms)
    write_settings(world.server, base=tiny_base_directory(), data=public)
    return world


@pytest.mark.parametrize(
    ("loss", "passed"), [(1.9, True), (2.1, True), (2.1001, False), (math.nan, False), (math.inf, False)]
)
def test_a_loss_is_accepted_up_to_the_tolerance_and_only_when_finite(loss: float, passed: bool) -> None:
    assert decide(TERMS, loss=loss, accepted_loss=2.0).passed is passed


def test_the_test_is_due_every_so_many_rounds_and_after_the_last(world: Consortium) -> None:
    assert [due(world.study, round) for round in range(3)] == [False, True, True]
    assert not any(due(replace(world.study, acceptance=None), round) for round in range(3))


def test_the_loss_is_that_of_the_model_and_a_wrecked_adapter_is_seen(world: Consortium) -> None:
    judge = open_judge(world.server, world.study)
    first = read_adapter(world.server / "initial", world.study.adapter.tensors)
    loss = judge(first)
    assert 0 < loss < 5 and judge(first) == loss
    noise = np.random.default_rng(0).standard_normal(first.size).astype(np.float32)
    assert not decide(TERMS, loss=judge(first + noise), accepted_loss=loss).passed


def test_a_study_with_an_acceptance_test_runs_and_logs_each_verdict(world: Consortium) -> None:
    world.run()
    world.close()
    lines = (world.server / "log.jsonl").read_text().splitlines()
    assert sum('"event": "acceptance"' in line and '"passed": true' in line for line in lines) == 2


def test_another_public_set_than_the_manifests_is_refused(world: Consortium, public: Path) -> None:
    image = sorted(public.rglob("*.png"))[0]
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(PublicSetInvalid, match="of the manifest"):
        open_judge(world.server, world.study)


def test_another_base_than_the_manifests_is_refused(world: Consortium, public: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base_directory(), tmp_path / "base")
    path = base / "config.json"
    path.write_bytes(path.read_bytes() + b" ")
    write_settings(world.server, base=base, data=public)
    with pytest.raises(BaseHashMismatch):
        open_judge(world.server, world.study)


def test_a_server_without_the_public_set_does_not_start(world: Consortium) -> None:
    (world.server / "acceptance.json").unlink()
    with pytest.raises(PublicSetInvalid, match="study sign --public"):
        world.run()


OUTSIDE = '{"study": "a", "images": ["../x.png"], "indication": "", "findings": ""}'


@pytest.mark.parametrize("line", ["no json", "{}", OUTSIDE])
def test_a_line_that_is_no_pair_is_named(public: Path, line: str) -> None:
    (public / "pairs.jsonl").write_text(line + "\n")
    with pytest.raises(PublicSetInvalid, match="line 1"):
        public_set_sha256(public)
