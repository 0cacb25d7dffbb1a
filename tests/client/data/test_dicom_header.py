"""A de-identified header: nothing planted remains, dates and UIDs are consistent, and it is attested."""

import io
import random
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from client.data.dicom_header import deidentify_header, keyed_uid, shifted
from client.data.sitekey import SiteKey
from tests.client.data.synthetic_dicom import Planted, base_image, dataset_for, plant

KEY = SiteKey(bytes(range(32)))
IMAGE = base_image(np.random.default_rng(0), side=64)


def cleaned(study: Planted, *, number: int = 1, key: SiteKey = KEY) -> Any:
    ds = dataset_for(study, IMAGE, view="PA", number=number, inverted=False)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    ds = pydicom.dcmread(buffer)
    deidentify_header(ds, key=key)
    return ds


def written(ds: Any) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("seed", range(5))
def test_no_planted_identifier_remains_in_the_file(seed: int) -> None:
    study = plant(40 + seed, random.Random(seed))
    data = written(cleaned(study, number=40 + seed)).lower()
    header = data[: len(data) - IMAGE.size * 2]
    for value in (study.patient_id, study.accession, study.birth, study.date, "northvale", "synthetic"):
        assert value.lower().encode() not in header
    for name in (study.family, study.given, *study.physician.split("^")):
        if len(name) >= 4:
            assert name.lower().encode() not in header


def test_overlays_icons_binaries_preamble_and_sender_go() -> None:
    study = plant(3, random.Random(3))
    ds = dataset_for(study, IMAGE, view="PA", number=3, inverted=False)
    secret = b"BRANDTZOFIA"
    ds.add_new(0x60000022, "LO", secret.decode())
    ds.add_new(0x60003000, "OW", (secret + bytes(512))[:512])
    ds.add_new(0x50003000, "OW", (secret + bytes(5))[:12])
    icon = Dataset()
    icon.Rows = icon.Columns = 4
    icon.PixelData = (secret + bytes(5))[:16]
    icon["PixelData"].VR = "OB"
    ds.IconImageSequence = [icon]
    ds.EncapsulatedDocument = secret + b"."
    item = Dataset()
    item.add_new(0x00281408, "OW", (secret + bytes(5))[:12])
    ds.VOILUTSequence = [item]
    ds.file_meta.SourceApplicationEntityTitle = secret.decode()
    ds.preamble = (secret + bytes(128))[:128]
    assert written(ds).count(secret) >= 7
    deidentify_header(ds, key=KEY)
    assert secret not in written(ds)
    assert ds.PixelData


def test_attestation_says_what_was_done() -> None:
    ds = cleaned(plant(1, random.Random(1)))
    assert ds.PatientIdentityRemoved == "YES"
    assert ds.LongitudinalTemporalInformationModified == "MODIFIED"
    assert ds.DeidentificationMethod
    assert [item.CodeValue for item in ds.DeidentificationMethodCodeSequence] == ["113100", "113107"]


def test_dates_and_uids_are_consistent_for_a_patient_and_a_key() -> None:
    study = plant(1, random.Random(1))
    one, two = cleaned(study), cleaned(study)
    assert written(one) == written(two)
    assert (
        one.StudyDate
        == one.SeriesDate
        == shifted(study.date, key=KEY, patient=study.patient_id)
        != study.date
    )
    assert one.StudyInstanceUID == keyed_uid("1.2.826.0.1.3680043.9.1", key=KEY)
    other = cleaned(study, key=SiteKey(bytes(32)))
    assert other.StudyInstanceUID != one.StudyInstanceUID
    assert other.StudyDate != one.StudyDate


def test_interval_between_two_studies_of_a_patient_is_kept() -> None:
    first = shifted("20200101", key=KEY, patient="P")
    second = shifted("20200131", key=KEY, patient="P")
    import datetime

    days = datetime.date.fromisoformat(second) - datetime.date.fromisoformat(first)
    assert days.days == 30
    assert shifted("2020", key=KEY, patient="P") == ""
