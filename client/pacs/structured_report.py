"""A draft as a DICOM structured report: same study, new series, partial, unverified, preliminary.

Enhanced SR after TID 2000 (Basic Diagnostic Imaging Report): language, device observer (TID 1004), the
algorithm with its version and parameters (TID 4019: release, round, adapter hash, release ε), the indication,
one finding per sentence inferred from the image, and a comment that nobody has verified it.

Guarantees: UIDs follow from image and draft alone, so the same draft is the same object wherever it is made
again; the flags are never complete, final or verified. It holds the patient's header as the image has it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import ImageUnreadable

if TYPE_CHECKING:
    from client.serving.engine import ModelVersion

MANUFACTURER = "FedRad"
SERIES_NUMBER = 9901
WARNING = (
    "Preliminary draft written by a machine; not verified by any person. "
    "A radiologist reads the image and signs the report."
)
_NAMESPACE = uuid.UUID("6f1f8a53-7d0e-5a86-9a3e-3c3d6f9b2b11")
_NEEDED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_LEFT_OUT = ("PatientComments", "AdditionalPatientHistory", "PatientAddress", "PatientTelephoneNumbers")


@dataclass(frozen=True, slots=True)
class ReportText:
    """What a report says: the sentences in order, why the study was made, the draft's id."""

    draft: str
    sentences: tuple[str, ...]
    indication: str


def derived_uid(*parts: str) -> str:
    """Derive a UID from what it names, below 2.25 (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(31).join(parts)).int}"


def read_evidence(data: bytes) -> Any:
    """Read an image's header with what a report in its study needs; raises ImageUnreadable."""
    import io

    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        for keyword in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
            if not dataset.get(keyword):
                raise ImageUnreadable(f"expected a DICOM image with {keyword}, got none")
        dataset.decode()
        dataset.SpecificCharacterSet = "ISO_IR 192"  # names in any script, and words in any language
    except (InvalidDicomError, OSError, ValueError, AttributeError, LookupError, EOFError) as error:
        raise ImageUnreadable(f"expected a DICOM image, got {type(error).__name__}") from error
    for keyword in _NEEDED:
        if keyword not in dataset:
            setattr(dataset, keyword, "")
    for keyword in _LEFT_OUT:
        if keyword in dataset:
            delattr(dataset, keyword)
    return dataset


def structured_report(
    evidence: Any, text: ReportText, model: ModelVersion, *, institution: str = ""
) -> bytes:
    """Build the report on one image (its header, `read_evidence`); returns a DICOM file."""
    import io

    from highdicom import sr
    from pydicom.sr.codedict import codes

    within = sr.RelationshipTypeValues.CONTAINS
    root = sr.ContainerContentItem(
        name=codes.LN.DiagnosticImagingReport, template_id="2000", is_content_continuous=False
    )
    language = sr.LanguageOfContentItemAndDescendants(sr.CodedConcept("en", "RFC5646", "English"))
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=derived_uid("device", model.study, model.adapter_sha256),
            name=f"{model.study_id} v{model.version}"[:64],
            manufacturer_name=MANUFACTURER,
            model_name=model.base[:64],
            serial_number=model.adapter_sha256[:16],
        ),
    )
    algorithm = sr.AlgorithmIdentification(
        name=f"FedRad {model.study_id}"[:64],
        version=str(model.version),
        parameters=[f"{name}={value}" for name, value in model_facts(model)],
        manufacturer=MANUFACTURER,
    )
    parts: list[Any] = [*language, *observer, *algorithm]
    if text.indication:
        parts.append(
            _section(
                sr,
                codes.DCM.IndicationsForProcedure,
                [sr.TextContentItem(codes.DCM.Comment, text.indication[:1024], within)],
            )
        )
    image = sr.ImageContentItem(
        name=codes.DCM.BestIllustrationOfFinding,
        referenced_sop_class_uid=evidence.SOPClassUID,
        referenced_sop_instance_uid=evidence.SOPInstanceUID,
        relationship_type=sr.RelationshipTypeValues.INFERRED_FROM,
    )
    findings = []
    for sentence in text.sentences:
        finding = sr.TextContentItem(codes.DCM.Finding, sentence, within)
        finding.ContentSequence = sr.ContentSequence([image])
        findings.append(finding)
    parts.append(_section(sr, codes.DCM.Findings, findings))
    parts.append(sr.TextContentItem(codes.DCM.Comment, WARNING, within))
    root.ContentSequence = sr.ContentSequence(parts)

    report = sr.EnhancedSR(
        evidence=[evidence],
        content=root,
        series_instance_uid=derived_uid("series", evidence.StudyInstanceUID, model.adapter_sha256),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derived_uid("report", evidence.SOPInstanceUID, text.draft),
        instance_number=_number(evidence),
        manufacturer=MANUFACTURER,
        is_complete=False,
        is_final=False,
        is_verified=False,
        institution_name=institution or str(evidence.get("InstitutionName") or "") or None,
        series_description="FedRad preliminary draft",
        manufacturer_model_name=model.base[:64],
        software_versions=f"{model.study_id} v{model.version}"[:64],
        device_serial_number=model.adapter_sha256[:16],
    )
    stream = io.BytesIO()
    report.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def model_facts(model: ModelVersion) -> list[tuple[str, str]]:
    """Name and value of what identifies a release, for the reports that it writes."""
    epsilon = "none claimed" if model.release_epsilon is None else f"{model.release_epsilon:.4g}"
    return [
        ("study", model.study),
        ("release", str(model.version)),
        ("round", str(model.round)),
        ("adapter-sha256", model.adapter_sha256),
        ("base", model.base),
        ("mode", model.mode),
        ("release-epsilon", epsilon),
        ("delta", f"{model.delta:.4g}"),
    ]


def _section(sr: Any, name: Any, items: list[Any]) -> Any:
    section = sr.ContainerContentItem(
        name=name, is_content_continuous=False, relationship_type=sr.RelationshipTypeValues.CONTAINS
    )
    section.ContentSequence = sr.ContentSequence(items)
    return section


def _number(evidence: Any) -> int:
    """Number the report as its image, so that the reports of one study differ."""
    try:
        return max(1, min(int(evidence.InstanceNumber), 2**31 - 1))
    except (AttributeError, TypeError, ValueError):
        return 1
