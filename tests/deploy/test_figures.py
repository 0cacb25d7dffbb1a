"""The figure's short federated loop against the whole protocol, and the command that draws the figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from client.home import open_home
from common.config import Mode, parse_study_toml
from common.errors import DataInsufficient
from common.model.lora import initial_vector
from common.model.tiny import tiny_base_directory
from deploy.local.compare import training_parts
from deploy.local.figures import (
    SERIES,
    Workload,
    draw,
    given_workload,
    make,
    manifest_text,
    train_federated_inprocess,
)
from tests.simulator import POOL, build

WORKLOAD = Workload(Path("nowhere"), ("a", "b", "c", "d"), 2720, 20, {})


@pytest.mark.parametrize(
    ("mode", "strategy", "local_steps"),
    [("consortium", "alternating", 1), ("local", "joint", 2), ("plain", "frozen-a", 1)],
)
def test_the_loop_without_messages_gives_the_protocols_adapter_bit_for_bit(
    mode: str, strategy: str, local_steps: int, tmp_path: Path
) -> None:
    world = build(tmp_path, mode=mode, strategy=strategy, local_steps=local_steps, rounds=2)
    over_the_protocol = world.run().adapter
    world.close()
    study = world.study
    homes = {site: open_home(world.out / "sites" / site) for site in study.site_ids}
    initial = initial_vector(tiny_base_directory(), study.adapter)
    with POOL.use(study, tiny_base_directory()) as adapted:
        parts = training_parts(adapted, study, homes)
        short = train_federated_inprocess(adapted, study, parts, initial)
    assert not np.array_equal(short, initial)
    assert short.tobytes() == over_the_protocol.tobytes()


def test_a_points_manifest_is_private_at_its_epsilon_and_seeded() -> None:
    for series in SERIES:
        for epsilon in series.epsilons:
            study = parse_study_toml(manifest_text(WORKLOAD, series, epsilon, 3), source="point")
            assert study.testing is not None and study.testing.seed == 3
            assert study.adapter.strategy.value == series.strategy
            if math.isinf(epsilon):
                assert study.privacy.mode is Mode.PLAIN
            elif series.mode == "local":
                assert (study.privacy.mode, study.privacy.site_epsilon) == (Mode.LOCAL, epsilon)
            else:
                assert (study.privacy.mode, study.privacy.release_epsilon) == (Mode.CONSORTIUM, epsilon)


def test_a_folder_with_one_site_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "pairs.jsonl").write_text("")
    with pytest.raises(DataInsufficient, match="at least two sites, got 1"):
        given_workload(tmp_path, patients=900)


def test_the_picture_shows_every_series_and_stays_small(tmp_path: Path) -> None:
    points = [
        {"series": series.name, "epsilon": epsilon if math.isfinite(epsilon) else "inf", "seed": seed,
         "metrics": {"finding_f1": 0.7, "interval": {"finding_f1": [0.6, 0.8]}}}
        for series in SERIES for epsilon in series.epsilons for seed in (0, 1)
    ]  # fmt: skip
    document = {"points": points, "base": {"finding_f1": 0.5}, "data": {"nominal_patients": 2720}}
    draw(document, tmp_path / "a.svg")
    draw(document, tmp_path / "b.svg")
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert len(picture) < 100_000
    for series in SERIES:
        assert series.label in picture.decode()


@pytest.mark.slow
def test_the_command_makes_points_and_skips_those_it_has(tmp_path: Path) -> None:
    settings = {"seed": 1001, "repeats": 1, "data": None, "patients": 900, "name": "f1"}
    make(out=tmp_path, work=tmp_path / "work", quick=True, **settings)  # type: ignore[arg-type]
    first = json.loads((tmp_path / "f1.json").read_text())
    assert {point["series"] for point in first["points"]} == {series.name for series in SERIES}
    for point in first["points"]:
        assert point["metrics"]["interval"]["finding_f1"][0] <= point["metrics"]["finding_f1"]
        view = "site_epsilon" if point["series"] == "local" else "release_epsilon"
        assert 7.9 < point["privacy"][view] <= 8
    assert (tmp_path / "f1.svg").stat().st_size < 100_000

    lost = first["points"].pop(1)
    (tmp_path / "f1.json").write_text(json.dumps(first))
    make(out=tmp_path, work=tmp_path / "work", quick=True, **settings)  # type: ignore[arg-type]
    again = json.loads((tmp_path / "f1.json").read_text())
    made = next(point for point in again["points"] if point["series"] == lost["series"])
    assert made["metrics"] == lost["metrics"]  # seeded: the same point again
    assert [p for p in again["points"] if p is not made] == first["points"]  # with their seconds: kept
