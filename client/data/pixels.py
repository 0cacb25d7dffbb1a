"""Pixels of one radiograph: decode a raster file, reject what cannot be read, resize, encode as PNG.

Guarantees: declared dimensions are checked before anything is decompressed, a truncated or damaged file
is rejected and never padded, and the same input gives the same bytes. It does not look for burned-in
text (`burned_in.py` does) and does not judge diagnostic quality.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from client.data.study import Reason
from common.errors import StudyRejected

Gray = npt.NDArray[np.uint16]

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 64
_FORMATS = ("JPEG", "PNG")


def decode_raster(path: Path) -> Gray:
    """Decode a JPEG or PNG file to a 2-D uint16 array over the full range; raises StudyRejected."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(path, formats=_FORMATS) as image:
                verify_dimensions(*image.size)
                if getattr(image, "n_frames", 1) != 1:
                    raise StudyRejected(Reason.NOT_ORIGINAL)
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.mode in ("I;16", "I;16B", "I"):
                    return np.clip(np.asarray(upright, dtype=np.int64), 0, 65535).astype(np.uint16)
                return np.asarray(upright.convert("L"), dtype=np.uint16) * np.uint16(257)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE) from error
    except (OSError, SyntaxError, ValueError, EOFError, Warning) as error:
        raise StudyRejected(Reason.IMAGE_UNREADABLE) from error


def verify_dimensions(width: int, height: int) -> None:
    """Raise StudyRejected unless both sides and their product are within the limits of a radiograph."""
    if width * height > MAX_PIXELS:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE)
    if min(width, height) < MIN_SIDE:
        raise StudyRejected(Reason.IMAGE_TOO_SMALL)


def verify_not_blank(pixels: Gray) -> None:
    """Raise StudyRejected for an image with almost no contrast between its 2nd and 98th percentile."""
    low, high = np.percentile(pixels[::4, ::4], (2, 98))
    if high - low < 0.02 * 65535:
        raise StudyRejected(Reason.IMAGE_BLANK)


def fit_within(pixels: Gray, *, max_side: int) -> Gray:
    """Shrink so that the longer side is at most `max_side` pixels (Lanczos); never enlarge."""
    height, width = pixels.shape
    scale = max_side / max(height, width)
    if scale >= 1:
        return pixels
    image = Image.fromarray(pixels.astype(np.float32))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    rounded: Gray = np.clip(np.rint(np.asarray(resized)), 0, 65535).astype(np.uint16)
    return rounded


def encode_png(pixels: Gray, *, bits: int) -> bytes:
    """Encode as an 8-bit or 16-bit grey PNG without any metadata."""
    buffer = io.BytesIO()
    data = pixels if bits == 16 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    Image.fromarray(data).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def crop_border(pixels: Gray, *, limit: float = 0.3) -> Gray:
    """Cut even borders (collimation, air, frames): rows and columns whose spread is under 3 % of the range.

    At most `limit` of a side goes from each edge, and never so much that a side falls under `MIN_SIDE`.
    """
    step = max(1, max(pixels.shape) // 512)
    small = pixels[::step, ::step].astype(np.int32)
    spread = 0.03 * 65535
    rows = np.percentile(small, 98, axis=1) - np.percentile(small, 2, axis=1) < spread
    columns = np.percentile(small, 98, axis=0) - np.percentile(small, 2, axis=0) < spread
    top, bottom = _even_ends(rows, limit)
    left, right = _even_ends(columns, limit)
    cropped = pixels[
        top * step : pixels.shape[0] - bottom * step, left * step : pixels.shape[1] - right * step
    ]
    return cropped if min(cropped.shape) >= MIN_SIDE else pixels


def _even_ends(even: npt.NDArray[np.bool_], limit: float) -> tuple[int, int]:
    most = int(len(even) * limit)
    start = int(np.argmin(even)) if not even.all() else 0
    end = int(np.argmin(even[::-1])) if not even.all() else 0
    return min(start, most), min(end, most)
