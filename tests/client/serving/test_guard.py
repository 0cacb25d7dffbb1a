"""The image guard: calibrated on own pictures, it refuses strangers; stored without pickle; header facts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.serving.guard import CalibratedGuard, calibrate_guard, read_guard
from client.serving.guard_image import format_guard, look, parse_guard, spoiled, tower_vector
from client.serving.picture import Picture, prepared
from common.errors import GuardNotCalibrated
from common.model import phantoms
from common.model.images import read_processor
from common.model.llava import vision_features
from common.model.loading import load_base
from common.model.tiny import tiny_base_directory
from tests.client.serving import strangers
from tests.client.serving.guard_figures import DATA, measure


class Tower:
    """The tiny base's vision tower as the guard asks for it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model, _ = load_base(tiny_base_directory())
        self.processor = read_processor(tiny_base_directory())

    def features(self, picture: Picture) -> Any:
        pixels = torch.from_numpy(prepared(picture, self.processor))[None]
        return vision_features(self.model, pixels)[0].float().numpy()

    async def __call__(self, picture: Picture) -> Any:
        return self.features(picture)

    def refused(self, guard: CalibratedGuard, picture: Picture) -> bool:
        return guard.decide(picture, self.features(picture), indication="", question="").refused


@pytest.fixture(scope="module")
def tower() -> Tower:
    return Tower()


def chest(seed: int) -> Picture:
    rng = np.random.default_rng([77, seed])
    findings = phantoms.draw_findings(rng, dict.fromkeys(phantoms.LABELS, 0.2))
    shown = phantoms.expose(phantoms.render(findings, rng), phantoms.Scanner(), rng)
    return Picture(f"{seed:064x}", shown, "png")


def folder_of(pictures: list[Picture], folder: Path) -> list[Path]:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number}.png")
        Image.fromarray(picture.pixels).save(paths[-1])
    return paths


def calibrated(paths: list[Path], tower: Tower) -> CalibratedGuard:
    return CalibratedGuard(
        asyncio.run(calibrate_guard(paths, tower, progress=lambda name, done, total: None))
    )


@pytest.fixture(scope="module")
def guard(tower: Tower, tmp_path_factory: pytest.TempPathFactory) -> CalibratedGuard:
    return calibrated(folder_of([chest(i) for i in range(60)], tmp_path_factory.mktemp("own")), tower)


def test_own_kind_passes_and_strangers_are_refused(guard: CalibratedGuard, tower: Tower) -> None:
    own = [tower.refused(guard, chest(1000 + i)) for i in range(60)]
    assert np.mean(own) <= 0.05
    families = strangers.made(np.random.default_rng(3), 5)
    families |= strangers.turned([chest(2000 + i).pixels for i in range(5)], np.random.default_rng(4))
    hits = [
        tower.refused(guard, Picture("s", pixels, "png")) for many in families.values() for pixels in many
    ]
    assert np.mean(hits) >= 0.95


def test_a_calibration_is_stored_and_read_back(guard: CalibratedGuard, tower: Tower, tmp_path: Path) -> None:
    again = parse_guard(format_guard(guard.image))
    picture = chest(5)
    rows = look(picture.pixels)[None], tower_vector(tower.features(picture))[None]
    assert again.score(*rows) == guard.image.score(*rows)
    (tmp_path / "g.npz").write_bytes(format_guard(guard.image))
    assert read_guard(tmp_path / "g.npz").image.threshold == guard.image.threshold
    (tmp_path / "g.npz").write_bytes(b"damaged")
    for path in (tmp_path / "g.npz", tmp_path / "none.npz"):
        with pytest.raises(GuardNotCalibrated):
            read_guard(path)


def test_own_images_of_any_size_can_be_spoiled() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (2, 7), (48, 60)):
        for _ in range(40):
            assert np.isfinite(look(spoiled(np.full(shape, 90, np.uint8), rng))).all()


def test_too_few_own_images_calibrate_nothing(tower: Tower, tmp_path: Path) -> None:
    with pytest.raises(GuardNotCalibrated, match="at least 40"):
        calibrated(folder_of([chest(i) for i in range(5)], tmp_path), tower)


@pytest.mark.parametrize(
    ("changes", "question", "code"),
    [
        ({}, "", ""),
        ({}, "Is there an effusion?", ""),
        ({}, "Write a poem.", "question-out-of-scope"),
        ({"kind": "dicom", "view": "lateral"}, "", "not-a-frontal-chest"),
        ({"kind": "dicom", "not_chest": True}, "", "not-a-frontal-chest"),
        ({"pixels": 255 - chest(6).pixels}, "", "image-out-of-domain"),
        ({"pixels": 255 - chest(6).pixels}, "Read this brain MRI.", "image-and-question"),
    ],
)
def test_wrong_image_wrong_words_or_both_are_named(
    guard: CalibratedGuard, tower: Tower, changes: dict[str, Any], question: str, code: str
) -> None:
    picture = Picture(**({"sha256": "x", "pixels": chest(6).pixels, "kind": "png"} | changes))
    decision = guard.decide(picture, tower.features(picture), indication="Cough.", question=question)
    assert (decision.code, decision.refused) == (code, bool(code))
    assert bool(decision.reason) == bool(decision.reason_zh) == decision.refused
    assert decision.ood_score is not None and decision.ood_threshold is not None


def test_a_score_that_is_no_number_is_refused(guard: CalibratedGuard, tower: Tower) -> None:
    broken = np.full_like(tower.features(chest(1)), np.nan)
    assert guard.decide(chest(1), broken, indication="", question="").refused


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/iu-xray")
def test_real_chest_images_pass_and_strangers_are_refused_where_no_choice_looked() -> None:
    """What is chosen on one half of patients and kinds is measured on the other: see guard_figures.py."""
    found = asyncio.run(measure(seeds=2))
    for which in ("chosen", "shipped"):
        _, _, most_false = found[which]["false_refusals"]
        _, least, _ = found[which]["recall"]
        _, least_real, _ = found[which]["recall_real"]
        assert most_false <= 0.03 and least >= 0.95 and least_real >= 0.95, found
    assert found["recall_of_spoiled_own_shipped"][1] >= 0.95, found
