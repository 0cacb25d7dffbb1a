"""Identifiers in report text: what must go, and what must stay."""

import time

import pytest

from client.data.deidentify import left_over, scrub
from client.data.leak_gate import LeakScore, measure_leaks, verify_recall
from common.errors import LeakGateFailed

KNOWN = (
    ("name", "ALVAREZ^MARIA JOSE"),
    ("name", "Small^Rose"),
    ("name", "Wang^XiaoDong=王^小东"),
    ("id", "MRN0045127"),
    ("birth_date", "19310412"),
    ("study_date", "20210307"),
    ("physician", "Whitfield^Thomas"),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Patient Maria Jose Alvarez, MRN 0045127.", "Patient ___, MRN ___."),
        ("ALVAREZ, MARIA returns.", "___ returns."),
        ("Alvarez's film of 4/12/1931.", "___ film of ___."),
        ("Alvares was seen by T. Whitfeild.", "___ was seen by T. ___."),
        ("Film of March 7, 2021 and 07.03.2021.", "Film of ___ and ___."),
        ("王小东，2021年3月7日。", "___，___。"),
        ("Mrs. Rose Small has a small effusion.", "Mrs. ___ has a small effusion."),
    ],
)
def test_known_identifiers_go_in_every_spelling(text: str, expected: str) -> None:
    assert scrub(text, KNOWN).text == expected


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Discussed with Dr. John Smith at 14:32.", ("John", "Smith", "14:32")),
        ("Called to nurse Betty O'Hara at 3 pm.", ("Betty", "Hara", "3 pm")),
        ("Electronically signed by: Karen L. Meyer, MD", ("Karen", "Meyer")),
        ("A 93-year-old man. Aged 101.", ("93", "101")),
        ("Phone (212) 555-0134, mail a.b@c.org, www.site.org/x", ("555", "a.b@c.org", "site")),
        ("SSN 123-45-6789, accession number 7781, room 302B", ("6789", "7781", "302B")),
        ("Transferred from Saint Mary Hospital, 12 Baker Street.", ("Mary", "Baker")),
        ("Paciente: Juan Pérez. Dra. García, 12 de marzo de 2020.", ("Juan", "Pérez", "García", "marzo")),
        ("Vive en Calle Mayor 12. Teléfono 914 555 013.", ("Mayor", "914")),
        ("报告医师：李明华。住院号A12345。2020年5月1日。93岁。", ("李明华", "A12345", "2020", "93")),
        ("[**Known lastname 123**] and XXXX and <PHI>", ("lastname", "XXXX", "PHI")),
    ],
)  # fmt: skip
def test_rules_find_strangers(text: str, gone: tuple[str, ...]) -> None:
    cleaned = scrub(text).text
    assert [part for part in gone if part in cleaned] == []


@pytest.mark.parametrize(
    "text",
    [
        "Heart size 12.5 cm. T4-T5 wedge. 10-15 mm nodule. C6-C7. 2 views. CT 1.5 x 2.3 cm.",
        "A 64-year-old man with 90 degree scoliosis and 95% saturation.",
        "There may be 5 mm nodules. Small left effusion. The patient is rotated.",
        "心影增大，左侧胸腔积液。",
        "Cardiomegalia leve sin derrame pleural.",
    ],
)
def test_findings_are_left_alone(text: str) -> None:
    assert scrub(text, KNOWN).text == text


@pytest.mark.parametrize(
    "text", ["Mrs. Rose Small, 93 yo, seen 1/2/2003 by Dr. No.", "Dr. A Smith MD 12:30 XXXX ____"]
)
def test_scrubbing_twice_changes_nothing(text: str) -> None:
    once = scrub(text, KNOWN).text
    assert scrub(once, KNOWN).text == once


def test_accession_full_of_zeros_does_not_take_the_measurements() -> None:
    known = (("id", "XR000001"), ("id", "00412345"))
    text = "Nodule of 1 mm at level 1, see XR000001, 00412345 and 412345."
    assert scrub(text, known).text == "Nodule of 1 mm at level 1, see ___ and ___."


def test_left_over_identifier_is_noticed_by_kind_only() -> None:
    assert left_over("seen by w h i t f i e l d", KNOWN) == ()
    assert left_over("seen by Whitfield yesterday", KNOWN) == ("physician",)
    assert left_over("MRN 0045127.", KNOWN) == ("id",)


@pytest.mark.parametrize(
    "text", ["a" * 30_000, "1-" * 15_000, "Aa " * 10_000, "dr " * 10_000, "1 " * 15_000, "[**" * 10_000]
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    start = time.process_time()
    scrub(text, KNOWN)
    assert time.process_time() - start < 5


def test_leak_gate_finds_all_planted_and_is_repeatable() -> None:
    reports = [
        "The heart is normal. No effusion.",
        "Cardiomegalia. Sin derrame de la base.",
        "心影增大。左侧胸腔积液。",
    ] * 40
    score = measure_leaks(reports, seed=3)
    assert score == measure_leaks(reports, seed=3)
    assert (score.known_recall, score.known_planted) == (1.0, 120)
    assert score.free_recall >= 0.98
    verify_recall(score)


@pytest.mark.parametrize(("known", "free"), [(99, 100), (100, 97)])
def test_leak_gate_refuses_below_its_levels(known: int, free: int) -> None:
    with pytest.raises(LeakGateFailed, match="planted identifiers"):
        verify_recall(LeakScore(100, known, 100, free, 0, 0, {"Chart {id}.": 1}))
