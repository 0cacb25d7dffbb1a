"""Image files as model input, prepared as the base's `preprocessor_config.json` says.

Resize, centre crop, rescale and normalise follow Hugging Face's `CLIPImageProcessor`, with Pillow and numpy
alone. Guarantees: a truncated, corrupt, oversized or non-image file is an error that names the file; pixels
are read fully or not at all. It does not read DICOM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from common.errors import BaseInvalid, ImageUnreadable

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How a base wants its pictures; sizes in pixels, `resample` is Pillow's filter number."""

    height: int
    width: int
    shortest_edge: int | None
    crop: tuple[int, int] | None
    resample: int
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_processor(base_dir: Path) -> ImageProcessor:
    """Read `preprocessor_config.json` of a checkpoint directory; raises BaseInvalid."""
    path = base_dir / "preprocessor_config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise TypeError("expected an object")
        return parse_processor(config)
    except OSError as error:
        raise BaseInvalid(f"{path}: expected a preprocessor config, got {type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BaseInvalid(f"{path}: expected a CLIP-style preprocessor config ({error})") from error


def processor_config(side: int, *, mean: Sequence[float], std: Sequence[float]) -> dict[str, object]:
    """Make a `preprocessor_config.json`: the whole picture, squeezed to a square; nothing is cropped."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": True,
    }


def parse_processor(config: Mapping[str, object]) -> ImageProcessor:
    """Turn a CLIP-style config into an ImageProcessor; raises ValueError, KeyError or TypeError."""
    size = config.get("size")
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    mean = config.get("image_mean", [0.0] * 3) if config.get("do_normalize", True) else [0.0] * 3
    std = config.get("image_std", [1.0] * 3) if config.get("do_normalize", True) else [1.0] * 3
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    resample = config.get("resample", 3)
    if not isinstance(size, Mapping) or not isinstance(scale, float | int) or not isinstance(resample, int):
        raise TypeError("size, rescale_factor or resample")
    edge = size.get("shortest_edge")
    height, width = (edge, edge) if edge is not None else (size["height"], size["width"])
    return ImageProcessor(
        height=_count(height),
        width=_count(width),
        shortest_edge=None if edge is None else _count(edge),
        crop=None if crop is None else _crop(crop),
        resample=resample,
        rescale=float(scale),
        mean=_three(mean),
        std=_three(std),
    )


def load_pixels(path: Path, base: Path | ImageProcessor) -> NDArray[np.float32]:
    """Read one image as float32 [3, H, W]; `base` is the checkpoint directory or its processor.

    16-bit greys are scaled to their own range. Raises ImageUnreadable with the file's name.
    """
    processor = base if isinstance(base, ImageProcessor) else read_processor(base)
    return prepare(read_rgb(path), processor)


def read_rgb(source: Path | BinaryIO) -> Image:
    """Read one stored image as RGB, as training sees it; 16-bit greys are scaled to their own range.

    Raises ImageUnreadable, with the file's name where there is one.
    """
    from PIL import Image

    named = f"{source}: " if isinstance(source, Path) else ""
    try:
        with Image.open(source) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageUnreadable(f"{named}expected at most {MAX_PIXELS} pixels, got {opened.size}")
            opened.load()
            if opened.mode in {"I", "F", "I;16", "I;16B", "I;16L"}:
                return Image.fromarray(scaled_to_bytes(np.asarray(opened))).convert("RGB")
            return opened.convert("RGB")
    except ImageUnreadable:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{named}expected a whole image, got {type(error).__name__}") from error


def scaled_to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale deep greys to their own range, 0 to 255."""
    deep = values.astype(np.float64)
    span = float(deep.max() - deep.min()) or 1.0
    return np.asarray((deep - deep.min()) * (255 / span)).astype(np.uint8)


def prepare(picture: object, processor: ImageProcessor) -> NDArray[np.float32]:
    """Resize, crop, rescale and normalise an RGB Pillow image to float32 [3, H, W]."""
    from PIL import Image

    if not isinstance(picture, Image.Image):
        raise TypeError("expected a Pillow image")
    height, width = processor.height, processor.width
    if processor.shortest_edge is not None:
        edge, short = processor.shortest_edge, min(picture.size)
        width, height = (int(edge * side / short) for side in picture.size)
    shown = picture.resize((width, height), Image.Resampling(processor.resample))
    if processor.crop is not None:
        tall, wide = processor.crop
        top, left = (height - tall) // 2, (width - wide) // 2
        shown = shown.crop((left, top, left + wide, top + tall))
    values = np.array(shown, dtype=np.float32)
    values *= np.float32(processor.rescale)
    values -= np.array(processor.mean, np.float32)
    values /= np.array(processor.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 < value <= 4096:
        raise ValueError("image size")
    return value


def _crop(value: object) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return _count(value["height"]), _count(value["width"])
    return _count(value), _count(value)


def _three(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple):
        raise TypeError("image_mean or image_std")
    one, two, three = (float(part) for part in value)
    return one, two, three
