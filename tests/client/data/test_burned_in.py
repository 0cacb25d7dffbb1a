"""Writing in images: identifiers are found, markers and anatomy are not."""

import random
from unittest.mock import patch

import numpy as np
import pytest

from client.data import burned_in
from client.data.burned_in import Line, any_writing, has_burned_in_text, is_marker, is_side_with_initials
from client.data.ocr import Word, tesseract
from client.data.pixels import Gray
from tests.client.data.synthetic_dicom import base_image, burn

needs_tesseract = pytest.mark.skipif(tesseract() is None, reason="needs tesseract")


def picture(seed: int, text: str) -> Gray:
    image = base_image(np.random.default_rng(seed), side=320)
    if text:
        image = burn(image, text, random.Random(seed))
    return (image * 65535).astype(np.uint16)


@needs_tesseract
@pytest.mark.parametrize(
    "text", ["OKONKWO ADAEZE", "ID 7734921", "XR000412 20190402", "Jane Brandt 03/04/1951"]
)
def test_burned_in_identifier_is_found(text: str) -> None:
    assert has_burned_in_text(picture(5, text))


@needs_tesseract
@pytest.mark.parametrize("text", ["", "L", "PA", "AP ERECT", "PORTABLE"])
def test_picture_with_markers_only_passes(text: str) -> None:
    assert not has_burned_in_text(picture(9, text))


def test_every_line_of_glyphs_is_writing_where_tesseract_is_missing() -> None:
    with patch.object(burned_in, "tesseract", return_value=None):
        assert has_burned_in_text(picture(5, "PORTABLE"))
        assert not has_burned_in_text(picture(5, ""))


@pytest.mark.parametrize("text", ["PORTABLE", "PORIABLE", "APIERECT", "L", "ERECT", "PAL"])
def test_marker_is_known_even_misread(text: str) -> None:
    assert is_marker(text)


@pytest.mark.parametrize("text", ["WRIGHT", "CHESTER", "PORTER", "ERIC", "LEFTON", "ANDI", "TAN", "7734921"])
def test_name_like_a_marker_is_no_marker(text: str) -> None:
    assert not is_marker(text)


@pytest.mark.parametrize("text", ["LT ORM", "LT.MAA", "LT KAB/BMS", "JHLT", "BN LT", "RT MCH", "LT8MS"])
def test_initials_beside_the_side_are_a_marker(text: str) -> None:
    assert is_side_with_initials([Word(part, 90.0) for part in text.split()])


@pytest.mark.parametrize(
    "text", ["HOLT", "KURT", "WALT", "LTJOHN", "LT 4455", "LT A123", "SMITH LT", "LISA", "RICK", "LEE"]
)
def test_names_and_numbers_beside_a_side_are_no_marker(text: str) -> None:
    assert not is_side_with_initials([Word(part, 90.0) for part in text.split()])


@needs_tesseract
@pytest.mark.parametrize(("text", "found"), [("JH LT", False), ("LT ROMANO", True)])
def test_technologists_mark_passes_and_a_name_does_not(text: str, found: bool) -> None:
    assert has_burned_in_text(picture(9, text)) is found


def test_noise_too_low_for_letters_is_no_writing() -> None:
    small = picture(3, "")[:256, :256].copy()
    small[-3:, 20:120:4] = 65535
    with patch.object(burned_in, "tesseract", return_value=None):
        assert not has_burned_in_text(small)


def reading(left: int, width: int, text: str, confidence: float = 90) -> tuple[Line, list[Word]]:
    words = [Word(part, confidence) for part in text.split()]
    return Line(top=20, left=left, height=40, relief=np.zeros((52, width), np.uint8)), words


@pytest.mark.parametrize(
    ("readings", "found"),
    [
        ([reading(10, 200, "PORTABLE"), reading(12, 196, "PORMAIBLE", 20)], False),
        ([reading(10, 90, "LT"), reading(10, 250, "LT ORM"), reading(12, 246, "UTORN", 50)], False),
        ([reading(10, 250, "LT ROS"), reading(12, 280, "LT ROSE")], True),
        ([reading(10, 200, "ANDI"), reading(12, 400, "BRANDT KENJI", 50)], True),
        ([reading(10, 200, "PORTABLE"), reading(500, 200, "BRANDT")], True),
    ],
)
def test_marker_clears_its_shadow_only(readings: list[tuple[Line, list[Word]]], found: bool) -> None:
    words = {id(line): read for line, read in readings}
    assert any_writing([line for line, _ in readings], lambda line: words[id(line)]) is found
