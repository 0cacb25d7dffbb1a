"""Pictures that are no frontal chest radiograph, by family: drawn, spoiled, or real from other places."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Gray = NDArray[np.uint8]


def made(rng: np.random.Generator, many: int) -> dict[str, list[Gray]]:
    """Draw `many` of each family that needs no other picture."""
    families = {
        "uniform noise": _noise,
        "salt and pepper": _pepper,
        "radial gradient": _radial,
        "text page": _text,
        "landscape": _landscape,
        "house and sun": _house,
        "head phantom": _head,
        "hand phantom": _hand,
        "checkerboard": _checkers,
        "blank": lambda rng: np.full((200, 200), int(rng.integers(256)), np.uint8),
    }
    return {name: [draw(rng) for _ in range(many)] for name, draw in families.items()}


def turned(pictures: list[Gray], rng: np.random.Generator) -> dict[str, list[Gray]]:
    """Spoil chest pictures."""

    def cut(picture: Gray) -> Gray:
        height, width = picture.shape
        part = rng.uniform(0.3, 0.5)
        tall, wide = int(height * part), int(width * part)
        top, left = int(rng.integers(height - tall)), int(rng.integers(width - wide))
        return picture[top : top + tall, left : left + wide].copy()

    return {
        "turned left": [np.rot90(p).copy() for p in pictures],
        "turned right": [np.rot90(p, 3).copy() for p in pictures],
        "upside down": [np.rot90(p, 2).copy() for p in pictures],
        "inverted": [255 - p for p in pictures],
        "cropped": [cut(p) for p in pictures],
    }


def real() -> dict[str, list[Any]]:
    """Read what decodes of pydicom's test data and matplotlib's samples, but for chest radiographs.

    pydicom's own small set is installed with it, the larger with the package pydicom-data.
    """
    import matplotlib
    from pydicom.data import get_testdata_files

    from client.serving.picture import read_picture
    from common.errors import FedRadError

    found: dict[str, list[Any]] = {"dicom": [], "photographs": []}
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = [Path(p) for p in get_testdata_files("*.dcm")]
        try:
            import data_store

            paths += sorted(Path(data_store.__file__).parent.rglob("*.dcm"))
        except ImportError:
            pass
        for path in paths:
            try:
                picture = read_picture(path.read_bytes())
            except FedRadError:
                continue
            chest = picture.body_part == "CHEST" and picture.modality in {"CR", "DX"}
            if picture.sha256 not in seen and not chest:
                seen.add(picture.sha256)
                found["dicom"].append(picture)
        samples = Path(matplotlib.get_data_path()) / "sample_data"
        for path in [*sorted(samples.glob("*.jpg")), *sorted(samples.glob("*.png"))]:
            found["photographs"].append(read_picture(path.read_bytes()))
    return found


def _noise(rng: np.random.Generator) -> Gray:
    return rng.integers(0, 256, (180, 180)).astype(np.uint8)


def _pepper(rng: np.random.Generator) -> Gray:
    return np.where(rng.random((160, 160)) < rng.uniform(0.1, 0.6), 255, 0).astype(np.uint8)


def _radial(rng: np.random.Generator) -> Gray:
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    shown = np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5)) / 2
    return (np.clip(shown if rng.random() < 0.5 else 1 - shown, 0, 1) * 255).astype(np.uint8)


def _text(rng: np.random.Generator) -> Gray:
    from PIL import Image, ImageDraw

    page = Image.new("L", (300, 380), 255)
    draw = ImageDraw.Draw(page)
    words = ["the", "patient", "was", "seen", "in", "clinic", "no", "complaint", "of", "pain", "report"]
    for row in range(int(rng.integers(8, 30))):
        draw.text((12, 10 + 12 * row), " ".join(rng.choice(words, int(rng.integers(2, 8)))), fill=0)
    return np.asarray(page)


def _landscape(rng: np.random.Generator) -> Gray:
    side = 220
    shown = np.linspace(230, 120, side)[:, None] * np.ones((1, side))
    for depth in range(4):
        ridge = np.cumsum(rng.normal(0, 2.0, side)) + side * (0.4 + 0.13 * depth)
        shown[np.arange(side)[:, None] > ridge[None]] = 140 - 35 * depth
    return np.clip(shown + rng.normal(0, 5, shown.shape), 0, 255).astype(np.uint8)


def _house(rng: np.random.Generator) -> Gray:
    from PIL import Image, ImageDraw

    page = Image.new("L", (240, 240), int(rng.integers(150, 256)))
    draw = ImageDraw.Draw(page)
    for _ in range(int(rng.integers(2, 6))):
        x, y, s = (int(v) for v in rng.integers(10, 150, 3))
        shade = int(rng.integers(0, 150))
        draw.rectangle((x, y, x + s // 2 + 10, y + s // 2 + 10), fill=shade)
        draw.polygon([(x, y), (x + s // 4 + 5, y - 30), (x + s // 2 + 10, y)], fill=int(shade * 0.7))
        draw.ellipse((y, x, y + 30, x + 30), fill=int(rng.integers(0, 256)))
    return np.asarray(page)


def _head(rng: np.random.Generator) -> Gray:
    y, x = np.mgrid[-1:1:220j, -1:1:220j]
    shown = np.zeros_like(x)
    tall, wide = rng.uniform(0.75, 0.95), rng.uniform(0.55, 0.75)
    skull = (x / wide) ** 2 + (y / tall) ** 2
    shown[skull < 1] = 0.9
    shown[skull < 0.82] = 0.35
    for sign in (-1, 1):
        shown[((x - sign * 0.14) / 0.09) ** 2 + (y / 0.3) ** 2 < 1] = 0.1
    shown += rng.normal(0, 0.03, shown.shape)
    return (np.clip(shown, 0, 1) * 255).astype(np.uint8)


def _hand(rng: np.random.Generator) -> Gray:
    y, x = np.mgrid[0:1:220j, 0:1:220j]
    shown = np.zeros_like(x)
    shown[((x - 0.5) / 0.22) ** 2 + ((y - 0.72) / 0.2) ** 2 < 1] = 0.4
    for finger in range(5):
        lean = (finger - 2) * 0.13
        middle = 0.5 + lean * (1.2 - y)
        tip = 0.18 + 0.07 * abs(finger - 2) + rng.uniform(0, 0.05)
        shown[(abs(x - middle - lean * 0.3) < 0.045) & (y > tip) & (y < 0.7)] = 0.4
        shown[(abs(x - middle - lean * 0.3) < 0.02) & (y > tip + 0.03) & (y < 0.75)] = 0.85
    shown += rng.normal(0, 0.02, shown.shape)
    return (np.clip(shown, 0, 1) * 255).astype(np.uint8)


def _checkers(rng: np.random.Generator) -> Gray:
    size = int(rng.integers(5, 30))
    y, x = np.mgrid[0:200, 0:200] // size
    return (((x + y) % 2) * 255).astype(np.uint8)
