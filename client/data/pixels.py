"""Pixels of one radiograph: decode a raster file, reject what cannot be read, resize, encode as PNG.

Guarantees: declared dimensions are checked before anything is decompressed, a truncated or damaged file
is rejected and never padded, and the same input gives the same bytes. It does not look for burned-in
text (`burned_in.py` does) and does not judge diagnostic quality.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

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


class Box(NamedTuple):
    """A part of an image: rows `top` to `bottom`, columns `left` to `right`, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, pixels: Gray) -> Gray:
        return pixels[self.top : self.bottom, self.left : self.right]


def decode_raster(source: Path | bytes) -> Gray:
    """Decode a JPEG or PNG file to a 2-D uint16 array over the full range; raises StudyRejected."""
    return grey_of(read_raster(source))


def grey_of(image: Image.Image) -> Gray:
    """Return a Pillow image as 2-D uint16 over the full range; colour by its luminance."""
    if image.mode in ("I;16", "I;16B", "I"):
        return np.clip(np.asarray(image, dtype=np.int64), 0, 65535).astype(np.uint16)
    return np.asarray(image.convert("L"), dtype=np.uint16) * np.uint16(257)


def read_raster(source: Path | bytes) -> Image.Image:
    """Read a JPEG or PNG file, upright as its EXIF says; raises StudyRejected.

    Changes no warning filter, so that threads may read at the same time.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_FILE_BYTES:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE)
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS
        ) as image:
            verify_dimensions(*image.size)
            if getattr(image, "n_frames", 1) != 1:
                raise StudyRejected(Reason.NOT_ORIGINAL)
            image.load()
            return ImageOps.exif_transpose(image)
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


def in_depth(pixels: Gray, *, bits: int) -> npt.NDArray[np.uint8] | Gray:
    """Round 16 bits to 8, or leave them."""
    return pixels if bits == 16 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def encode_png(values: npt.NDArray[np.uint8] | Gray) -> bytes:
    """Encode as an 8-bit or 16-bit grey PNG without any metadata."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def border_box(pixels: Gray, *, limit: float = 0.3) -> Box:
    """Find what even borders (collimation, air, frames) enclose: there, rows and columns spread over 3 %.

    At most `limit` of a side goes from each edge, and never so much that a side falls under `MIN_SIDE`.
    """
    step = max(1, max(pixels.shape) // 512)
    small = pixels[::step, ::step].astype(np.int32)
    spread = 0.03 * 65535
    rows = np.percentile(small, 98, axis=1) - np.percentile(small, 2, axis=1) < spread
    columns = np.percentile(small, 98, axis=0) - np.percentile(small, 2, axis=0) < spread
    top, bottom = _even_ends(rows, limit)
    left, right = _even_ends(columns, limit)
    height, width = pixels.shape
    box = Box(top * step, height - bottom * step, left * step, width - right * step)
    return box if min(box.of(pixels).shape) >= MIN_SIDE else Box(0, height, 0, width)


def _even_ends(even: npt.NDArray[np.bool_], limit: float) -> tuple[int, int]:
    most = int(len(even) * limit)
    start = int(np.argmin(even)) if not even.all() else 0
    end = int(np.argmin(even[::-1])) if not even.all() else 0
    return min(start, most), min(end, most)
