"""Other formats: MIMIC-CXR-JPG, PadChest, Open-i XML, FHIR and DICOMDIR, in miniature."""

import base64
import csv
import gc
import gzip
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from pydicom.fileset import FileSet

from client.data.sources import guess_format, table
from client.data.sources.openi import parse_openi
from client.data.store import read_pairs
from common.errors import SourceInvalid
from tests.client.data.site_folder import jpeg, radiograph
from tests.client.data.synthetic_dicom import make_export
from tests.client.data.test_import_table import run_import


def convert(source: Path, out: Path, name: str) -> dict[str, Any]:
    assert guess_format(source) == name
    return run_import(source, out, "--format", "auto", "--no-check-writing")


def write_csv(path: Path, rows: list[list[str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    data = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def mimic(folder: Path) -> Path:
    rows = [["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows"]]
    for number, (subject, study, view) in enumerate(
        [
            ("10000032", "501", "PA"),
            ("10000032", "501", "LATERAL"),
            ("10000033", "502", "AP"),
            ("10000034", "503", "LL"),
        ]
    ):
        place = folder / f"files/p10/p{subject}"
        (place / f"s{study}").mkdir(parents=True, exist_ok=True)
        (place / f"s{study}/d{number}.jpg").write_bytes(jpeg(number))
        (place / f"s{study}.txt").write_text(
            f"FINAL REPORT\n FINDINGS: Nodule {number}.\n\n IMPRESSION: Same.\n"
        )
        rows.append([f"d{number}", subject, study, view, "128"])
    write_csv(folder / "mimic-cxr-2.0.0-metadata.csv.gz", rows)
    return folder


def test_mimic_cxr_jpg(tmp_path: Path) -> None:
    document = convert(mimic(tmp_path / "mimic"), tmp_path / "out", "mimic-cxr-jpg")
    assert document["dropped"] == {"lateral-view": 1}
    assert [(pair.view, pair.findings) for pair in read_pairs(tmp_path / "out")] == [
        ("pa", "Nodule 1."),
        ("ap", "Nodule 2."),
    ]


def test_padchest(tmp_path: Path) -> None:
    folder = tmp_path / "padchest"
    (folder / "0").mkdir(parents=True)
    rows = [["", "ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Report"]]
    for number, (study, patient, view) in enumerate(
        [("s1", "p1", "PA"), ("s2", "p2", "L"), ("s1", "p1", "L")]
    ):
        radiograph(number).save(folder / f"0/{number}.png")
        rows.append(
            ["", f"{number}.png", "0", study, patient, view, "cardiomegalia sin derrame de la base ."]
        )
    write_csv(folder / "PADCHEST_chest_x_ray_images_labels_160K.csv", rows)
    document = convert(folder, tmp_path / "out", "padchest")
    assert (document["read"], document["kept"], document["dropped"]) == (2, 1, {"lateral-view": 1})


OPENI = """<?xml version="1.0"?>{doctype}<eCitation><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Cough.</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">Normal.</AbstractText>
</Abstract></Article></MedlineCitation></eCitation>"""
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'


def test_openi_xml_with_entities_is_refused_per_report(tmp_path: Path) -> None:
    folder = tmp_path / "openi"
    (folder / "reports").mkdir(parents=True)
    (folder / "images").mkdir()
    rows = [["uid", "filename", "projection"]]
    for uid, (doctype, findings) in enumerate(
        [("", "The heart is normal."), (BOMB, "&b;"), (OUTSIDE, "&a;"), ("", "The lungs are clear.")], start=1
    ):
        text = OPENI.format(uid=uid, doctype=doctype, findings=findings)
        (folder / f"reports/{uid}.xml").write_text(text)
        radiograph(uid).save(folder / f"images/{uid}_IM.dcm.png")
        rows.append([str(uid), f"{uid}_IM.dcm.png", "Lateral" if uid == 4 else "Frontal"])
    write_csv(folder / "indiana_projections.csv", rows)
    assert parse_openi(folder / "reports/2.xml") == ("", {}, "report-unreadable")
    document = convert(folder, tmp_path / "out", "openi-xml")
    assert document["kept"] == 1
    assert document["dropped"] == {"lateral-view": 1, "report-unreadable": 2}
    assert read_pairs(tmp_path / "out")[0].indication == "Cough."


def test_fhir_reports_meet_dicom_by_study_uid_and_patients_are_scrubbed(tmp_path: Path) -> None:
    folder = tmp_path / "fhir"
    make_export(folder, 3, seed=5, side=128)
    (folder / "reports.csv").unlink()
    lines: list[dict[str, Any]] = [
        {"resourceType": "Patient", "id": "a", "name": [{"family": "Haverkamp", "given": ["Lotte"]}]}
    ]
    for number in range(3):
        text = f"FINDINGS: Lotte Haverkamp has a nodule of {number + 3} mm. IMPRESSION: Nodule."
        uid = {"system": "urn:dicom:uid", "value": f"urn:oid:1.2.826.0.1.3680043.9.{number}"}
        lines.append({"resourceType": "ImagingStudy", "id": str(number), "identifier": [uid]})
        lines.append(
            {
                "resourceType": "DiagnosticReport",
                "subject": {"reference": "Patient/a"},
                "imagingStudy": [{"reference": f"ImagingStudy/{number}"}],
                "presentedForm": [
                    {"contentType": "text/plain", "data": base64.b64encode(text.encode()).decode()}
                ],
            }
        )
    (folder / "export.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = convert(folder, tmp_path / "out", "fhir-ndjson")
    assert document["kept"] == 3
    assert [pair.findings for pair in read_pairs(tmp_path / "out")] == [
        f"___ has a nodule of {n} mm." for n in (3, 4, 5)
    ]


def test_bad_fhir_line_is_named(tmp_path: Path) -> None:
    make_export(tmp_path / "fhir", 1, seed=5, side=128)
    (tmp_path / "fhir/x.ndjson").write_text('{"resourceType": "Patient"}\n[1]\n')
    with pytest.raises(SourceInvalid, match=r"x\.ndjson:2"):
        run_import(tmp_path / "fhir", tmp_path / "out", "--format", "fhir-ndjson")


def write_medium(folder: Path, count: int) -> None:
    """Write a DICOM medium with its DICOMDIR and the report table."""
    make_export(folder / "export", count, seed=5, side=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # pydicom leaves its own temporary folder
        medium = FileSet()
        for path in sorted((folder / "export/dicom").rglob("*.dcm")):
            medium.add(path)
        medium.write(folder / "medium")
        del medium
        gc.collect()
    shutil.copy(folder / "export/reports.csv", folder / "medium")


def test_dicomdir_lists_the_images(tmp_path: Path) -> None:
    write_medium(tmp_path, 3)
    assert convert(tmp_path / "medium", tmp_path / "out", "dicomdir")["kept"] == 3


def test_dicomdir_that_leads_outside_is_refused(tmp_path: Path) -> None:
    write_medium(tmp_path, 1)
    listed = next(
        path
        for path in (tmp_path / "medium").rglob("*")
        if path.is_file() and path.name not in ("DICOMDIR", "reports.csv")
    )
    shutil.move(listed, tmp_path / "away")
    listed.symlink_to(tmp_path / "away")
    with pytest.raises(SourceInvalid, match="image-outside-folder"):
        run_import(tmp_path / "medium", tmp_path / "out", "--format", "dicomdir")


def test_compressed_table_that_inflates_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_INFLATED_BYTES", 100_000)
    folder = mimic(tmp_path / "mimic")
    path = folder / "mimic-cxr-2.0.0-metadata.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"x,1,1,PA,1\n" * 20_000))
    with pytest.raises(SourceInvalid, match="at most 100000 bytes"):
        run_import(folder, tmp_path / "out", "--format", "mimic-cxr-jpg")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SourceInvalid, match="damaged"):
        run_import(folder, tmp_path / "out", "--format", "mimic-cxr-jpg")
