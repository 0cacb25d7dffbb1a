"""The labeller reads findings, negations and doubts, and agrees with the labels of real reports."""

import csv
from pathlib import Path

import numpy as np
import pytest

from common.labeller import LABELS, Status, label_report, present_findings
from common.model import phantom_reports, phantoms

IU = Path(__file__).parents[3] / "shared" / "data" / "iu-xray"


@pytest.mark.parametrize(
    ("text", "label", "status"),
    [
        ("There is a small right pleural effusion.", "Pleural Effusion", Status.POSITIVE),
        ("No pleural effusion.", "Pleural Effusion", Status.NEGATIVE),
        ("No pneumothorax or large pleural effusion.", "Pleural Effusion", Status.NEGATIVE),
        ("No pneumothorax, small left effusion.", "Pleural Effusion", Status.POSITIVE),
        ("Pericardial effusion.", "Pleural Effusion", None),
        ("The effusion has resolved.", "Pleural Effusion", Status.NEGATIVE),
        ("No change in the left effusion.", "Pleural Effusion", Status.POSITIVE),
        ("A small effusion cannot be excluded.", "Pleural Effusion", Status.UNCERTAIN),
        ("Heart is not enlarged.", "Cardiomegaly", Status.NEGATIVE),
        ("The heart is mildly enlarged.", "Cardiomegaly", Status.POSITIVE),
        ("Borderline cardiomegaly.", "Cardiomegaly", Status.UNCERTAIN),
        ("Heart size is normal.", "Cardiomegaly", None),
        (
            "Lungs are without focal consolidation, pneumothorax, or effusion.",
            "Pneumothorax",
            Status.NEGATIVE,
        ),
        ("No effusion but there is bibasilar atelectasis.", "Atelectasis", Status.POSITIVE),
        ("Opacity which may represent pneumonia.", "Pneumonia", Status.UNCERTAIN),
        ("Opacity which may represent pneumonia.", "Lung Opacity", Status.POSITIVE),
        ("Massive improvement.", "Lung Lesion", None),
        ("8 mm nodule in the right upper lobe.", "Lung Lesion", Status.POSITIVE),
        ("Right PICC tip in the SVC.", "Support Devices", Status.POSITIVE),
        ("Healed rib fractures.", "Fracture", Status.POSITIVE),
        ("Apical pleural thickening.", "Pleural Other", Status.POSITIVE),
        ("Widened mediastinum.", "Enlarged Cardiomediastinum", Status.POSITIVE),
        ("Interstitial edema.", "Edema", Status.POSITIVE),
        ("Left lower lobe consolidation.", "Consolidation", Status.POSITIVE),
    ],
)
def test_sentence_is_read(text: str, label: str, status: Status | None) -> None:
    assert label_report(text).get(label) is status


def test_flipping_a_negation_flips_every_label() -> None:
    for words in (
        "pleural effusion",
        "pneumothorax",
        "consolidation",
        "edema",
        "cardiomegaly",
        "atelectasis",
    ):
        there, gone = present_findings(f"There is {words}."), present_findings(f"There is no {words}.")
        assert "No Finding" not in there and gone == {"No Finding"}


def test_a_device_alone_is_no_finding() -> None:
    assert present_findings("Cardiac pacemaker in place. Lungs are clear.") == {
        "No Finding",
        "Support Devices",
    }


def test_an_empty_report_has_no_finding() -> None:
    assert label_report("") == {"No Finding": Status.POSITIVE}


def test_every_phantom_report_is_read_as_it_was_written() -> None:
    rng = np.random.default_rng(3)
    prevalence = dict.fromkeys(phantoms.LABELS, 0.3)
    for _ in range(1500):
        findings = phantoms.draw_findings(rng, prevalence)
        report = phantom_reports.write_report(findings, phantom_reports.Style(), rng)
        expected = {finding.label for finding in findings}
        assert present_findings(report.findings) - {"No Finding"} == expected, report.findings
        assert set(present_findings(report.findings)) <= set(LABELS)


@pytest.mark.realdata
@pytest.mark.skipif(not IU.is_dir(), reason="needs ../shared/data/iu-xray")
def test_real_reports_get_the_labels_of_their_indexers() -> None:
    """Micro-F1 at least 0.85 over the observations with ten cases or more (MeSH codes as the truth)."""
    columns = {
        "Pleural Effusion": ("Effusion",),
        "Cardiomegaly": ("Cardiomegaly",),
        "Atelectasis": ("Atelectasis",),
        "Lung Lesion": ("Mass", "Nodule"),
        "Edema": ("Edema",),
        "Consolidation": ("Consolidation",),
        "Pleural Other": ("Pleural_Thickening",),
    }
    with (IU / "finding_labels.csv").open() as handle:
        truth = {row["patient"]: row for row in csv.DictReader(handle)}
    right = wrong = missed = 0
    for table in sorted(IU.glob("*/reports.csv")):
        with table.open() as handle:
            for row in csv.DictReader(handle):
                found = present_findings(f"{row['findings']}\n{row['impression']}")
                for label, names in columns.items():
                    there = any(truth[row["patient"]][name] == "1" for name in names)
                    right += there and label in found
                    wrong += not there and label in found
                    missed += there and label not in found
    assert 2 * right / (2 * right + wrong + missed) >= 0.85
