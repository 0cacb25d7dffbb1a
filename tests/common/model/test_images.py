"""Images become pixels as the base asks; damaged files are named."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import BaseInvalid, ImageUnreadable
from common.model.images import load_pixels, read_processor


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_config(
        tmp_path, size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )


def write_config(where: Path, **config: object) -> Path:
    (where / "preprocessor_config.json").write_text(json.dumps(config))
    return where


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_pixels_are_resized_and_normalised(base: Path) -> None:
    pixels = load_pixels(save(base / "a.png", np.full((80, 50), 255, np.uint8)), base)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32
    assert np.allclose(pixels, 2.0)


def test_pixels_equal_hugging_faces_clip_processor(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(0)
    path = save(tmp_path / "a.png", rng.integers(0, 255, (90, 61, 3), dtype=np.uint8))
    write_config(
        tmp_path,
        size={"shortest_edge": 40},
        crop_size={"height": 36, "width": 36},
        do_center_crop=True,
        image_mean=[0.48, 0.45, 0.4],
        image_std=[0.26, 0.26, 0.27],
    )
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    theirs = processor(Image.open(path), return_tensors="np")["pixel_values"][0]
    assert np.abs(load_pixels(path, tmp_path) - theirs).max() < 1e-5


def test_sixteen_bit_greys_keep_their_range(base: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = load_pixels(save(base / "a.png", values), base)
    assert pixels.min() < -1.8 and pixels.max() > 1.8


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_image_is_named(base: Path, keep: int) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    path = base / "broken.png"
    path.write_bytes(stream.getvalue()[:keep])
    with pytest.raises(ImageUnreadable, match=r"broken\.png"):
        load_pixels(path, base)


def test_flipped_bytes_are_named(base: Path) -> None:
    path = save(base / "flipped.png", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(ImageUnreadable, match=r"flipped\.png"):
        load_pixels(path, base)


def test_missing_image_is_named(base: Path) -> None:
    with pytest.raises(ImageUnreadable, match=r"none\.png"):
        load_pixels(base / "none.png", base)


def test_huge_image_is_refused_before_it_is_decoded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.model.images.MAX_PIXELS", 100)
    with pytest.raises(ImageUnreadable, match="at most 100 pixels"):
        load_pixels(save(base / "big.png", np.zeros((20, 20), np.uint8)), base)


@pytest.mark.parametrize("content", ["", "{}", '{"size": 3}', '{"size": {"height": -1, "width": 4}}', "[]"])
def test_bad_preprocessor_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(BaseInvalid, match=r"preprocessor_config\.json"):
        read_processor(tmp_path)


def test_missing_preprocessor_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseInvalid, match=r"preprocessor_config\.json"):
        read_processor(tmp_path)
