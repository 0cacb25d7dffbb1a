"""One image as it arrives, PNG, JPEG or DICOM bytes, in the form in which this site stores its images.

Decoding, cropping, size and depth are the import's own functions (`client/data/framing.py`), so that a model
is asked about the pixels it would have been trained on. Guarantees: the bytes decide the kind, not a name or
content type; declared dimensions are checked before pixels are decompressed; a damaged file is an error.
It does not judge what is shown (`guard.py` does).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.data.framing import AS_IMPORTED, Framed, Framing, frame_radiograph
from common.canonical import sha256_hex
from common.errors import ImageUnreadable, StudyRejected

if TYPE_CHECKING:
    from common.model.images import ImageProcessor

MAX_PICTURE_BYTES = 64 << 20
WHOLE = (0.0, 0.0, 1.0, 1.0)
_COLOUR_SIDE = 64


@dataclass(frozen=True)
class Picture:
    """Pixels uint8 [H, W] (or [H, W, 3] as stored), air dark; `sha256` is that of the file's bytes.

    `kind` is png, jpeg or dicom; `modality`, `body_part`, `view` and `not_chest` come from a DICOM header and
    are '' or False for the others. `colour` says how far channels differ in what arrived, 0 to 1. `box` is
    what part of the decoded image the pixels show: left, top, right, bottom as shares of its sides.
    """

    sha256: str
    pixels: NDArray[np.uint8] = field(repr=False, compare=False)
    kind: str
    modality: str = ""
    body_part: str = ""
    view: str = ""
    not_chest: bool = False
    colour: float = 0.0
    box: tuple[float, float, float, float] = WHOLE

    @property
    def key(self) -> str:
        """Name these pixels in caches: one file has others in another framing."""
        return sha256_hex(repr(self.pixels.shape).encode() + self.pixels.tobytes())

    @property
    def gray(self) -> NDArray[np.uint8]:
        """Luminance [H, W]."""
        if self.pixels.ndim == 2:
            return self.pixels
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        return (self.pixels.astype(np.float32) @ weights).astype(np.uint8)


def read_picture(data: bytes, framing: Framing = AS_IMPORTED) -> Picture:
    """Decode an image file and bring it into stored form; raises ImageUnreadable.

    With a framing that does not cut, a PNG or JPEG is read as training reads a stored file.
    """
    from client.data.dicom import is_dicom

    if len(data) > MAX_PICTURE_BYTES:
        raise ImageUnreadable(f"expected an image of at most {MAX_PICTURE_BYTES} bytes, got {len(data)}")
    kind = "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpeg" if data.startswith(b"\xff\xd8") else ""
    try:
        if kind:
            return _read_raster(data, kind, framing)
        if is_dicom(data):
            return _read_dicom(data, framing)
    except StudyRejected as error:
        raise ImageUnreadable(f"expected a readable image, got one rejected: {error}") from error
    raise ImageUnreadable("expected a PNG, JPEG or DICOM file, got something else")


def prepared(picture: Picture, processor: ImageProcessor) -> NDArray[np.float32]:
    """Prepare a picture as a base wants it, float32 [3, H, W]."""
    from PIL import Image

    from common.model.images import prepare

    return prepare(Image.fromarray(picture.pixels).convert("RGB"), processor)


def placed(
    part: tuple[float, float, float, float], box: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Return where a part of a box lies on the whole: left, top, right, bottom as shares of sides."""
    wide, tall = box[2] - box[0], box[3] - box[1]
    return (
        box[0] + part[0] * wide,
        box[1] + part[1] * tall,
        box[0] + part[2] * wide,
        box[1] + part[3] * tall,
    )


def _read_raster(data: bytes, kind: str, framing: Framing) -> Picture:
    from client.data.pixels import grey_of, read_raster

    if framing.cut:
        image = read_raster(data)
        framed = frame_radiograph(grey_of(image), framing)
        return Picture(sha256_hex(data), _stored_bytes(framed), kind, colour=_colour(image), box=framed.box)
    from common.model.images import read_rgb

    image = read_rgb(io.BytesIO(data))
    pixels = np.asarray(image)
    if (pixels == pixels[..., :1]).all():
        return Picture(sha256_hex(data), np.ascontiguousarray(pixels[..., 0]), kind)
    return Picture(sha256_hex(data), pixels, kind, colour=_colour(image))


def _stored_bytes(framed: Framed) -> NDArray[np.uint8]:
    """What reading the stored PNG gives: 16-bit greys scaled to their own range."""
    from common.model.images import scaled_to_bytes

    values = framed.values
    return values.astype(np.uint8) if values.dtype == np.uint8 else scaled_to_bytes(values)


def _colour(image: Any) -> float:
    from PIL import Image

    if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")):
        return 0.0
    small = image.convert("RGB").resize((_COLOUR_SIDE, _COLOUR_SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.float32)
    return float((values.max(2) - values.min(2)).mean() / 255)


def _read_dicom(data: bytes, framing: Framing) -> Picture:
    from client.data.dicom import decode_dicom, read_dicom, text_of, verify_chest_radiograph, view_of

    dataset = read_dicom(data, pixels=True)
    framed = frame_radiograph(decode_dicom(dataset), framing)
    try:
        verify_chest_radiograph(dataset)
        not_chest = False
    except StudyRejected:
        not_chest = True
    return Picture(
        sha256_hex(data),
        _stored_bytes(framed),
        "dicom",
        modality=text_of(dataset, "Modality")[:16],
        body_part=text_of(dataset, "BodyPartExamined")[:64],
        view=view_of(dataset),
        not_chest=not_chest,
        box=framed.box,
    )
