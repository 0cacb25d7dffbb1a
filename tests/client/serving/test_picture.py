"""PNG, JPEG and DICOM bytes become pixels; anything else is an error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from client.data.framing import AS_STORED
from client.serving.frames import format_frame
from client.serving.picture import read_picture
from common.canonical import sha256_hex
from common.errors import ImageUnreadable
from common.model.images import read_rgb


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


GRAY = (np.arange(64 * 80).reshape(64, 80) % 251).astype(np.uint8)


def test_gray_pngs_keep_their_pixels() -> None:
    data = encoded(GRAY, "PNG")
    picture = read_picture(data)
    assert (picture.pixels == GRAY).all() and picture.kind == "png"
    assert picture.sha256 == sha256_hex(data)


def test_colour_becomes_gray_and_how_coloured_it_was_is_kept() -> None:
    same = np.repeat(GRAY[..., None], 3, axis=2)
    assert read_picture(encoded(same, "PNG")).colour == 0
    same[..., 0] = 255 - same[..., 0]
    picture = read_picture(encoded(same, "PNG"))
    assert picture.pixels.shape == (64, 80) and picture.colour > 0.02
    stored = read_picture(encoded(same, "PNG"), AS_STORED)
    assert np.array_equal(stored.pixels, same) and stored.gray.shape == (64, 80)
    assert stored.colour == picture.colour


def test_sixteen_bits_keep_their_place_in_the_range_unless_stored_so() -> None:
    deep = (GRAY.astype(np.uint16) + 1000) * 7
    picture = read_picture(encoded(deep, "PNG"))
    assert (picture.pixels == np.rint(deep / 257)).all()
    stored = read_picture(encoded(deep, "PNG"), AS_STORED)
    assert stored.pixels.min() == 0 and stored.pixels.max() == 255


def test_a_stored_file_is_read_as_training_reads_it_however_small() -> None:
    for pixels in (GRAY[:48, :60], np.stack([GRAY[:48, :60], *[GRAY[16:, :60]] * 2], axis=2)):
        data = encoded(pixels, "PNG")
        stored = read_picture(data, AS_STORED)
        assert np.array_equal(stored.pixels, pixels) and (stored.colour > 0) is (pixels.ndim == 3)
        assert np.array_equal(
            Image.fromarray(stored.pixels).convert("RGB"), np.asarray(read_rgb(io.BytesIO(data)))
        )
        with pytest.raises(ImageUnreadable, match="image-too-small"):
            read_picture(data)


def test_a_dicom_file_says_what_it_is() -> None:
    from pydicom.data import get_testdata_file

    with open(str(get_testdata_file("CT_small.dcm")), "rb") as file:
        picture = read_picture(file.read())
    assert (picture.kind, picture.modality, picture.not_chest) == ("dicom", "CT", True)
    assert picture.pixels.shape == (128, 128) and picture.pixels.dtype == np.uint8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + b"x" * 200,
        encoded(GRAY, "PNG")[:-900],
        b"\x89PNG\r\n\x1a\n" + b"x" * 100,
        b"\xff\xd8" + b"x" * 100,
        bytes(128) + b"DICM" + bytes(500),
        encoded(GRAY[:8, :8], "PNG"),
    ],
)
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ImageUnreadable):
        read_picture(data)


def test_a_frame_holds_no_nan() -> None:
    assert b'{"a":[1.0,null,null]}' in format_frame({"a": [1.0, float("nan"), float("inf")]})
