"""An update shows the patient's picture; the same update with the plan's noise does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from common.privacy.sampling import Csprng
from deploy.local.inversion import demonstrate
from tests.common.privacy.checks import plan_of


@pytest.mark.slow
def test_a_picture_comes_out_of_an_un_noised_update_and_not_out_of_a_noised_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    shown = demonstrate(tmp_path, plan_of(clip_norm=1.0), Csprng.for_test(0), steps=120)
    assert shown.un_noised.correlation_beyond_mean > 0.6
    assert abs(shown.noised.correlation_beyond_mean) < 0.35
    assert shown.un_noised.correlation > 0.9 > shown.noised.correlation
    for name in shown.pictures.values():
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (256, 256)
