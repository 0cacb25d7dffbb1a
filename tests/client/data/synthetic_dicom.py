"""Synthetic DICOM exports with planted identifiers in headers, pixels and report text.

Every name, number and picture is generated; the truth about each study (what was planted where) is
returned with it. Sentences and names differ from those of `client/data/leak_gate.py`.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

FAMILY = (
    "Okonkwo", "Brandt", "Villanueva", "Haraldsen", "Petrosyan", "Nakagawa", "Dubois", "Kowalczyk",
    "Achterberg", "Moreau", "Szczepanski", "Fitzgerald", "Olawale", "Lindqvist", "Takahashi", "Romano",
    "Esposito", "Novotny", "Small", "Long", "Park", "Young", "Rose", "Wall", "Li", "Ng", "Ba",
)  # fmt: skip
GIVEN = (
    "Adaeze", "Gunther", "Rosalinda", "Ingrid", "Tigran", "Haruko", "Baptiste", "Zofia", "Cornelis",
    "Solange", "Maureen", "Babatunde", "Astrid", "Kenji", "Giulia", "Pavel", "Hope", "Grace", "Mark", "May",
)  # fmt: skip
SENTENCES = (
    "The lungs are clear.", "Heart size is normal.", "There is a small left pleural effusion.",
    "Patchy opacity in the right lower lobe.", "No pneumothorax.", "Mild degenerative change of the spine.",
    "Right upper lobe nodule measuring 12 mm.", "Endotracheal tube tip 4.5 cm above the carina.",
    "Calcified granuloma in the left upper lobe.", "Low lung volumes with bibasilar atelectasis.",
)  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """One synthetic study and everything that identifies its patient."""

    accession: str
    patient_id: str
    family: str
    given: str
    birth: str
    date: str
    physician: str
    text_known: tuple[str, ...]
    text_free: tuple[str, ...]
    burned_in: bool
    report: str = field(repr=False)


def base_image(generator: np.random.Generator, *, side: int) -> np.ndarray[Any, Any]:
    """Draw a chest-like picture from low-frequency noise, two lungs and a heart, 0 to 1."""
    y, x = np.mgrid[0:side, 0:side] / side
    coarse = Image.fromarray(generator.normal(0, 0.06, (9, 9)).astype(np.float32))
    image = 0.72 + np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    for centre in (0.3, 0.7):
        cx, cy = centre + generator.normal(0, 0.02), 0.47 + generator.normal(0, 0.03)
        lung = np.clip(1.6 - ((x - cx) / 0.16) ** 2 - ((y - cy) / 0.32) ** 2, 0, 1)
        image = image - lung * generator.uniform(0.4, 0.55)
    heart = np.clip(1.5 - ((x - 0.55) / 0.14) ** 2 - ((y - 0.62) / generator.uniform(0.12, 0.18)) ** 2, 0, 1)
    image = np.maximum(image, heart * 0.6)
    image[:, : side // 14] = image[:, -side // 14 :] = 0.05
    return np.clip(image + generator.normal(0, 0.012, image.shape), 0, 1)


def burn(image: np.ndarray[Any, Any], text: str, chooser: random.Random) -> np.ndarray[Any, Any]:
    """Write text into a corner as modalities do: white over a black strip, or outlined."""
    picture = Image.fromarray((image * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(chooser.randint(15, 26))
    width = draw.textlength(text, font=font)
    at = (chooser.choice([8, max(8, picture.width - width - 10)]), chooser.choice([6, picture.height - 36]))
    if chooser.random() < 0.5:
        draw.rectangle(draw.textbbox(at, text, font=font), fill=0)
        draw.text(at, text, fill=255, font=font)
    else:
        draw.text(at, text, fill=255, font=font, stroke_width=2, stroke_fill=0)
    return np.asarray(picture) / 255


def dataset_for(
    study: Planted, image: np.ndarray[Any, Any], *, view: str, number: int, inverted: bool
) -> Dataset:
    """Build a DX dataset with the study's identifiers all over its header, private elements included."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.9.{number}.{1 if view != 'LL' else 2}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID = f"1.2.826.0.1.3680043.9.{number}"
    ds.SeriesInstanceUID = f"{ds.StudyInstanceUID}.{view != 'LL':d}"
    ds.PatientName = f"{study.family}^{study.given}"
    ds.PatientID, ds.AccessionNumber = study.patient_id, study.accession
    ds.PatientBirthDate, ds.StudyDate, ds.SeriesDate, ds.StudyTime = (
        study.birth,
        study.date,
        study.date,
        "101500",
    )
    ds.PatientSex = "O"
    ds.ReferringPhysicianName = study.physician
    ds.OperatorsName = study.physician
    ds.InstitutionName = "Northvale Regional Infirmary"
    ds.PatientAddress = f"{number} Elm Street"
    ds.PatientComments = f"{study.given} {study.family} prefers mornings"
    ds.StudyDescription = f"CHEST {study.family}"
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", 1, 1
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", view
    ds.PatientOrientation = ["L", "F"] if view != "LL" else ["A", "F"]
    ds.BurnedInAnnotation = "NO"
    block = ds.private_block(0x0011, "SYNTHETIC", create=True)
    block.add_new(0x01, "LO", f"{study.family}/{study.patient_id}")
    request = Dataset()
    request.AccessionNumber, request.RequestingPhysician = study.accession, study.physician
    ds.RequestAttributesSequence = [request]
    stored = np.rint((1 - image if inverted else image) * 4095).astype("<u2")
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = 2048, 4096
    ds.PixelData = stored.tobytes()
    return ds


def plant(number: int, chooser: random.Random) -> Planted:
    """Invent a patient, a study and a report that mentions them."""
    family, given = chooser.choice(FAMILY), chooser.choice(GIVEN)
    birth = f"{chooser.randint(1930, 2004)}{chooser.randint(1, 12):02d}{chooser.randint(1, 28):02d}"
    date = f"{chooser.randint(2015, 2023)}{chooser.randint(1, 12):02d}{chooser.randint(1, 28):02d}"
    patient_id, accession = f"{chooser.randint(10**6, 10**7 - 1)}", f"XR{number:06d}"
    physician_family = chooser.choice(FAMILY[:18])
    known: list[str] = []
    free: list[str] = []

    def say(template: str, *, known_value: str = "", free_value: str = "") -> str:
        known.extend([known_value] if known_value else [])
        free.extend([free_value] if free_value else [])
        return template.format(known_value or free_value)

    pretty = f"{date[4:6]}/{date[6:]}/{date[:4]}"
    stranger = f"{chooser.choice(('Ellsworth', 'Quintero', 'Vandermeer', 'Ostrowski'))}"
    planted = [
        say("{} presents with cough.", known_value=f"{given} {family}"),
        say("Medical record {} reviewed.", known_value=patient_id),
        say("Accession {}.", known_value=accession),
        say("Imaged on {}.", known_value=pretty),
        say("Referred by {}.", known_value=physician_family),
        say("Findings were telephoned to Dr. {}.", free_value=stranger),
        say(
            "Film of {} reviewed.", free_value=f"{chooser.randint(1, 28)} March {chooser.randint(2000, 2014)}"
        ),
        say(
            "Call back on {}.", free_value=f"({chooser.randint(200, 989)}) 555-{chooser.randint(1000, 9999)}"
        ),
        say("Discussed with nurse {} at the bedside.", free_value=stranger),
        say("Results sent to {}.", free_value=f"{stranger.lower()}@example.org"),
        say("This {}-year-old is breathless.", free_value=str(chooser.randint(90, 104))),
        say("Lives at {}.", free_value=f"{chooser.randint(1, 99)} {stranger} Road"),
    ]
    chosen = [index for index in range(len(planted)) if chooser.random() < 0.4]
    known_used = tuple(value for index, value in enumerate(known) if index in chosen)
    free_used = tuple(value for index, value in enumerate(free) if index + len(known) in chosen)
    body = [*chooser.sample(SENTENCES, 4), f"Marker distance {number % 83} mm, depth {number % 79} mm."]
    for index in chosen:
        body.insert(chooser.randint(0, len(body)), planted[index])
    return Planted(
        accession=accession,
        patient_id=patient_id,
        family=family,
        given=given,
        birth=birth,
        date=date,
        physician=f"{physician_family}^{chooser.choice(GIVEN)}",
        text_known=known_used,
        text_free=free_used,
        burned_in=chooser.random() < 0.05,
        report=f"FINDINGS: {' '.join(body)} IMPRESSION: {chooser.choice(SENTENCES)}",
    )


def make_export(folder: Path, count: int, *, seed: int, side: int = 320) -> list[Planted]:
    """Write `count` DX studies (some with a lateral, some MONOCHROME1) and reports.csv; return the truth."""
    chooser, generator = random.Random(seed), np.random.default_rng(seed)
    studies = []
    folder.mkdir(parents=True)
    for number in range(count):
        study = plant(number, chooser)
        image = base_image(generator, side=side)
        if study.burned_in:
            words = chooser.choice(
                (f"{study.family} {study.given}", f"ID {study.patient_id}", f"{study.accession} {study.date}")
            )
            image = burn(image, words.upper(), chooser)
        elif chooser.random() < 0.6:
            image = burn(image, chooser.choice(("L", "R", "PA", "AP ERECT", "PORTABLE")), chooser)
        target = folder / f"dicom/{number // 200:03d}"
        target.mkdir(parents=True, exist_ok=True)
        view = chooser.choice(("PA", "AP"))
        inverted = chooser.random() < 0.3
        dataset_for(study, image, view=view, number=number, inverted=inverted).save_as(
            target / f"{number:06d}.dcm", enforce_file_format=True
        )
        if chooser.random() < 0.1:
            dataset_for(study, image.T, view="LL", number=number, inverted=False).save_as(
                target / f"{number:06d}-lat.dcm", enforce_file_format=True
            )
        studies.append(study)
    with (folder / "reports.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["accession", "report"])
        writer.writerows([study.accession, study.report] for study in studies)
    return studies
