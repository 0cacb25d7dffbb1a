"""`--format dicom+table`: synthetic exports with planted identifiers come out without any of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from client.data.ocr import tesseract
from client.data.sitekey import load_key, study_pseudonym
from client.data.store import Pair, read_pairs
from common.errors import SourceInvalid
from tests.client.data.synthetic_dicom import Planted, dataset_for, make_export
from tests.client.data.test_import_table import run_import, tree

needs_tesseract = pytest.mark.skipif(tesseract() is None, reason="needs tesseract")


def leaks(studies: list[Planted], pairs: dict[str, Pair], attribute: str) -> tuple[int, int]:
    """Count planted identifiers in kept studies' text, and those that are still there as whole words."""
    planted = left = 0
    for study in studies:
        if study.accession not in pairs:
            continue
        pair = pairs[study.accession]
        text = f"{pair.indication} {pair.findings} {pair.impression}"
        for value in getattr(study, attribute):
            planted += 1
            left += re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.I) is not None
    return planted, left


def imported(
    folder: Path, studies: list[Planted], **options: str
) -> tuple[dict[str, Any], dict[str, Pair], dict[str, str]]:
    """Import the export and return document, pairs and drop reasons by accession."""
    extra = [part for name, value in options.items() for part in (f"--{name}", value) if name != "writing"]
    extra += ["--no-check-writing"] if options.get("writing") == "no" else []
    document = run_import(folder / "export", folder / "out", "--format", "dicom+table", *extra)
    key = load_key(folder / "test.key")
    names = {study_pseudonym(key, study.accession): study.accession for study in studies}
    pairs = {names[pair.study]: pair for pair in read_pairs(folder / "out")}
    drops = map(json.loads, (folder / "out/drops.jsonl").read_text().splitlines())
    return document, pairs, {names[drop["study"]]: drop["reason"] for drop in drops if drop["study"] in names}


def verify_export(folder: Path, count: int, **options: str) -> dict[str, float]:
    """Import `count` synthetic studies and return recall in text and quarantine rates."""
    studies = make_export(folder / "export", count, seed=7)
    document, pairs, drops = imported(folder, studies, **options)
    assert document["read"] == count == document["kept"] + sum(document["dropped"].values())
    assert set(pairs) | set(drops) == {study.accession for study in studies}
    assert not set(pairs) & set(drops)
    known, known_left = leaks(studies, pairs, "text_known")
    free, free_left = leaks(studies, pairs, "text_free")
    writing = {study.accession for study in studies if study.burned_in}
    quarantined = {accession for accession, reason in drops.items() if reason == "quarantine-burned-in-text"}
    return {
        "known_recall": 1 - known_left / max(1, known),
        "free_recall": 1 - free_left / max(1, free),
        "known_planted": known,
        "free_planted": free,
        "writing_recall": len(writing & quarantined) / max(1, len(writing)),
        "writing_planted": len(writing),
        "false_quarantine": len(quarantined - writing) / (count - len(writing)),
    }


@needs_tesseract
def test_planted_identifiers_do_not_come_through(tmp_path: Path) -> None:
    rates = verify_export(tmp_path, 16)
    assert rates["known_planted"] > 20
    assert (rates["known_recall"], rates["writing_recall"]) == (1, 1)
    assert rates["free_recall"] >= 0.98
    assert rates["false_quarantine"] <= 0.1


@needs_tesseract
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_five_thousand_studies_meet_the_levels(tmp_path: Path) -> None:
    rates = verify_export(tmp_path, 5000, workers="2")
    assert rates["known_recall"] == 1
    assert rates["free_recall"] >= 0.98
    assert rates["writing_recall"] >= 0.98
    assert rates["false_quarantine"] <= 0.02


def test_no_header_identifier_is_anywhere_in_the_output(tmp_path: Path) -> None:
    studies = make_export(tmp_path / "export", 12, seed=3)
    run_import(tmp_path / "export", tmp_path / "out", "--no-check-writing", "--with-dicom")
    files = tree(tmp_path / "out")
    assert sum(name.endswith(".dcm") for name in files) == 12
    everything = b" ".join(
        [*(data for name, data in files.items() if not name.endswith(".png")), *map(str.encode, files)]
    )
    for study in studies:
        for value in (study.accession, study.patient_id, study.birth, study.date):
            assert value.encode() not in everything


def test_laterals_are_left_out_and_missing_parts_have_reasons(tmp_path: Path) -> None:
    studies = make_export(tmp_path / "export", 4, seed=11, side=128)
    files = sorted((tmp_path / "export/dicom").rglob("*.dcm"))
    for path in files:
        if path.name.endswith("-lat.dcm") or path.stem == "000000":
            path.unlink()
    import numpy as np

    lateral = dataset_for(studies[0], np.full((128, 128), 0.5), view="LL", number=0, inverted=False)
    lateral.save_as(tmp_path / "export/dicom/only-lateral.dcm", enforce_file_format=True)
    table = tmp_path / "export/reports.csv"
    table.write_text(
        "".join(line for line in table.read_text().splitlines(keepends=True) if "XR000001," not in line)
    )
    with table.open("a") as handle:
        handle.write("XR777777,FINDINGS: Clear.\n")
    document, pairs, drops = imported(tmp_path, studies, writing="no")
    assert drops == {"XR000000": "lateral-view", "XR000001": "no-report"}
    assert document["dropped"] == {"lateral-view": 1, "no-image": 1, "no-report": 1}
    assert set(pairs) == {"XR000002", "XR000003"}


def test_folder_without_dicom_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export/reports.csv").write_text("accession,report\nA,FINDINGS: Clear.\n")
    with pytest.raises(SourceInvalid, match="expected DICOM files"):
        run_import(tmp_path / "export", tmp_path / "out", "--format", "dicom+table")


def test_unusual_files_come_out_de_identified_too(tmp_path: Path) -> None:
    """A deflated file, one without file meta, and one whose overlay carries the name."""
    import numpy as np
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    studies = make_export(tmp_path / "export", 3, seed=5, side=128)
    for path in (tmp_path / "export/dicom").rglob("*-lat.dcm"):
        path.unlink()
    files = sorted((tmp_path / "export/dicom").rglob("*.dcm"))
    deflated, bare, overlaid = (pydicom.dcmread(path) for path in files)
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    deflated.save_as(files[0], enforce_file_format=True)
    del bare.file_meta
    pydicom.dcmwrite(files[1], bare, implicit_vr=False, little_endian=True, enforce_file_format=False)
    secret = b"BRANDTZOFIA"
    overlaid.add_new(0x60000010, "US", 128)
    overlaid.add_new(0x60000011, "US", 128)
    overlaid.add_new(0x60000022, "LO", secret.decode())
    overlaid.add_new(0x60003000, "OW", (secret + bytes(2048))[:2048])
    overlaid.add_new(0x60004000, "LT", secret.decode())
    overlaid.save_as(files[2], enforce_file_format=True)
    document, pairs, _ = imported(tmp_path, studies, writing="no")
    assert len(pairs) == 3, document["dropped"]
    run_import(tmp_path / "export", tmp_path / "with", "--no-check-writing", "--with-dicom")
    written = sorted((tmp_path / "with/dicom").rglob("*.dcm"))
    assert len(written) == 3
    everything = b"".join(path.read_bytes() for path in written)
    assert secret not in everything
    for study in studies:
        for value in (study.patient_id, study.accession, study.birth):
            assert value.encode() not in everything
    for path in written:
        again = pydicom.dcmread(path)
        assert again.PatientIdentityRemoved == "YES"
        assert not [element for element in again if element.tag.group == 0x6000]
        assert np.ptp(again.pixel_array) > 0


def words_of(dataset: Any) -> set[str]:
    """Collect the words of every element at every depth but pixels, lower case."""
    found: set[str] = set()
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                found |= words_of(item)
        elif element.keyword != "PixelData":
            found |= set(re.findall(r"[^\W_]+", str(element.value).lower()))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousand_headers_hold_no_planted_identifier(tmp_path: Path) -> None:
    import pydicom

    studies = make_export(tmp_path / "export", 1000, seed=12, side=96)
    run_import(
        tmp_path / "export", tmp_path / "out", "--no-check-writing", "--no-check-chest", "--with-dicom"
    )
    key = load_key(tmp_path / "test.key")
    planted = kept = 0
    for study in studies:
        name = study_pseudonym(key, study.accession)
        for path in (tmp_path / "out/dicom" / name[1:3]).glob(f"{name}-*.dcm"):
            kept += 1
            words = words_of(pydicom.dcmread(path))
            secrets = (
                *(study.patient_id, study.accession, study.birth, study.date, study.family, study.given),
                *study.physician.split("^"),
                *("northvale", "infirmary", "elm", "synthetic"),
            )
            planted += len(secrets)
            assert not words & {secret.lower() for secret in secrets}
    assert kept >= 990
    print(f"{kept} files, {planted} identifiers planted in headers, none left")
