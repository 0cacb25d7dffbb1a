"""One DICOM file: what its header says and what its pixels show.

Read are files with and without preamble, deflated or not, grey images of one frame in any transfer syntax for
which a decoder is installed; colour, several frames and unknown compression have a reason each.
Guarantees: declared and coded dimensions are checked before pixels are decompressed; modality, VOI and
presentation LUTs and MONOCHROME1 are applied once, so that air is dark; rows run to the patient's left and
columns to the feet where the header states the orientation. It opens no socket and reads no other file.
It does not de-identify (`dicom_header.py` does).
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from client.data.pixels import MAX_FILE_BYTES, Gray, verify_dimensions
from client.data.study import Reason
from common.errors import StudyRejected

_DEFLATED = "1.2.840.10008.1.2.1.99"
# What the first element of a dataset without preamble may be: a group length, a character set, a UID ...
_FIRST_VRS = (b"UL", b"CS", b"UI", b"SH", b"DA")
_FIRST_ELEMENTS = (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00", b"\x18\x00")
_MODALITIES = ("CR", "DX", "RG", "DR")
MIN_BITS = 6
_CHEST = ("chest", "thorax", "torax", "tórax", "lung", "胸")
_FRONTAL_WORDS = {"PA": "pa", "AP": "ap"}
_LATERAL_WORDS = ("LAT", "LATERAL", "LL", "RL", "LLD", "RLD", "OBL", "OBLIQUE", "PROFIL", "侧位")
# Who and where: elements whose value is a known identifier of this patient or of the staff.
IDENTIFYING = (
    ("name", "PatientName"),
    ("name", "OtherPatientNames"),
    ("name", "PatientBirthName"),
    ("name", "PatientMotherBirthName"),
    ("name", "ResponsiblePerson"),
    ("id", "PatientID"),
    ("id", "OtherPatientIDs"),
    ("id", "AccessionNumber"),
    ("id", "StudyID"),
    ("id", "IssuerOfPatientID"),
    ("date", "PatientBirthDate"),
    ("date", "StudyDate"),
    ("name", "ReferringPhysicianName"),
    ("name", "PerformingPhysicianName"),
    ("name", "OperatorsName"),
    ("name", "RequestingPhysician"),
    ("name", "NameOfPhysiciansReadingStudy"),
    ("name", "PhysiciansOfRecord"),
    ("place", "InstitutionName"),
    ("place", "InstitutionAddress"),
    ("place", "PatientAddress"),
    ("id", "PatientTelephoneNumbers"),
    ("id", "StationName"),
)


def read_dicom(source: Path | bytes, *, pixels: bool) -> Any:
    """Read a DICOM file; raises StudyRejected when it is no DICOM, damaged or too large."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_FILE_BYTES:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare = not _has_preamble(source)
            dataset = pydicom.dcmread(
                _inflated(source) or (io.BytesIO(source) if isinstance(source, bytes) else source),
                stop_before_pixels=not pixels,
                force=bare and is_dicom(source),
            )
            if "SOPClassUID" not in dataset and "DirectoryRecordSequence" not in dataset:
                raise StudyRejected(Reason.IMAGE_UNREADABLE)
            if "TransferSyntaxUID" not in dataset.file_meta:
                dataset.file_meta.TransferSyntaxUID = _native_syntax(dataset)
            return dataset
    except StudyRejected:
        raise
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise StudyRejected(Reason.IMAGE_UNREADABLE) from error
    except (
        AttributeError,
        TypeError,
        IndexError,
        struct.error,
        RecursionError,
        MemoryError,
        zlib.error,
    ) as error:
        raise StudyRejected(Reason.IMAGE_UNREADABLE) from error


def is_dicom(source: Path | bytes) -> bool:
    """Tell whether a file has the DICOM preamble, or starts as a dataset of old archives without one does."""
    head = _head(source)
    if head[128:] == b"DICM":
        return True
    group, vr, length = head[:2], head[4:6], int.from_bytes(head[4:8], "little")
    explicit = group in (b"\x02\x00", b"\x08\x00") and vr in _FIRST_VRS
    implicit = group == b"\x08\x00" and head[2:4] in _FIRST_ELEMENTS and 0 < length <= 128
    return len(head) == 132 and (explicit or implicit)


def view_of(dataset: Any) -> str:
    """Return pa, ap, lateral or '' from ViewPosition, view code, orientation or description."""
    position = text_of(dataset, "ViewPosition").upper()
    if position in _FRONTAL_WORDS:
        return _FRONTAL_WORDS[position]
    words = set(
        " ".join(
            [
                position,
                *(
                    text_of(dataset, name).upper()
                    for name in ("SeriesDescription", "AcquisitionDeviceProcessingDescription")
                ),
            ]
        )
        .replace("_", " ")
        .replace("/", " ")
        .split()
    )
    for item in dataset.get("ViewCodeSequence") or ():
        words.update(text_of(item, "CodeMeaning").upper().split())
    if words & set(_LATERAL_WORDS) or any("侧" in word for word in words):
        return "lateral"
    orientation = [part for part in text_of(dataset, "PatientOrientation").upper().split("\\") if part]
    if orientation and orientation[0][:1] in ("A", "P"):
        return "lateral"
    return next((view for word, view in _FRONTAL_WORDS.items() if word in words), "")


def verify_chest_radiograph(dataset: Any) -> None:
    """Raise StudyRejected unless the header describes a plain chest radiograph meant for reading."""
    if text_of(dataset, "Modality").upper() not in _MODALITIES:
        raise StudyRejected(Reason.NOT_CHEST)
    described = " ".join(
        text_of(dataset, name)
        for name in ("BodyPartExamined", "StudyDescription", "SeriesDescription", "ProtocolName")
    ).lower()
    part = text_of(dataset, "BodyPartExamined").lower()
    if part and not any(word in described for word in _CHEST):
        raise StudyRejected(Reason.NOT_CHEST)
    if text_of(dataset, "PresentationIntentType").upper() == "FOR PROCESSING":
        raise StudyRejected(Reason.NOT_ORIGINAL)
    if "LOCALIZER" in text_of(dataset, "ImageType").upper():
        raise StudyRejected(Reason.NOT_ORIGINAL)
    if text_of(dataset, "BurnedInAnnotation").upper() == "YES":
        raise StudyRejected(Reason.BURNED_IN_TEXT)


def decode_dicom(dataset: Any) -> Gray:
    """Decode to a 2-D uint16 array over the full range, air dark, upright; raises StudyRejected."""
    from pydicom.pixels import pixel_array
    from pydicom.pixels.processing import apply_modality_lut, apply_presentation_lut, apply_voi_lut

    _verify_pixel_module(dataset)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = pixel_array(dataset, index=0)
            if stored.shape != (int(dataset.Rows), int(dataset.Columns)):
                raise StudyRejected(Reason.IMAGE_UNREADABLE)
            values = apply_modality_lut(stored, dataset)
            padding = _padding(dataset, stored)
            has_voi = "VOILUTSequence" in dataset or dataset.get("WindowCenter") is not None
            values = apply_voi_lut(values, dataset, prefer_lut=True)
            inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
            if "PresentationLUTSequence" in dataset:
                values = apply_presentation_lut(values, dataset)
            elif text_of(dataset, "PresentationLUTShape").upper() == "INVERSE":
                inverted = True
    except StudyRejected:
        raise
    except MemoryError as error:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE) from error
    except Exception as error:  # decoders of four libraries raise what they like; any failure is one reason
        raise StudyRejected(Reason.IMAGE_UNREADABLE) from error
    scaled = _to_full_range(values.astype(np.float64), padding=padding, clip=not has_voi)
    if inverted:
        scaled = np.where(padding, 0, 65535 - scaled) if padding is not None else 65535 - scaled
    return _upright(scaled.astype(np.uint16), text_of(dataset, "PatientOrientation"))


def known_identifiers(dataset: Any) -> tuple[tuple[str, str], ...]:
    """Return (kind, value) of every identifier that the header gives for patient, staff and place."""
    found: list[tuple[str, str]] = []
    for kind, keyword in IDENTIFYING:
        value = dataset.get(keyword)
        if value is None or value == "":
            continue
        values = (
            value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
        )
        found.extend((kind, str(entry).strip()) for entry in values if str(entry).strip())
    return tuple(dict.fromkeys(found))


def text_of(dataset: Any, keyword: str) -> str:
    """Return an element as stripped text, multiple values joined by a backslash; '' when absent."""
    value = dataset.get(keyword)
    if value is None:
        return ""
    if type(value).__name__ == "MultiValue":
        return "\\".join(str(entry) for entry in value)
    return str(value).strip()


def coded_dimensions(frame: bytes) -> tuple[int, int] | None:
    """Read (width, height) from a JPEG, JPEG-LS or JPEG 2000 codestream; None when it has no such header."""
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 24:
        x1, y1, x0, y0 = struct.unpack(">4I", frame[8:24])
        return x1 - x0, y1 - y0
    if frame[:2] == b"\xff\xd8":
        at = 2
        while at + 9 <= len(frame) and frame[at] == 0xFF:
            marker = frame[at + 1]
            if marker == 0xFF or 0xD0 <= marker <= 0xD7 or marker == 0x01:
                at += 1 if marker == 0xFF else 2
                continue
            if marker in (
                0xF7,
                *range(0xC0, 0xC4),
                *range(0xC5, 0xC8),
                *range(0xC9, 0xCC),
                *range(0xCD, 0xD0),
            ):
                height, width = struct.unpack(">HH", frame[at + 5 : at + 9])
                return width, height
            at += 2 + struct.unpack(">H", frame[at + 2 : at + 4])[0]
    return None


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:132]
    with source.open("rb") as handle:
        return handle.read(132)


def _has_preamble(source: Path | bytes) -> bool:
    return _head(source)[128:] == b"DICM"


def _native_syntax(dataset: Any) -> Any:
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    return ImplicitVRLittleEndian if dataset.original_encoding[0] else ExplicitVRLittleEndian


def _inflated(source: Path | bytes) -> io.BytesIO | None:
    """Return a deflated file as a plain one, inflated within the size limit; None when it is not deflated."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import ExplicitVRLittleEndian

    if not _has_preamble(source):
        return None
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as handle:
        handle.seek(132)
        meta = FileMetaDataset(read_dataset(handle, False, True, stop_when=lambda tag, *_: tag.group != 2))
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return None
    start = 132 + 12 + int(meta.FileMetaInformationGroupLength)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    whole = source if isinstance(source, bytes) else source.read_bytes()
    body = inflater.decompress(whole[start:], MAX_FILE_BYTES)
    if inflater.unconsumed_tail:
        raise StudyRejected(Reason.IMAGE_TOO_LARGE)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain = io.BytesIO(bytes(128) + b"DICM")
    plain.seek(132)
    write_file_meta_info(plain, meta, enforce_standard=True)
    plain.write(body)
    plain.seek(0)
    return plain


def _verify_pixel_module(dataset: Any) -> None:
    """Check what the header declares, and what the codestream declares, against the limits."""
    from pydicom.encaps import generate_frames
    from pydicom.pixels import get_decoder

    try:
        width, height = int(dataset.Columns), int(dataset.Rows)
        frames = int(dataset.get("NumberOfFrames") or 1)
        samples = int(dataset.get("SamplesPerPixel") or 1)
        photometric = str(dataset.PhotometricInterpretation)
        data = dataset.PixelData
        bits = int(dataset.BitsStored)
        syntax = dataset.file_meta.TransferSyntaxUID
    except (AttributeError, ValueError, TypeError) as error:
        raise StudyRejected(Reason.IMAGE_UNREADABLE) from error
    verify_dimensions(width, height)
    if frames != 1:
        raise StudyRejected(Reason.MULTI_FRAME)
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise StudyRejected(Reason.COLOUR)
    if bits < MIN_BITS:
        raise StudyRejected(Reason.NOT_ORIGINAL)
    try:
        known = get_decoder(syntax).is_available
    except NotImplementedError:
        known = False
    if not known:
        raise StudyRejected(Reason.UNKNOWN_COMPRESSION)
    if syntax.is_encapsulated:
        try:
            coded = coded_dimensions(next(generate_frames(data, number_of_frames=1)))
        except (ValueError, StopIteration, struct.error) as error:
            raise StudyRejected(Reason.IMAGE_UNREADABLE) from error
        if coded is not None and coded != (width, height):
            raise StudyRejected(Reason.IMAGE_UNREADABLE)


def _padding(dataset: Any, stored: Any) -> Any:
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    mask = (stored >= low) & (stored <= high)
    return mask if mask.any() and not mask.all() else None


def _to_full_range(values: Any, *, padding: Any, clip: bool) -> Any:
    seen = values if padding is None else values[~padding]
    low, high = np.percentile(seen[::1], (0.1, 99.9)) if clip else (seen.min(), seen.max())
    if high <= low:
        raise StudyRejected(Reason.IMAGE_BLANK)
    scaled = np.rint(np.clip((values - low) / (high - low), 0, 1) * 65535)
    return scaled if padding is None else np.where(padding, 0, scaled)


def _upright(pixels: Gray, orientation: str) -> Gray:
    """Turn so that rows run to the patient's left and columns to the feet; unchanged when unstated."""
    parts = [part.strip().upper()[:1] for part in orientation.split("\\")]
    if len(parts) != 2 or not set(parts) <= {"L", "R", "F", "H"}:
        return pixels
    if parts[0] in "FH" and parts[1] in "LR":
        pixels, parts = pixels.T, parts[::-1]
    if parts[0] == "R":
        pixels = pixels[:, ::-1]
    if parts[1] == "H":
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
