"""The two forms of a draft: flags, study, model and ε inside, stable identifiers, valid by the standards."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from fhir.resources.R4B.diagnosticreport import DiagnosticReport

from client.pacs.diagnostic_report import diagnostic_report, identifier_of
from client.pacs.structured_report import ReportText, derived_uid, read_evidence, structured_report
from client.serving.worklist import indication_of, patient_of
from common.errors import ImageUnreadable
from tests.client.pacs.nodes import SENTENCES, VERSION, chest, chest_bytes

TEXT = ReportText("d" * 32, SENTENCES, "Cough.")
ISSUED = "2026-11-22T11:00:00+00:00"


def read(report: bytes) -> Any:
    return pydicom.dcmread(io.BytesIO(report))


def values(item: Any) -> list[str]:
    """All text values of a content tree."""
    own = [str(item.TextValue)] if "TextValue" in item else []
    return own + [text for child in item.get("ContentSequence", []) for text in values(child)]


def test_structured_report_is_preliminary_and_in_the_same_study() -> None:
    image = chest(3)
    report = read(structured_report(read_evidence(chest_bytes(3)), TEXT, VERSION))
    flags = (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag)
    assert flags == ("PARTIAL", "UNVERIFIED", "PRELIMINARY")
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber", "StudyDate"):
        assert report[keyword].value == image[keyword].value
    assert report.SeriesInstanceUID != image.SeriesInstanceUID and report.Modality == "SR"
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID


def test_structured_report_names_release_round_and_epsilon() -> None:
    text = values(read(structured_report(read_evidence(chest_bytes(3)), TEXT, VERSION)))
    for wanted in (
        "release=3",
        "round=20",
        f"adapter-sha256={'a' * 64}",
        "release-epsilon=4.5",
        "delta=1e-05",
    ):
        assert wanted in text
    assert set(SENTENCES) <= set(text) and any("not verified" in one for one in text)
    unclaimed = replace(VERSION, release_epsilon=None)
    text = values(read(structured_report(read_evidence(chest_bytes(3)), TEXT, unclaimed)))
    assert "release-epsilon=none claimed" in text


def test_free_text_about_the_patient_is_not_copied() -> None:
    report = structured_report(read_evidence(chest_bytes(3)), TEXT, VERSION)
    assert b"prefers mornings" in chest_bytes(3)
    assert b"prefers mornings" not in report and b"Elm Street" not in report


def test_same_draft_is_the_same_object_and_another_is_not() -> None:
    evidence = read_evidence(chest_bytes(3))
    one, two = (read(structured_report(evidence, TEXT, VERSION)) for _ in range(2))
    other = read(structured_report(evidence, replace(TEXT, draft="e" * 32), VERSION))
    assert one.SOPInstanceUID == two.SOPInstanceUID != other.SOPInstanceUID
    assert one.SeriesInstanceUID == other.SeriesInstanceUID
    assert len(one.SOPInstanceUID) <= 64 and derived_uid("a", "b") != derived_uid("ab")


def test_image_with_an_empty_header_still_gets_a_report() -> None:
    bare = chest(3)
    for keyword in (
        "PatientName",
        "PatientBirthDate",
        "AccessionNumber",
        "ReferringPhysicianName",
        "StudyID",
    ):
        delattr(bare, keyword)
    bare.PatientID = bare.StudyDate = bare.InstanceNumber = ""
    stream = io.BytesIO()
    bare.save_as(stream, enforce_file_format=True)
    evidence = read_evidence(stream.getvalue())
    assert read(structured_report(evidence, TEXT, VERSION)).InstanceNumber == 1
    value = json.loads(diagnostic_report(evidence, TEXT, VERSION, issued=ISSUED))
    assert "subject" not in value and "effectiveDateTime" not in value


@pytest.mark.parametrize(
    ("characters", "name", "indication"),
    [
        ("GB18030", "Wang^XiaoDong=王^小东", "咳嗽两周"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小东", "咳嗽两周"),
        ("ISO_IR 100", "Müller^Jörg", "Übelkeit"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", "cough"),
    ],
)
def test_names_in_any_script_survive(characters: str | list[str], name: str, indication: str) -> None:
    image = chest(3)
    image.SpecificCharacterSet, image.PatientName = characters, name
    image.ReasonForTheRequestedProcedure = indication
    stream = io.BytesIO()
    image.save_as(stream, enforce_file_format=True)
    evidence = read_evidence(stream.getvalue())
    report = read(structured_report(evidence, replace(TEXT, indication=indication_of(evidence)), VERSION))
    assert str(report.PatientName) == name and indication in values(report)
    assert patient_of(evidence).name.endswith(name.split("=")[0].replace("^", " "))
    assert "=" not in name or patient_of(evidence).name.startswith(name.split("=")[1].replace("^", ""))


@pytest.mark.parametrize("data", [b"", b"no image", b"\0" * 128 + b"DICM" + b"rest"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageUnreadable):
        read_evidence(data)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="Debian's dicom3tools is not installed")
def test_independent_validator_finds_nothing_wrong(tmp_path: Path) -> None:
    (tmp_path / "sr.dcm").write_bytes(structured_report(read_evidence(chest_bytes(3)), TEXT, VERSION))
    found = subprocess.run(["dciodvfy", str(tmp_path / "sr.dcm")], capture_output=True, text=True, check=True)
    assert found.stderr.split() == ["EnhancedSR"]


def test_diagnostic_report_is_valid_preliminary_and_names_its_model() -> None:
    evidence = read_evidence(chest_bytes(3))
    value = json.loads(diagnostic_report(evidence, TEXT, VERSION, issued=ISSUED, report_uid="2.25.7"))
    DiagnosticReport.model_validate(value)
    assert value["status"] == "preliminary" and value["conclusion"] == " ".join(SENTENCES)
    assert value["subject"]["identifier"]["value"] == "445569"
    assert value["imagingStudy"][0]["identifier"]["value"] == f"urn:oid:{evidence.StudyInstanceUID}"
    facts = {one["type"]["text"]: one["value"] for one in value["contained"][0]["version"]}
    assert (facts["round"], facts["release-epsilon"], facts["adapter-sha256"]) == ("20", "4.5", "a" * 64)
    assert {"system": "urn:dicom:uid", "value": "urn:oid:2.25.7"} in value["identifier"]
    assert identifier_of(json.dumps(value).encode()) == f"urn:ietf:rfc:3986|{value['identifier'][0]['value']}"


def test_marks_in_a_draft_stay_text_in_the_narrative() -> None:
    text = replace(TEXT, sentences=("<script>alert(1)</script> & more.",))
    value = json.loads(diagnostic_report(read_evidence(chest_bytes(3)), text, VERSION, issued=ISSUED))
    assert "<script>" not in value["text"]["div"] and "&lt;script&gt;" in value["text"]["div"]
