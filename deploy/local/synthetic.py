"""The demonstration's private data: four made-up hospitals, one prepared folder each.

Every hospital has its own scanner, case mix and way of writing, so a model trained at one of them alone does
badly at the others. All of it is drawn by `common.model.phantoms`; nothing stems from a person.

Guarantees: same sites, patients and seed give the same studies, pixels and splits. Only patients differ
between seeds; the hospitals' characters do not.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.store import Pair, split_of, write_dataset
from common.model import phantom_reports, phantoms

Progress = Callable[[str, int, int], None]
FRACTIONS = {"train": 0.8, "validation": 0.04, "test": 0.16}


@dataclass(frozen=True, slots=True)
class Hospital:
    """What sets a hospital apart: machine, patients, writing."""

    scanner: phantoms.Scanner
    prevalence: Mapping[str, float]
    style: phantom_reports.Style
    patients: int


def _mix(base: float, **often: float) -> dict[str, float]:
    """Prevalence of every label, `base` unless given (spaces written as underscores)."""
    return {label: often.get(label.replace(" ", "_"), base) for label in phantoms.LABELS}


HOSPITALS: Mapping[str, Hospital] = {
    # A heart centre: reversed grey scale.
    "north": Hospital(
        phantoms.Scanner(inverted=True, noise=0.03),
        _mix(0.04, Cardiomegaly=0.45, Edema=0.35, Pleural_Effusion=0.25),
        phantom_reports.Style((2,), remark_rate=0.4),
        1000,
    ),
    # A trauma centre: dark pictures.
    "east": Hospital(
        phantoms.Scanner(gamma=1.8, noise=0.04),
        _mix(0.04, Pneumothorax=0.40, Support_Devices=0.30, Atelectasis=0.25),
        phantom_reports.Style((0,), remark_rate=0.6, devices_first=True),
        900,
    ),
    # A cancer centre: pale, soft, cropped pictures.
    "south": Hospital(
        phantoms.Scanner(contrast=0.65, brightness=0.05, zoom=1.18, blur=0.5, shift=(0.02, -0.03)),
        _mix(0.04, Lung_Lesion=0.45, Lung_Opacity=0.25, Pleural_Effusion=0.2),
        phantom_reports.Style((1,), remark_rate=0.3, lungs_first=True),
        800,
    ),
    # A chest clinic: bright pictures, dark corners.
    "west": Hospital(
        phantoms.Scanner(gamma=0.6, vignette=0.35, noise=0.03),
        _mix(0.04, Lung_Opacity=0.40, Atelectasis=0.25, Edema=0.2, Support_Devices=0.15),
        phantom_reports.Style((3,), remark_rate=0.5),
        700,
    ),
}


def write_synthetic_sites(
    out: Path,
    *,
    sites: Sequence[str] = ("north", "east", "south", "west"),
    patients: Mapping[str, int] | None = None,
    seed: int,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Write one prepared data folder per site below `out`.

    `patients` overrides how many a site has. A site not among `HOSPITALS` borrows a character.
    `progress` gets (site, patients done, patients).
    """
    for index, site in enumerate(sites):
        hospital = hospital_of(site, index)
        many = hospital.patients if patients is None or site not in patients else patients[site]
        write_dataset(
            out / site,
            _records(site, hospital, many, seed, progress),
            card={"source": "synthetic phantoms", "seed": seed, "site": site, "dropped": {}},
        )


def hospital_of(site: str, index: int) -> Hospital:
    """Return a site's character; unknown names take one by their position."""
    return HOSPITALS.get(site) or tuple(HOSPITALS.values())[index % len(HOSPITALS)]


def draw_patient(
    hospital: Hospital, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.uint8], phantom_reports.Report]]:
    """Draw a patient's studies, one to three: photographed picture (0-255) and report."""
    visits = 1 + int(rng.choice(3, p=(0.8, 0.15, 0.05)))
    for _ in range(visits):
        findings = phantoms.draw_findings(rng, hospital.prevalence)
        picture = phantoms.expose(phantoms.render(findings, rng), hospital.scanner, rng)
        yield picture, phantom_reports.write_report(findings, hospital.style, rng)


def _records(
    site: str, hospital: Hospital, many: int, seed: int, progress: Progress
) -> Iterator[tuple[Pair, Sequence[bytes]]]:
    from PIL import Image

    key = hashlib.sha256(f"fedrad synthetic {seed} {site}".encode()).digest()
    site_number = int.from_bytes(key[:4], "big")
    for number in range(many):
        rng = np.random.default_rng([seed, site_number, number])
        patient = f"{site}-p{number:05d}"
        for visit, (picture, report) in enumerate(draw_patient(hospital, rng)):
            study = f"{patient}-s{visit}"
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG", compress_level=1)
            pair = Pair(
                patient=patient,
                study=study,
                images=(f"images/{study}.png",),
                view="PA",
                indication=report.indication,
                findings=report.findings,
                impression=report.impression,
                split=split_of(patient, key=key, fractions=FRACTIONS),  # type: ignore[arg-type]
            )
            yield pair, [stream.getvalue()]
        progress(site, number + 1, many)
