"""A small hospital folder with a table and images, made from scratch for the import tests."""

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = ("patient", "accession", "image", "view", "indication", "findings", "impression")
KEY_HEX = bytes(range(32)).hex()

FINDINGS = (
    "Heart size is normal. The lungs are clear.",
    "There is a small left pleural effusion with adjacent atelectasis.",
    "A nodule of 8 mm projects over the right upper lobe.",
    "Endotracheal tube tip is 4 cm above the carina. Mild pulmonary edema.",
)


def radiograph(seed: int, *, side: int = 128) -> Image.Image:
    """Draw two dark lungs with random ribs, shadows and noise on a bright body."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    image = 0.7 + 0.1 * generator.standard_normal() * (y - 0.5) + 0.15 * (y > 0.8)
    image = image + 0.2 * np.exp(-(((x - 0.5) / 0.09) ** 2))
    for centre in (0.3, 0.7):
        dx, dy = generator.normal(0, 0.03, 2)
        lung = ((x - centre - dx) / 0.16) ** 2 + ((y - 0.45 - dy) / 0.32) ** 2 < 1
        image = np.where(lung, 0.25 + 0.06 * np.sin(40 * y + generator.uniform(0, 6)), image)
    for _ in range(6):
        cx, cy, radius = [*generator.uniform(0.15, 0.85, 2).tolist(), generator.uniform(0.02, 0.09)]
        image = np.where(
            (x - cx) ** 2 + (y - cy) ** 2 < radius**2, image + generator.uniform(-0.2, 0.2), image
        )
    image = image + generator.normal(0, 0.02, image.shape)
    return Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))


def jpeg(seed: int) -> bytes:
    """Encode `radiograph(seed)` as JPEG."""
    buffer = io.BytesIO()
    radiograph(seed).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def rows(count: int) -> list[dict[str, str]]:
    """Make rows of different patients with reports that differ."""
    return [
        {
            "patient": f"MRN{1000 + n}",
            "accession": f"ACC{n}",
            "image": f"images/{n}.jpg",
            "view": "frontal",
            "indication": "Cough.",
            "findings": f"{FINDINGS[n % len(FINDINGS)]} Marker {n} mm.",
            "impression": "As above.",
        }
        for n in range(count)
    ]


def make_site(folder: Path, table: list[dict[str, str]]) -> Path:
    """Write the table, an image for each row's own file name, and a fixed key beside the folder."""
    (folder / "images").mkdir(parents=True)
    for number, row in enumerate(table):
        path = Path(row["image"])
        if path.parent == Path("images") and not (folder / path).exists():
            (folder / path).write_bytes(jpeg(number))
    write_table(folder / "reports.csv", table)
    return folder


def write_table(path: Path, table: list[dict[str, str]]) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS if table[0].keys() <= set(COLUMNS) else list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def site_key(path: Path) -> Path:
    """Write the fixed test key with mode 0600."""
    path.write_text(KEY_HEX + "\n")
    path.chmod(0o600)
    return path
