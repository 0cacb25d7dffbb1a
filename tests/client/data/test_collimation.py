"""Burned-in collimation is cut, anatomy is not."""

import numpy as np
import pytest

from client.data.collimation import field_box
from client.data.pixels import Gray
from tests.client.data.synthetic_dicom import base_image


def chest(seed: int = 0) -> Gray:
    image = base_image(np.random.default_rng(seed), side=320)[:, 23:-23]
    return (image * 65535).astype(np.uint16)


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right"), [(0, 90, 0, 0), (30, 0, 0, 0), (0, 0, 50, 0), (20, 60, 30, 40)]
)
def test_dim_shutters_are_cut(top: int, bottom: int, left: int, right: int) -> None:
    image = chest()
    height, width = image.shape
    inside = np.zeros(image.shape, bool)
    inside[top : height - bottom, left : width - right] = True
    shown = np.where(inside, image, image // 4 + 3000).astype(np.uint16)
    cut = field_box(shown).of(shown)
    expected = (height - top - bottom, width - left - right)
    assert all(0 <= whole - part <= 8 for whole, part in zip(expected, cut.shape, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_image_without_shutters_stays_whole(seed: int) -> None:
    assert field_box(chest(seed)).of(chest(seed)).shape == chest(seed).shape


def test_shutters_that_leave_almost_nothing_leave_the_image_alone() -> None:
    tiny = np.full((70, 70), 20_000, np.uint16)
    tiny[25:45, 25:45] = 60_000
    assert field_box(tiny).of(tiny).shape == (70, 70)
