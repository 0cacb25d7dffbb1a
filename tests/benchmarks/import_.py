"""Import: studies per CPU-second through the whole pipeline, and peak memory at 1,000 and 10,000 studies.

Throughput is DICOM with a report table, 320 × 320 pixels, writing checked, one process. Memory is a table
of PNG files, where the number of studies, not the size of an image, decides.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.client.data.synthetic_dicom import SENTENCES, make_export

STUDIES = 100


def run(progress: Callable[[str], None]) -> dict[str, float]:
    """Return import_studies_per_cpu_s, import_peak_mb_1000 and import_peak_mb_10000."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        progress(f"writing {STUDIES} DICOM studies")
        make_export(root / "dicom", STUDIES, seed=1)
        progress("importing them")
        cpu_s, _ = import_in_child(root / "dicom", root / "dicom-out", "--format", "dicom+table")
        idle_s, _ = import_in_child(root / "dicom", root / "dicom-out", "--format", "dicom+table")
        figures["import_studies_per_cpu_s"] = STUDIES / (cpu_s - idle_s)
        for count in (1_000, 10_000):
            progress(f"importing {count} table studies")
            write_site(root / str(count), count)
            _, peak_mb = import_in_child(
                root / str(count), root / f"{count}-out", "--no-check-writing", "--no-check-chest"
            )
            figures[f"import_peak_mb_{count}"] = peak_mb
    return figures


def write_site(folder: Path, count: int) -> None:
    """Write a table and `count` different small images."""
    generator = np.random.default_rng(count)
    (folder / "images").mkdir(parents=True)
    with (folder / "reports.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["patient", "accession", "image", "findings"])
        for number in range(count):
            field = Image.fromarray(generator.normal(128, 60, (12, 12)).clip(0, 255).astype(np.uint8))
            field.resize((96, 96), Image.Resampling.BICUBIC).save(
                folder / f"images/{number}.png", compress_level=1
            )
            text = " ".join([*generator.choice(SENTENCES, 6).tolist(), f"Distance {number} mm."])
            writer.writerow([f"P{number}", f"A{number}", f"images/{number}.png", text])


def import_in_child(source: Path, out: Path, *options: str) -> tuple[float, float]:
    """Run the import in a process of its own; return its CPU seconds (children included) and peak MB."""
    start = [sys.executable, "-m", "client.data.cli", "import", str(source), "--out", str(out)]
    before = time.monotonic()
    process = subprocess.Popen(
        [*start, "--workers", "1", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"import ended with {process.returncode} after {time.monotonic() - before:.0f} s")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
