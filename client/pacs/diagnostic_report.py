"""A draft as a FHIR R4 DiagnosticReport, status preliminary.

Guarantees: the resource has the elements of R4 4.0.1 and is checked by `fhir.resources` (its R4B model, whose
DiagnosticReport and Device are those of R4) before it is given out; the status is never final; its identifier
follows from image and draft, so that a server that honours If-None-Exist keeps one.
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from client.pacs.structured_report import WARNING, ReportText, derived_uid, model_facts

if TYPE_CHECKING:
    from client.serving.engine import ModelVersion

IDENTIFIER_SYSTEM = "urn:ietf:rfc:3986"
_XHTML = "http://www.w3.org/1999/xhtml"


def diagnostic_report(
    evidence: Any, text: ReportText, model: ModelVersion, *, issued: str, report_uid: str = ""
) -> bytes:
    """Build the resource as JSON; `issued` is an RFC 3339 instant, `report_uid` the SR's SOP Instance UID."""
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    header = {
        name: str(evidence.get(name) or "").strip()
        for name in ("PatientID", "IssuerOfPatientID", "AccessionNumber", "StudyDate", "StudyInstanceUID")
    }
    report_id = derived_uid("fhir", str(evidence.SOPInstanceUID), text.draft)
    identifiers = [{"system": IDENTIFIER_SYSTEM, "value": f"urn:oid:{report_id}"}]
    if header["AccessionNumber"]:
        kind = {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]}
        identifiers.append({"type": kind, "value": header["AccessionNumber"]})  # type: ignore[dict-item]
    value: dict[str, Any] = {
        "resourceType": "DiagnosticReport",
        "text": {"status": "generated", "div": _narrative(text)},
        "contained": [_device(model)],
        "identifier": identifiers,
        "status": "preliminary",
        "category": [
            {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}]}
        ],
        "code": {
            "coding": [
                {"system": "http://loinc.org", "code": "18748-4", "display": "Diagnostic imaging study"}
            ],
            "text": "Chest radiograph, preliminary draft",
        },
        "issued": issued,
        "performer": [{"reference": "#model", "type": "Device"}],
        "imagingStudy": [
            {
                "type": "ImagingStudy",
                "identifier": {
                    "system": "urn:dicom:uid",
                    "value": f"urn:oid:{header['StudyInstanceUID']}",
                },
            }
        ],
        "conclusion": " ".join(text.sentences),
    }
    if header["PatientID"]:
        subject = {"value": header["PatientID"]}
        if header["IssuerOfPatientID"]:
            subject["assigner"] = {"display": header["IssuerOfPatientID"]}  # type: ignore[assignment]
        value["subject"] = {"type": "Patient", "identifier": subject}
    date = header["StudyDate"]
    if len(date) == 8 and date.isdigit():
        value["effectiveDateTime"] = f"{date[:4]}-{date[4:6]}-{date[6:]}"
    if report_uid:
        value["identifier"].append({"system": "urn:dicom:uid", "value": f"urn:oid:{report_uid}"})
    DiagnosticReport.model_validate(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def identifier_of(report: bytes) -> str:
    """Return a report's first identifier as a search token, system|value."""
    first = json.loads(report)["identifier"][0]
    return f"{first['system']}|{first['value']}"


def _device(model: ModelVersion) -> dict[str, Any]:
    return {
        "resourceType": "Device",
        "id": "model",
        "manufacturer": "FedRad",
        "deviceName": [{"name": f"FedRad {model.study_id}", "type": "model-name"}],
        "version": [{"type": {"text": name}, "value": value} for name, value in model_facts(model)],
    }


def _narrative(text: ReportText) -> str:
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in text.sentences)
    return f'<div xmlns="{_XHTML}"><p><b>{escape(WARNING)}</b></p>{lines}</div>'
