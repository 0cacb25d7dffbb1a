"""The labeller reads findings, negations and doubts, and agrees with the labels of real reports."""

import numpy as np
import pytest

from common.labeller import LABELS, Status, Vocabulary, label_report, present_findings
from common.model import phantom_reports, phantoms
from tests.common.labeller_scores import REPORTS, score_labeller


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
        ("Borderline cardiomegaly.", "Cardiomegaly", Status.HEDGED),
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


@pytest.mark.parametrize(
    ("text", "label", "status"),
    [
        ("Patchy infiltrate at the right base.", "Infiltration", Status.POSITIVE),
        ("No focal infiltrate.", "Infiltration", Status.NEGATIVE),
        ("Opacity may represent atelectasis or infiltrate.", "Infiltration", Status.UNCERTAIN),
        ("Atelectasis versus infiltrate.", "Infiltration", Status.HEDGED),
        ("Compatible with mild scarring or atelectasis.", "Atelectasis", Status.HEDGED),
        ("Which may be compatible with mild edema.", "Edema", Status.UNCERTAIN),
        ("Soft tissue edema at the ankle.", "Edema", None),
        ("Subcutaneous emphysema of the neck.", "Emphysema", None),
        ("Bullous emphysema.", "Emphysema", Status.POSITIVE),
        ("Small hiatal hernia.", "Hernia", Status.POSITIVE),
        ("There is thickening of the fissure.", "Pleural Thickening", Status.POSITIVE),
        ("Changes of cystic fibrosis.", "Fibrosis", None),
        ("Partial collapse of the left upper and lower lobes.", "Atelectasis", Status.POSITIVE),
        ("The heart size is persistently enlarged.", "Cardiomegaly", Status.POSITIVE),
    ],
)
def test_sentence_is_read_for_chest14(text: str, label: str, status: Status | None) -> None:
    assert label_report(text, Vocabulary.CHEST14).get(label) is status


def test_least_status_says_which_doubts_count() -> None:
    text = "Edema. Probable effusion. Nodule cannot be excluded. No pneumothorax."
    counted = [
        present_findings(text, Vocabulary.CHEST14, least=least)
        for least in (Status.POSITIVE, Status.HEDGED, Status.UNCERTAIN)
    ]
    assert counted == [{"Edema"}, {"Edema", "Effusion"}, {"Edema", "Effusion", "Nodule"}]


@pytest.mark.realdata
@pytest.mark.skipif(not REPORTS.is_dir(), reason="needs ../shared/data/iu-xray")
@pytest.mark.parametrize("half", ["developed on", "held out", "all"])
@pytest.mark.parametrize("vocabulary", list(Vocabulary))
def test_real_reports_get_the_labels_of_the_experts(half: str, vocabulary: Vocabulary) -> None:
    """Micro-F1 at least 0.85 over the findings with ten cases or more, also on reports never looked at."""
    scores = score_labeller(REPORTS, half, vocabulary=vocabulary)
    assert scores["cases"] >= 100
    assert scores["micro_f1"] >= 0.85
