"""Text burned into the pixels: find lines of glyphs, read them with tesseract, quarantine what is writing.

Guarantees: without tesseract every suspicious line counts as text (fail closed); laterality and position
markers (L, R, PA, AP, ERECT, PORTABLE ...) alone are no identifiers, nor are the technologist's initials
beside LT or RT. It finds lines of at least four separate glyphs, lighter or darker than their surroundings,
from 7 to 90 pixels high in the searched image and from 4 in the stored one; handwriting, single names of
two or three letters and text without contrast are beyond it. No socket is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from client.data.ocr import Word, read_words, tesseract
from client.data.pixels import Gray

MIN_SEARCHED, MAX_SEARCHED = 1024, 1600
MIN_GLYPHS = 4
# Four pixels of the image as it came: what is lower is no legible letter, whatever it is enlarged to.
MIN_HEIGHT, MAX_HEIGHT, MIN_SOURCE_HEIGHT = 7, 90, 4
# From this height in the searched image on, writing can be read if it is writing.
LEGIBLE_HEIGHT = 28
# Low for faint writing; high so that bright writing comes loose from edges that it touches.
CONTRASTS = (30, 100, 200)
PAD = 6
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


def has_burned_in_text(pixels: Gray) -> bool:
    """Tell whether an image shows writing other than position markers; True when in doubt."""
    image, enlarged = _searched(pixels)
    lines = text_lines(image, least=max(MIN_HEIGHT, MIN_SOURCE_HEIGHT * enlarged))
    if not lines:
        return False
    if tesseract() is None or len(lines) > MAX_LINES:
        return True
    return any_writing(lines, read_line)


def any_writing(lines: list[Line], read: Callable[[Line], list[Word]]) -> bool:
    """Tell whether lines show more than markers; a line in the place of a marker is its shadow or outline.

    Initials beside a side clear what is unclear in their place, but no clear word or number.
    """
    markers: list[Line] = []
    initials: list[Line] = []
    suspects: list[tuple[Line, bool]] = []
    for line in lines:
        if any(_same_place(line, marker) for marker in markers):
            continue
        words = read(line)
        if _reads_as_marker(words):
            markers.append(line)
        elif min((word.confidence for word in words), default=0) >= 60 and is_side_with_initials(words):
            initials.append(line)
        elif is_identifying(line, words):
            suspects.append((line, _is_clear(words)))
    return any(
        not any(_same_place(line, marker) for marker in (markers if clear else [*markers, *initials]))
        for line, clear in suspects
    )


def text_lines(image: npt.NDArray[np.uint8], *, least: int = MIN_HEIGHT) -> list[Line]:
    """Find lines of at least four similar glyphs `least` pixels high, light on dark and dark on light."""
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
            for line in _lines_in(relief, contrast, least):
                if not any(_alike(line, other) for other in found):
                    found.append(line)
    return found


def _lines_in(relief: npt.NDArray[np.uint8], contrast: int, least: int) -> list[Line]:
    from scipy import ndimage

    strokes = relief > contrast
    if np.count_nonzero(strokes) < MIN_GLYPHS * least:
        return []
    labels, count = ndimage.label(strokes, structure=np.ones((3, 3)))
    if count == 0 or count > 20_000:
        return []
    slices = ndimage.find_objects(labels)
    boxes = np.array([(y.start, y.stop, x.start, x.stop) for y, x in slices])
    weights = np.array(
        [_glyphs_in(strokes[part], box, least) for part, box in zip(slices, boxes, strict=True)]
    )
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
    together, or a long line that reads as anything at all: what is large and still unread is in doubt.
    """
    plain = [(re.sub(r"[^A-Za-z0-9]", "", word.text).upper(), word.confidence) for word in words]
    plain = [(text, confidence) for text, confidence in plain if text and not is_marker(text)]
    clear = [text for text, confidence in plain if confidence >= 30]
    letters = sum(map(len, clear))
    long = 5 if line.height >= LEGIBLE_HEIGHT else 7
    return (
        any(len(text) >= 4 and confidence >= 60 for text, confidence in plain)
        or any(sum(map(str.isdigit, text)) >= 4 for text, _ in plain)
        or letters >= (5 if any(char.isdigit() for text in clear for char in text) else 8)
        or (any(len(text) >= 3 for text, _ in plain) and line.relief.shape[1] >= long * line.height)
    )


def _reads_as_marker(words: list[Word]) -> bool:
    """Tell whether a line reads as markers: clearly, or unclearly but close to one of the long ones."""
    plain = [(re.sub(r"[^A-Za-z0-9]", "", word.text).upper(), word.confidence) for word in words]
    whole = "".join(text for text, _ in plain)
    clear = [text for text, confidence in plain if text and confidence >= 40]
    return (len(whole) >= 7 and is_marker(whole)) or (len("".join(clear)) >= 4 and all(map(is_marker, clear)))


def _is_clear(words: list[Word]) -> bool:
    """Tell whether a line holds a clear word of four letters, or four digits, that is no marker."""
    plain = [(re.sub(r"[^A-Za-z0-9]", "", word.text).upper(), word.confidence) for word in words]
    return any(
        (len(text) >= 4 and confidence >= 60 and not is_marker(text)) or sum(map(str.isdigit, text)) >= 4
        for text, confidence in plain
    )


def is_side_with_initials(words: list[Word]) -> bool:
    """Tell whether a line is LT or RT with initials of two or three letters, as technologists mark films.

    Before the side only consonants count as initials: Holt, Kurt and Walt are names, and none starts so.
    """
    text = re.sub(r"[^A-Z0-9/]", "", "".join(word.text for word in words).upper())
    return (
        re.fullmatch(r"(?:LT|RT)(?=[A-Z/]*\d?[A-Z/]*$)[A-Z0-9]{2,3}(?:/[A-Z]{2,3})?", text) is not None
        or re.fullmatch(r"[BCDFGHJKLMNPQRSTVWXZ]{2,3}(?:LT|RT)", text) is not None
    )


def _same_place(line: Line, marker: Line) -> bool:
    """Tell whether a line lies within the place of a marker that was read: its shadow or outline."""
    width, other = line.relief.shape[1], marker.relief.shape[1]
    return (
        abs(line.top + line.height / 2 - marker.top - marker.height / 2) <= marker.height
        and line.left >= marker.left - marker.height
        and line.left + width <= marker.left + other + marker.height
    )


def is_marker(text: str) -> bool:
    """Tell whether upper-case text is a position marker, the end of one, some together, or a misread one."""
    from rapidfuzz import fuzz

    markers = _MARKERS.split()
    together = "|".join(sorted(markers, key=lambda marker: (-len(marker), marker)))
    return (
        re.fullmatch(rf"(?:{together}|[I1])+", text) is not None
        or (len(text) >= 4 and any(marker.startswith(text) or marker.endswith(text) for marker in markers))
        or any(len(marker) >= 8 and fuzz.ratio(text, marker) >= 75 for marker in markers)
        or (len(text) >= 7 and any(fuzz.ratio(text, marker) >= 75 for marker in ("APERECT", "PAERECT")))
    )


def read_line(line: Line) -> list[Word]:
    """Read one line, its strokes dark on white and scaled to the height that tesseract reads best."""
    peak = max(1, int(np.percentile(line.relief, 99)))
    ink = 255 - np.clip(line.relief.astype(np.int32) * 255 // peak, 0, 255)
    crop = Image.fromarray(ink.astype(np.uint8))
    scale = 36 / line.height
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    crop = crop.resize(size, Image.Resampling.BICUBIC)
    return read_words(np.asarray(crop))


def _searched(pixels: Gray) -> tuple[npt.NDArray[np.uint8], int]:
    """Bring the longer side to 1024 to 1600 pixels, so that small writing has separate glyphs.

    Returns the image and how many times it was enlarged.
    """
    image = Image.fromarray((pixels >> 8).astype(np.uint8))
    side, factor = max(image.size), 1
    if side < MIN_SEARCHED:
        factor = -(-MIN_SEARCHED // side)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    else:
        image.thumbnail((MAX_SEARCHED, MAX_SEARCHED), Image.Resampling.BOX)
    return np.asarray(image), factor


def _glyphs_in(strokes: Mask, box: npt.NDArray[np.int64], least: int) -> int:
    """Estimate how many glyphs one connected component holds; 0 when it is none."""
    height, width = int(box[1] - box[0]), int(box[3] - box[2])
    if not least <= height <= MAX_HEIGHT or width < 2:
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
