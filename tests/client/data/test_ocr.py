"""Reading lines: the library and the program of tesseract agree, and doubt is writing."""

import random
import subprocess
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont

from client.data import ocr
from client.data.ocr import Word, read_words, tesseract

needs_tesseract = pytest.mark.skipif(tesseract() is None, reason="needs tesseract")


def line(text: str, *, seed: int) -> npt.NDArray[np.uint8]:
    """Write text dark on white, 36 pixels high, with a little noise."""
    chooser = random.Random(seed)
    picture = Image.new("L", (60 + 26 * len(text), 48), 255)
    ImageDraw.Draw(picture).text((10, 4), text, fill=0, font=ImageFont.load_default(chooser.randint(28, 36)))
    noise = np.random.default_rng(seed).normal(0, 12, (48, picture.width))
    return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)


@needs_tesseract
def test_library_and_program_read_the_same() -> None:
    if ocr._engine() is None:
        pytest.skip("libtesseract is not installed beside the program")
    texts = ("BRANDT ZOFIA", "ID 7734921", "PORTABLE", "AP ERECT", "L", "03/04/1951")
    inks = [line(text, seed=number) for number, text in enumerate(texts)]
    by_library = [read_words(ink) for ink in inks]
    with patch.object(ocr, "_engine", return_value=None):
        by_program = [read_words(ink) for ink in inks]
    assert by_library == by_program
    assert "BRANDT" in [word.text for word in by_library[0]]
    assert [read_words(ink) for ink in reversed(inks)] == by_library[::-1]


def test_line_that_cannot_be_read_counts_as_writing() -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("tesseract", ocr.TIMEOUT_S)

    with patch.object(ocr, "_engine", return_value=None), patch.object(subprocess, "run", fail):
        assert read_words(line("L", seed=1)) == [Word("UNREADABLE", 100.0)]
