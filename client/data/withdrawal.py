"""A patient withdraws consent: their pairs leave the prepared data and never come back.

Guarantees: the folder changes in one rename, as a whole; the pseudonym is kept in a private list beside the
site key, which every later import honours. It does not undo what was trained: see `CONSEQUENCE`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from client.data.index import write_index
from client.data.prepare import dicom_name
from client.data.show import read_facts
from client.data.sitekey import SiteKey, patient_pseudonym
from client.data.store import dataset_files, iter_pairs, read_card, refuse_existing, seal_dataset
from common.errors import DatasetInvalid, PatientUnknown
from common.files import write_atomic

CONSEQUENCE = (
    "Later rounds no longer use this patient. Adapters released so far were trained with the patient's "
    "studies: their influence stays within the study's privacy budget, and no budget is given back. "
    "The ledger keeps its entries, which hold keyed commitments only; record the withdrawal there as an "
    "incident if your policy asks for it. Restart the site agent, so that it reads the new data."
)


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """What a withdrawal removed."""

    patient: str
    studies: int
    images: int


def withdraw(directory: Path, patient: str, *, key: SiteKey, withdrawn_list: Path) -> Withdrawal:
    """Remove a patient, given by hospital identifier or pseudonym, from a prepared data folder.

    Raises PatientUnknown when the folder has no study of that patient, DatasetInvalid when none would remain.
    """
    known = {pair.patient for pair in iter_pairs(directory)}
    pseudonym = patient if patient in known else patient_pseudonym(key, patient)
    if pseudonym not in known:
        raise PatientUnknown(f"expected a patient of {directory}, found no study of the given one")
    if known == {pseudonym}:
        raise DatasetInvalid("this is the only patient; delete the prepared data folder instead")
    remember(withdrawn_list, pseudonym)
    gone = [pair for pair in iter_pairs(directory) if pair.patient == pseudonym]
    gone_images = {image for pair in gone for image in pair.images}
    gone_files = gone_images | {dicom_name(image) for image in gone_images}
    gone_studies = {pair.study for pair in gone}
    refuse_existing(directory, replace=True)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    try:
        for name in dataset_files(directory):
            if name.startswith(("images/", "dicom/")) and name not in gone_files:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(directory / name, staging / name)
        facts = read_facts(directory)
        for name in ("facts.jsonl", "drops.jsonl"):
            if (directory / name).is_file():
                lines = (directory / name).read_text("utf-8").splitlines(keepends=True)
                (staging / name).write_text(
                    "".join(x for x in lines if json.loads(x)["study"] not in gone_studies)
                )
        kept = [pair for pair in iter_pairs(directory) if pair.patient != pseudonym]
        if (directory / "index.parquet").is_file():
            write_index(staging / "index.parquet", ((pair, facts[pair.study]) for pair in kept))
        seal_dataset(staging, directory, kept, card=read_card(directory), replace=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Withdrawal(pseudonym, len(gone), len(gone_images))


def remember(path: Path, pseudonym: str) -> None:
    """Add a pseudonym to the private list of withdrawn patients."""
    write_atomic(path, ("\n".join(sorted({*withdrawn(path), pseudonym})) + "\n").encode(), mode=0o600)


def withdrawn(path: Path) -> frozenset[str]:
    """Read the list of withdrawn patients; empty where there is none; raises DatasetInvalid."""
    if not path.is_file():
        return frozenset()
    names = path.read_text("utf-8").split()
    if not all(re.fullmatch(r"p[0-9a-f]{20}", name) for name in names):
        raise DatasetInvalid(f"expected one patient pseudonym a line in {path}")
    return frozenset(names)
