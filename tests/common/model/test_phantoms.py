"""Phantoms repeat with their seed and show what they are said to show."""

import numpy as np
import pytest

from common.model import phantoms
from common.model.phantoms import LABELS, SIZE, Finding, Scanner, draw_findings, expose, render_places
from common.model.tiny import QUESTIONS, answers


def test_same_generator_same_pixels() -> None:
    findings = (Finding("Pleural Effusion", "left", "large"),)
    one, two = (
        expose(phantoms.render(findings, g), Scanner(), g) for g in map(np.random.default_rng, (7, 7))
    )
    assert one.shape == (SIZE, SIZE) and one.dtype == np.uint8
    assert np.array_equal(one, two)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "label", ["Pleural Effusion", "Pneumothorax", "Lung Opacity", "Lung Lesion", "Atelectasis"]
)
def test_a_sided_finding_is_on_its_side(label: str, side: str) -> None:
    detail = {"Lung Opacity": "mid", "Lung Lesion": "mid", "Atelectasis": ""}.get(label, "large")
    picture, places = render_places((Finding(label, side, detail),), np.random.default_rng(3))
    plain = phantoms.render((), np.random.default_rng(3))
    where = places[LABELS.index(label)]
    own, other = (where[:, :8], where[:, 8:]) if side == "right" else (where[:, 8:], where[:, :8])
    assert own.sum() > 0 == other.sum()
    assert places.sum() == where.sum()
    assert not np.array_equal(picture, plain)


def test_prevalence_is_kept() -> None:
    rng = np.random.default_rng(1)
    drawn = [draw_findings(rng, {"Edema": 0.25}) for _ in range(2000)]
    assert {finding.label for findings in drawn for finding in findings} == {"Edema"}
    assert 0.22 < sum(map(bool, drawn)) / 2000 < 0.28


def test_scanners_change_the_picture_as_named() -> None:
    chest = phantoms.render((), np.random.default_rng(2))

    def shown(scanner: Scanner) -> np.ndarray:
        return expose(chest, scanner, np.random.default_rng(0)).astype(float)

    plain = shown(Scanner(noise=0))
    assert np.abs(shown(Scanner(noise=0, inverted=True)) - (255 - plain)).max() <= 1
    assert shown(Scanner(noise=0, gamma=2)).mean() < plain.mean() < shown(Scanner(noise=0, gamma=0.5)).mean()
    assert shown(Scanner(noise=0, blur=1.5)).std() < plain.std() < shown(Scanner(noise=0.1)).std()
    assert shown(Scanner(noise=0, mask=0.1))[0].max() == 0
    assert shown(Scanner(noise=0, vignette=0.5))[-1, 0] < plain[-1, 0]
    assert not np.array_equal(shown(Scanner(noise=0, zoom=1.2)), plain)


def test_a_large_effusion_answers_for_the_smaller_ones() -> None:
    yes = answers(
        (Finding("Pleural Effusion", "bilateral", "moderate"), Finding("Lung Lesion", "left", "upper"))
    )
    assert {QUESTIONS[i] for i in np.nonzero(yes)[0]} == {
        ("Pleural Effusion", "right", "small"),
        ("Pleural Effusion", "right", "moderate"),
        ("Pleural Effusion", "left", "small"),
        ("Pleural Effusion", "left", "moderate"),
        ("Lung Lesion", "left", "upper"),
    }
