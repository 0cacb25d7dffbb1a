"""One image as it arrives: PNG, JPEG or DICOM bytes to pixels, with what its header says.

Guarantees: the bytes decide the kind, not a name or content type; declared dimensions are checked before
pixels are decompressed; a damaged file is an error. It does not judge what is shown (`guard.py` does).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.canonical import sha256_hex
from common.errors import ImageUnreadable, StudyRejected

if TYPE_CHECKING:
    from common.model.images import ImageProcessor

MAX_PICTURE_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 32


@dataclass(frozen=True)
class Picture:
    """Pixels uint8 [H, W] or [H, W, 3], air dark; `sha256` is that of the file's bytes.

    `kind` is png, jpeg or dicom; `modality`, `body_part`, `view` and `not_chest` come from a DICOM header
    and are '' or False for the others. `color` tells that the channels differ.
    """

    sha256: str
    pixels: NDArray[np.uint8] = field(repr=False, compare=False)
    kind: str
    modality: str = ""
    body_part: str = ""
    view: str = ""
    not_chest: bool = False

    @property
    def gray(self) -> NDArray[np.uint8]:
        """Luminance [H, W]."""
        if self.pixels.ndim == 2:
            return self.pixels
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        return (self.pixels.astype(np.float32) @ weights).astype(np.uint8)


def read_picture(data: bytes) -> Picture:
    """Decode an image file; raises ImageUnreadable."""
    if len(data) > MAX_PICTURE_BYTES:
        raise ImageUnreadable(f"expected an image of at most {MAX_PICTURE_BYTES} bytes, got {len(data)}")
    if data[128:132] == b"DICM":
        return _read_dicom(data)
    from PIL import Image, ImageOps

    kind = "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpeg" if data.startswith(b"\xff\xd8") else ""
    if not kind:
        raise ImageUnreadable("expected a PNG, JPEG or DICOM file, got something else")
    try:
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as opened:
            _verify_sides(*opened.size)
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            pixels = _to_bytes(upright)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"expected a whole image, got {type(error).__name__}") from error
    return Picture(sha256_hex(data), pixels, kind)


def prepared(picture: Picture, processor: ImageProcessor) -> NDArray[np.float32]:
    """Prepare a picture as a base wants it, float32 [3, H, W]."""
    from PIL import Image

    from common.model.images import prepare

    return prepare(Image.fromarray(picture.pixels).convert("RGB"), processor)


def _to_bytes(image: Any) -> NDArray[np.uint8]:
    if image.mode in {"I", "F", "I;16", "I;16B", "I;16L"}:
        values = np.asarray(image, dtype=np.float64)
        span = float(values.max() - values.min()) or 1.0
        return np.asarray((values - values.min()) * (255 / span)).astype(np.uint8)
    if image.mode in {"L", "1", "LA"}:
        return np.asarray(image.convert("L"))
    colored = np.asarray(image.convert("RGB"))
    one = colored[..., 0]
    if (one == colored[..., 1]).all() and (one == colored[..., 2]).all():
        return np.ascontiguousarray(one)
    return colored


def _verify_sides(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
        raise ImageUnreadable(
            f"expected sides of at least {MIN_SIDE} and {MAX_PIXELS} pixels at most, got {width} × {height}"
        )


def _read_dicom(data: bytes) -> Picture:
    import tempfile

    from client.data.dicom import decode_dicom, read_dicom, text_of, verify_chest_radiograph, view_of

    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(data)
        file.flush()
        try:
            dataset = read_dicom(Path(file.name), pixels=True)
            pixels = (decode_dicom(dataset) // 257).astype(np.uint8)
        except StudyRejected as error:
            raise ImageUnreadable(f"expected a readable DICOM image, got one rejected: {error}") from error
    try:
        verify_chest_radiograph(dataset)
        not_chest = False
    except StudyRejected:
        not_chest = True
    return Picture(
        sha256_hex(data),
        pixels,
        "dicom",
        modality=text_of(dataset, "Modality")[:16],
        body_part=text_of(dataset, "BodyPartExamined")[:64],
        view=view_of(dataset),
        not_chest=not_chest,
    )
