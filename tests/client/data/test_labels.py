"""Labels beside the reports: read from the tables of others, compared with what the text says."""

import gzip
from pathlib import Path

import pytest

from client.data.labels import disagreements, parse_list, with_labels
from client.data.statements import contradictions, said_by
from client.data.study import SourceStudy
from common.errors import SourceInvalid
from tests.client.data.site_folder import jpeg, make_site, rows, write_table
from tests.client.data.test_import_table import run_import


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("['pleural effusion', 'cardiomegaly', 'loc right']", ("Pleural Effusion", "Cardiomegaly")),
        ("Cardiomegaly/borderline;Pulmonary Artery/enlarged", ("Cardiomegaly",)),
        ("Mass|Nodule", ("Lung Lesion",)),
        ("normal", ("No Finding",)),
        ("['exclude']", ()),
        ("", ()),
    ],
)
def test_lists_of_labels_are_read(value: str, expected: tuple[str, ...]) -> None:
    assert parse_list(value) == tuple((name, True) for name in expected)


@pytest.mark.parametrize(
    ("labels", "text", "language", "expected"),
    [
        ((("Pneumothorax", True),), "No pneumothorax.", "en", ("Pneumothorax",)),
        ((("Pneumothorax", True),), "Small apical pneumothorax.", "en", ()),
        ((("Pneumothorax", True),), "The lungs are clear.", "en", ()),
        ((("Edema", False),), "There is pulmonary edema.", "en", ("Edema",)),
        ((("Edema", False),), "There may be edema.", "en", ()),
        ((("No Finding", True),), "Large left pleural effusion.", "en", ("No Finding",)),
        ((("No Finding", True),), "Calcified granuloma. No effusion.", "en", ()),
        ((("Pleural Effusion", True),), "Sin derrame pleural.", "es", ("Pleural Effusion",)),
        ((("Pleural Effusion", True),), "Derrame pleural izquierdo.", "es", ()),
        ((("Pneumothorax", True),), "双肺清晰，未见气胸。", "zh", ("Pneumothorax",)),
        ((("Cardiomegaly", False),), "心影增大。", "zh", ("Cardiomegaly",)),
    ],
)
def test_label_disagrees_only_with_the_opposite(
    labels: tuple[tuple[str, bool], ...], text: str, language: str, expected: tuple[str, ...]
) -> None:
    assert disagreements(labels, text, language=language) == expected


def test_sections_that_say_opposite_things_are_found() -> None:
    assert contradictions("No pleural effusion.", "Small effusion.", language="en") == ("Pleural Effusion",)
    assert contradictions("Small effusion.", "Effusion. No pneumothorax.", language="en") == ()
    assert contradictions("No hay derrame.", "Derrame leve.", language="es") == ("Pleural Effusion",)
    assert said_by("Derrame derecho. Sin derrame izquierdo.", language="es") == {}


def study(name: str, patient: str) -> SourceStudy:
    return SourceStudy(where="1", patient=patient, study=name, images=(), text={})


def test_wide_table_is_joined_by_study_or_patient(tmp_path: Path) -> None:
    table = tmp_path / "chexpert.csv.gz"
    table.write_bytes(
        gzip.compress(b"subject_id,study_id,Edema,Fracture,Pneumonia\n7,50,1.0,,-1.0\n7,51,0.0,1,\n")
    )
    joined = {
        found.study: found.labels for found in with_labels(iter([study("50", "7"), study("51", "7")]), table)
    }
    assert joined == {"50": (("Edema", True),), "51": (("Edema", False), ("Fracture", True))}
    table = tmp_path / "by-patient.csv"
    table.write_text("patient,Mass,Nodule\n7,0,1\n8,0,0\n")
    (found,) = with_labels(iter([study("50", "7")]), table)
    assert found.labels == (("Lung Lesion", True),)


@pytest.mark.parametrize("content", ["a,Edema\n1,1\n", "patient,colour\n1,red\n"])
def test_table_without_key_or_labels_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(SourceInvalid, match="expected a column"):
        list(with_labels(iter([study("1", "1")]), tmp_path / "labels.csv"))


def test_contradicted_labels_are_flagged_at_import(tmp_path: Path) -> None:
    table = [{**row, "labels": ""} for row in rows(3)]
    table[0]["findings"], table[0]["labels"] = "No pleural effusion. Heart normal.", "Pleural Effusion"
    table[1]["findings"], table[1]["labels"] = "Small pleural effusion on the left.", "Pleural Effusion"
    source = make_site(tmp_path / "hospital", table)
    assert run_import(source, tmp_path / "out")["flags"]["labels-disagree"] == 1
    (tmp_path / "labels.csv").write_text("accession,Pneumothorax\nACC2,1\n")
    table[2]["findings"] = "Both lungs are expanded without pneumothorax."
    write_table(source / "reports.csv", table)
    options = ("--labels", str(tmp_path / "labels.csv"))
    assert run_import(source, tmp_path / "other", *options)["flags"]["labels-disagree"] == 2


def test_mimic_and_padchest_labels_are_found_in_their_places(tmp_path: Path) -> None:
    mimic = tmp_path / "mimic"
    place = mimic / "files/p10/p10000032"
    (place / "s50").mkdir(parents=True)
    (place / "s50/a.jpg").write_bytes(jpeg(1))
    (place / "s50.txt").write_text("FINDINGS: No pneumothorax. The heart is normal in size.")
    (mimic / "mimic-cxr-2.0.0-metadata.csv").write_text(
        "dicom_id,subject_id,study_id,ViewPosition\na,10000032,50,PA\n"
    )
    (mimic / "mimic-cxr-2.0.0-chexpert.csv").write_text(
        "subject_id,study_id,Pneumothorax,Edema\n10000032,50,1.0,\n"
    )
    assert run_import(mimic, tmp_path / "m", "--format", "auto")["flags"]["labels-disagree"] == 1
    padchest = tmp_path / "padchest"
    (padchest / "0").mkdir(parents=True)
    (padchest / "0/a.png").write_bytes(jpeg(2))
    (padchest / "PADCHEST_chest_x_ray_images_labels_160K.csv").write_text(
        "ImageID,ImageDir,StudyID,PatientID,Projection,Report,Labels\n"
        "a.png,0,s1,p1,PA,sin derrame pleural ni neumotorax . silueta cardiaca normal .,"
        "\"['pleural effusion']\"\n"
    )
    assert run_import(padchest, tmp_path / "p", "--format", "auto")["flags"]["labels-disagree"] == 1
