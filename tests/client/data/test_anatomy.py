"""The chest check: upright chests pass; turned, inverted and other images do not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.anatomy import FLAG, QUARANTINE, chest_score
from client.data.dicom import decode_dicom, read_dicom
from client.data.pixels import Gray, border_box
from tests.client.data.site_folder import radiograph
from tests.client.data.synthetic_dicom import base_image


def chest(seed: int) -> Gray:
    return (base_image(np.random.default_rng(seed), side=160) * 65535).astype(np.uint16)


@pytest.mark.parametrize("seed", range(8))
def test_upright_chest_passes_at_any_brightness(seed: int) -> None:
    image = chest(seed)
    assert chest_score(image) > QUARANTINE
    assert chest_score((image // 3 + 9000).astype(np.uint16)) > QUARANTINE
    assert chest_score(np.asarray(radiograph(seed)).astype(np.uint16) * np.uint16(257)) > FLAG


@pytest.mark.parametrize(
    "change",
    [np.rot90, lambda image: np.rot90(image, 3), lambda image: 65535 - image],
    ids=["left", "right", "inverted"],
)
def test_turned_or_inverted_chest_does_not_pass(change: Any) -> None:
    scores = [chest_score(np.ascontiguousarray(change(chest(seed)))) for seed in range(8)]
    assert max(scores) < FLAG
    assert sum(score < QUARANTINE for score in scores) >= 6


def other(kind: str) -> Gray:
    generator = np.random.default_rng(5)
    y, x = np.mgrid[0:160, 0:160] / 160
    pictures = {
        "noise": generator.uniform(0, 1, (160, 160)),
        "page": 1 - 0.9 * (generator.uniform(0, 1, (20, 20)).repeat(8, 0).repeat(8, 1) > 0.8),
        "limb": 0.1 + 0.7 * (np.abs(x - 0.5) < 0.2) + generator.normal(0, 0.001, (160, 160)),
        "ball": np.clip(1 - 3 * ((x - 0.5) ** 2 + (y - 0.5) ** 2), 0, 1),
        "slope": y,
    }
    return (np.clip(pictures[kind], 0, 1) * 65535).astype(np.uint16)


@pytest.mark.parametrize("kind", ["noise", "page", "limb", "ball", "slope"])
def test_other_pictures_are_quarantined(kind: str) -> None:
    assert chest_score(other(kind)) < QUARANTINE


def test_real_chest_passes_and_a_real_leg_does_not() -> None:
    store = pytest.importorskip("data_store")
    folder = Path(store.__path__[0]) / "data"
    scores = {}
    for name in ("RG1_UNCR", "RG3_UNCR"):
        shown = decode_dicom(read_dicom(folder / f"{name}.dcm", pixels=True))
        scores[name] = chest_score(border_box(shown).of(shown))
    assert scores["RG1_UNCR"] > 8
    assert scores["RG3_UNCR"] < QUARANTINE
