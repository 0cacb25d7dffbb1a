"""Text burned into the pixels: find lines of glyphs, read them with tesseract, quarantine what is writing.

Guarantees: without tesseract every suspicious line counts as text (fail closed); laterality and position
markers (L, R, PA, AP, ERECT, PORTABLE ...) alone are no identifiers. It finds lines of at least four
separate glyphs, lighter or darker than their surroundings, from 7 to 90 pixels high; handwriting and
text without contrast are beyond it. No socket is opened: tesseract is a local program.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from client.data.pixels import Gray

MIN_SEARCHED, MAX_SEARCHED = 1024, 1600
MIN_GLYPHS = 4
# Low for faint writing; high so that bright writing comes loose from edges that it touches.
CONTRASTS = (30, 100, 200)
PAD = 6
TIMEOUT_S = 20
MAX_LINES = 36
Mask = npt.NDArray[np.bool_]

_MARKERS = (
    "L R LT RT LEFT RIGHT PA AP LAT LATERAL ERECT UPRIGHT SUPINE PORTABLE PORT MOBILE SEMI SEMIERECT SITTING "
    "STANDING DECUB INSP EXP CHEST THORAX KV KVP MAS CM UP WHEELCHAIR STRETCHER "
    "SEMIUPRIGHT APSUPINE APSEMIERECT APPORTABLE BED ICU DER IZQ"
)


@dataclass(frozen=True, slots=True)
class Line:
    """What may be a line of text: where, how high, and its strokes standing out of the background."""

    top: int
    left: int
    height: int
    relief: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Word:
    """A word that tesseract read and its confidence, 0 to 100."""

    text: str
    confidence: float


def has_burned_in_text(pixels: Gray) -> bool:
    """Tell whether an image shows writing other than position markers; True when in doubt."""
    image = _searched(pixels)
    lines = text_lines(image)
    if not lines:
        return False
    if tesseract() is None or len(lines) > MAX_LINES:
        return True
    read = [(line, read_line(line)) for line in lines]
    markers = [line for line, words in read if _reads_as_marker(words)]
    return any(
        is_identifying(line, words)
        for line, words in read
        if not any(_same_place(line, marker) for marker in markers)
    )


def text_lines(image: npt.NDArray[np.uint8]) -> list[Line]:
    """Find boxes of at least four similar glyphs on one line, light on dark and dark on light."""
    from scipy import ndimage

    found: list[Line] = []
    image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
    for dark in (False, True):
        source = 255 - image if dark else image
        # Background at half size by 2 × 2 minima: never above the true opening, and four times cheaper.
        halves = np.minimum(source[::2], source[1::2])
        background = ndimage.grey_opening(np.minimum(halves[:, ::2], halves[:, 1::2]), size=(11, 11))
        wide = background.repeat(2, axis=0).repeat(2, axis=1)
        relief = np.where(source > wide, source - wide, 0).astype(np.uint8)
        for contrast in CONTRASTS:
            for line in _lines_in(relief, contrast):
                if not any(_alike(line, other) for other in found):
                    found.append(line)
    return found


def _lines_in(relief: npt.NDArray[np.uint8], contrast: int) -> list[Line]:
    from scipy import ndimage

    strokes = relief > contrast
    labels, count = ndimage.label(strokes, structure=np.ones((3, 3)))
    if count == 0 or count > 20_000:
        return []
    slices = ndimage.find_objects(labels)
    boxes = np.array([(y.start, y.stop, x.start, x.stop) for y, x in slices])
    weights = np.array([_glyphs_in(strokes[part], box) for part, box in zip(slices, boxes, strict=True)])
    lines = []
    for top, bottom, left, right in _lines_of(boxes[weights > 0], weights[weights > 0]):
        part = relief[max(0, top - PAD) : bottom + PAD, max(0, left - PAD) : right + PAD]
        lines.append(Line(top=int(top), left=int(left), height=int(bottom - top), relief=part.copy()))
    return lines


def _alike(line: Line, other: Line) -> bool:
    differences = (
        line.top - other.top,
        line.left - other.left,
        line.height - other.height,
        line.relief.shape[1] - other.relief.shape[1],
    )
    return all(abs(difference) <= PAD for difference in differences)


def is_identifying(line: Line, words: list[Word]) -> bool:
    """Tell whether a line is more than a marker.

    That is a clear word of four letters, four digits, eight letters (five with a digit among them)
    together, or a long line that reads as anything at all.
    """
    plain = [(re.sub(r"[^A-Za-z0-9]", "", word.text).upper(), word.confidence) for word in words]
    plain = [(text, confidence) for text, confidence in plain if text and not is_marker(text)]
    clear = [text for text, confidence in plain if confidence >= 30]
    letters = sum(map(len, clear))
    return (
        any(len(text) >= 4 and confidence >= 60 for text, confidence in plain)
        or any(sum(map(str.isdigit, text)) >= 4 for text, _ in plain)
        or letters >= (5 if any(char.isdigit() for text in clear for char in text) else 8)
        or (any(len(text) >= 3 for text, _ in plain) and line.relief.shape[1] >= 7 * line.height)
    )


def _reads_as_marker(words: list[Word]) -> bool:
    """Tell whether a line reads as markers: clearly, or unclearly but close to one of the long ones."""
    plain = [(re.sub(r"[^A-Za-z0-9]", "", word.text).upper(), word.confidence) for word in words]
    whole = "".join(text for text, _ in plain)
    clear = [text for text, confidence in plain if text and confidence >= 40]
    return (len(whole) >= 7 and is_marker(whole)) or (len("".join(clear)) >= 4 and all(map(is_marker, clear)))


def _same_place(line: Line, marker: Line) -> bool:
    """Tell whether a line lies within the place of a marker that was read: its shadow or outline."""
    width, other = line.relief.shape[1], marker.relief.shape[1]
    return (
        abs(line.top + line.height / 2 - marker.top - marker.height / 2) <= marker.height
        and line.left >= marker.left - 2 * marker.height
        and line.left + width <= marker.left + other + 2 * marker.height
    )


def is_marker(text: str) -> bool:
    """Tell whether upper-case text is a position marker, markers run together, or a misread long one."""
    from rapidfuzz import fuzz

    markers = _MARKERS.split()
    together = "|".join(sorted(markers, key=lambda marker: (-len(marker), marker)))
    return (
        re.fullmatch(rf"(?:{together}|[I1])+", text) is not None
        or (len(text) >= 3 and any(text in marker for marker in markers))
        or any(len(marker) >= 8 and fuzz.ratio(text, marker) >= 75 for marker in markers)
        or (len(text) >= 7 and any(fuzz.ratio(text, marker) >= 75 for marker in ("APERECT", "PAERECT")))
    )


def read_line(line: Line) -> list[Word]:
    """Read one line with tesseract; a line that tesseract cannot finish counts as writing."""
    peak = max(1, int(np.percentile(line.relief, 99)))
    ink = 255 - np.clip(line.relief.astype(np.int32) * 255 // peak, 0, 255)
    crop = Image.fromarray(ink.astype(np.uint8))
    scale = 36 / line.height
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    crop = crop.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    crop.save(buffer, "PNG", compress_level=1)
    try:
        done = subprocess.run(
            [str(tesseract()), "-", "-", "--psm", "7", "-l", "eng", "tsv"],
            input=buffer.getvalue(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
            env={"PATH": os.environ.get("PATH", ""), "OMP_THREAD_LIMIT": "1"},
        )
    except (subprocess.SubprocessError, OSError):
        return [Word("UNREADABLE", 100.0)]
    fields = [row.split("\t") for row in done.stdout.decode("utf-8", "replace").splitlines()[1:]]
    return [Word(row[11], float(row[10])) for row in fields if len(row) == 12 and row[11].strip()]


@lru_cache(maxsize=1)
def tesseract() -> str | None:
    """Return the path of the tesseract program, or None."""
    return shutil.which("tesseract")


@lru_cache(maxsize=1)
def tesseract_version() -> str:
    """Return the version of tesseract, or 'not installed'."""
    program = tesseract()
    if program is None:
        return "not installed"
    done = subprocess.run([program, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False)
    first = done.stdout.decode("utf-8", "replace").splitlines()[:1]
    return first[0].removeprefix("tesseract ") if first else "unknown"


def _searched(pixels: Gray) -> npt.NDArray[np.uint8]:
    """Bring the longer side to between 1024 and 1600 pixels, so that small writing has separate glyphs."""
    image = Image.fromarray((pixels >> 8).astype(np.uint8))
    side = max(image.size)
    if side < MIN_SEARCHED:
        factor = -(-MIN_SEARCHED // side)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    else:
        image.thumbnail((MAX_SEARCHED, MAX_SEARCHED), Image.Resampling.BOX)
    return np.asarray(image)


def _glyphs_in(strokes: Mask, box: npt.NDArray[np.int64]) -> int:
    """Estimate how many glyphs one connected component holds; 0 when it is none."""
    height, width = int(box[1] - box[0]), int(box[3] - box[2])
    if not 7 <= height <= 90 or width < 2:
        return 0
    if width <= 1.6 * height:
        return 1
    rows = strokes[[height // 3, height // 2, 2 * height // 3]].astype(np.int8)
    runs = int((np.diff(rows, axis=1, prepend=0) == 1).sum(axis=1).max())
    return runs // 2 if runs >= 4 and width <= 30 * height else 0


def _lines_of(
    boxes: npt.NDArray[np.int64], weights: npt.NDArray[np.int64]
) -> list[tuple[int, int, int, int]]:
    """Group glyph boxes (top, bottom, left, right) into lines: same height, same base, small gaps."""
    order = np.argsort(boxes[:, 2], kind="stable") if len(boxes) else np.array([], dtype=int)
    boxes, weights = boxes[order], weights[order]
    unused = np.ones(len(boxes), dtype=bool)
    lines = []
    for start in range(len(boxes)):
        if not unused[start]:
            continue
        chain = [start]
        unused[start] = False
        while True:
            top, bottom, _, right = boxes[chain[-1]]
            tall = bottom - top
            heights = boxes[:, 1] - boxes[:, 0]
            near = (
                unused
                & (boxes[:, 2] >= right - 0.35 * tall)
                & (boxes[:, 2] <= right + 1.6 * tall)
                & (np.abs(boxes[:, 1] - bottom) <= 0.35 * tall)
                & (heights >= 0.55 * tall)
                & (heights <= 1.8 * tall)
            )
            following = np.flatnonzero(near)
            if len(following) == 0:
                break
            chain.append(int(following[0]))
            unused[following[0]] = False
        if weights[chain].sum() >= MIN_GLYPHS:
            part = boxes[chain]
            lines.append((part[:, 0].min(), part[:, 1].max(), part[:, 2].min(), part[:, 3].max()))
    return lines
