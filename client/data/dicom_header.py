"""De-identification of a DICOM header: PS3.15 Basic Profile, with what the profile asks to be written.

Guarantees: the profile of dicom-anonymizer is applied at every depth; UIDs are replaced by keyed ones and
study dates shifted by one keyed interval per patient, both the same on every run; private elements, overlays,
curves, icons and every binary element but pixels and LUTs go, and so do preamble and sender in the file meta
information; every remaining text element that holds a known identifier goes; the attestation attributes say
what was done.
Pixel data is kept: `burned_in.py` decides whether it may be.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import io
from contextlib import redirect_stdout
from typing import Any

from client.data.deidentify import Known, left_over
from client.data.dicom import known_identifiers, text_of
from client.data.sitekey import SiteKey, date_shift, patient_pseudonym, study_pseudonym

METHOD = "FedRad: PS3.15 Basic Profile, dates shifted, known ids removed"
# DCM codes of PS3.16 CID 7050.
_CODES = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
)
_SHIFTED = ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
_KEPT_UIDS = ("SOPClassUID", "MediaStorageSOPClassUID", "TransferSyntaxUID", "ImplementationClassUID")
_BINARY_VRS = ("OB", "OW", "OF", "OD", "OL", "OV", "UN")
_KEPT_BINARIES = ("PixelData", "LUTData")
_KEPT_META = (
    "FileMetaInformationVersion", "MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID",
    "TransferSyntaxUID", "ImplementationClassUID",
)  # fmt: skip
_TEXT_VRS = ("AE", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UT", "UR", "AS")


def deidentify_header(dataset: Any, *, key: SiteKey, known: tuple[Known, ...] = ()) -> None:
    """De-identify a dataset in place; `known` adds identifiers of the paired table to those of the header."""
    patient = text_of(dataset, "PatientID")
    study = text_of(dataset, "AccessionNumber") or text_of(dataset, "StudyInstanceUID")
    identifiers = (*known_identifiers(dataset), *known)
    dates = {name: shifted(text_of(dataset, name), key=key, patient=patient) for name in _SHIFTED}
    uids = _keyed_uids(dataset, key)
    _apply_profile(dataset)
    for at, tag, value in uids:
        if tag in at:
            at[tag].value = value
    for name, value in dates.items():
        if value:
            setattr(dataset, name, value)
    dataset.PatientID = patient_pseudonym(key, patient)
    dataset.PatientName = dataset.PatientID
    dataset.AccessionNumber = study_pseudonym(key, study)[:16]
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    _remove_pictures(dataset)
    _remove_known(dataset, identifiers)
    _clear_meta(dataset)
    _attest(dataset)


def shifted(date: str, *, key: SiteKey, patient: str) -> str:
    """Shift a DICOM date (YYYYMMDD) by the patient's interval; '' for anything else."""
    try:
        day = datetime.datetime.strptime(date, "%Y%m%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        return ""
    return (day + date_shift(key, patient)).strftime("%Y%m%d")


def keyed_uid(uid: str, *, key: SiteKey) -> str:
    """Return the 2.25 UID that stands for a UID at this site."""
    digest = hmac.new(key.derive("uid"), uid.encode(), hashlib.sha256).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big') >> 1}"


def _keyed_uids(dataset: Any, key: SiteKey) -> list[tuple[Any, Any, str]]:
    found: list[tuple[Any, Any, str]] = []

    def visit(at: Any) -> None:
        for element in at:
            if element.VR == "SQ":
                for item in element.value:
                    visit(item)
            elif element.VR == "UI" and element.keyword not in _KEPT_UIDS and isinstance(element.value, str):
                found.append((at, element.tag, keyed_uid(str(element.value), key=key)))

    visit(dataset)
    return found


def _apply_profile(dataset: Any) -> None:
    from dicomanonymizer import anonymize_dataset

    with redirect_stdout(io.StringIO()):
        anonymize_dataset(dataset)
    for element in list(dataset):
        if element.VR == "SQ":
            for item in element.value:
                _apply_profile(item)


def _remove_pictures(dataset: Any) -> None:
    """Remove what may show or hold text beside the image, which the profile's tag list does not reach."""
    for element in list(dataset):
        drawn = element.tag.group & 0xFF00 in (0x5000, 0x6000) or element.keyword == "IconImageSequence"
        if drawn or (element.VR in _BINARY_VRS and element.keyword not in _KEPT_BINARIES):
            del dataset[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                _remove_pictures(item)


def _clear_meta(dataset: Any) -> None:
    """Clear the preamble, which may hold another file, and the sender in the file meta information."""
    dataset.preamble = bytes(128)
    for element in list(dataset.file_meta):
        if element.keyword not in _KEPT_META:
            del dataset.file_meta[element.tag]


def _remove_known(dataset: Any, known: tuple[Known, ...]) -> None:
    for element in list(dataset):
        if element.VR == "SQ":
            for item in element.value:
                _remove_known(item, known)
        elif element.VR in _TEXT_VRS and element.keyword not in (*_SHIFTED, "PatientID", "PatientName"):
            values = element.value if isinstance(element.value, (list, tuple)) else [element.value]
            if left_over(" ".join(str(value) for value in values), known):
                del dataset[element.tag]


def _attest(dataset: Any) -> None:
    from pydicom.dataset import Dataset

    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = METHOD
    dataset.LongitudinalTemporalInformationModified = "MODIFIED"
    items = []
    for value, meaning in _CODES:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning[:64]
        items.append(item)
    dataset.DeidentificationMethodCodeSequence = items
