"""Sections, references to earlier studies, and flags."""

import pytest

from client.data.reports import flags_of, language_of, one_line, remove_priors, split_sections


@pytest.mark.parametrize(
    ("text", "findings", "impression"),
    [
        (
            "INDICATION: Cough. COMPARISON: None. FINDINGS: Heart enlarged. IMPRESSION: Cardiomegaly.",
            "Heart enlarged.",
            "Cardiomegaly.",
        ),
        ("Findings:\nLungs clear.\n\nImpression:\nNormal.\n", "Lungs clear.", "Normal."),
        ("HALLAZGOS: Cardiomegalia. IMPRESIÓN: Cardiomegalia leve.", "Cardiomegalia.", "Cardiomegalia leve."),
        ("检查所见：心影增大。\n诊断意见：心影增大。", "心影增大。", "心影增大。"),
        ("Heart size normal.", "Heart size normal.", ""),
    ],
)
def test_sections_are_found_by_heading(text: str, findings: str, impression: str) -> None:
    sections = split_sections(text).sections
    assert sections["findings"] == findings
    assert sections.get("impression", "") == impression


def test_finding_word_in_a_sentence_is_no_heading() -> None:
    assert split_sections("The findings suggest edema. No impression on the trachea.").sections == {
        "findings": "The findings suggest edema. No impression on the trachea."
    }


@pytest.mark.parametrize(
    ("text", "expected", "count"),
    [
        ("Small effusion, unchanged compared to the prior radiograph.", "Small effusion.", 1),
        ("Stable cardiomegaly.", "Cardiomegaly.", 1),
        ("No change from prior study. Heart normal.", "Heart normal.", 1),
        ("Compared to the prior study, there is a new opacity.", "There is a new opacity.", 1),
        ("Again noted is a nodule.", "Noted is a nodule.", 1),
        ("Heart size is unchanged.", "", 1),
        ("The right-sided catheter has been removed. Lungs clear.", "Lungs clear.", 1),
        ("The left apical pneumothorax has resolved.", "", 1),
        ("There has been extubation and removal of the central line.", "", 1),
        (
            "There has been development of a large right-sided effusion.",
            "There is a large right-sided effusion.",
            1,
        ),
        ("Stable, mild prominence of the hila.", "Mild prominence of the hila.", 1),
        ("Heart size is mildly enlarged but stable.", "Heart size is mildly enlarged.", 1),
        ("Improving bilateral edema.", "Bilateral edema.", 1),
        ("There is improvement in bilateral edema.", "There is bilateral edema.", 1),
        ("The previously seen nodule is calcified.", "The nodule is calcified.", 1),
        ("There has been median sternotomy.", "There has been median sternotomy.", 0),
        ("Calcifications suggest a previous granulomatous process.",) * 2 + (0,),
        ("Increased interstitial markings.", "Increased interstitial markings.", 0),
        ("Prior CABG and sternotomy.", "Prior CABG and sternotomy.", 0),
        ("与前片对比，左侧胸腔积液较前增多。", "左侧胸腔积液。", 2),
        ("Cardiomegalia. Comparado con estudio previo, sin cambios.", "Cardiomegalia.", 2),
    ],
)
def test_references_to_earlier_studies_go_and_findings_stay(text: str, expected: str, count: int) -> None:
    cleaned, removed = remove_priors(text)
    assert cleaned == expected
    assert removed >= min(count, 1) and (removed == 0) == (count == 0)


@pytest.mark.parametrize(
    ("findings", "flag"),
    [
        ("The lungs are clear. The heart is normal.", "template-normal"),
        ("As an AI language model, I see no fracture in this image.", "machine-text"),
        ("There is a nodule here. There is a nodule here.", "repeated-sentence"),
        ("Cardiomegaly.", "very-short"),
        ("The nodule is as on the prior film of the chest here.", "refers-to-prior"),
        ("The lungs are clear. Left knee. There is a total knee prosthesis.", "other-body-part"),
        ("___ and ___ of the ___.", "much-redacted"),
    ],
)
def test_doubtful_text_is_flagged(findings: str, flag: str) -> None:
    assert flag in flags_of({"findings": findings, "impression": ""})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("No acute process. .", "No acute process."),
        ("Clear. . Heart\n normal.", "Clear. Heart normal."),
        ("9 . 5", "9 . 5"),
    ],
)
def test_stray_stops_go(text: str, line: str) -> None:
    assert one_line(text) == line


def test_ordinary_report_has_no_flag() -> None:
    assert (
        flags_of({"findings": "There is a right basal opacity with air bronchograms.", "impression": ""})
        == ()
    )


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The heart is normal.", "en"),
        ("El corazón es normal en la placa.", "es"),
        ("心影增大。", "zh"),
        ("12", ""),
    ],
)
def test_language_is_guessed(text: str, language: str) -> None:
    assert language_of(text) == language
