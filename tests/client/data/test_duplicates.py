"""Near-duplicates: found after recompression and resizing, not confused with other patients."""

import io

import numpy as np
import pytest
from PIL import Image

from client.data.curation import curate
from client.data.duplicates import boilerplate, groups, image_pairs, text_hash, text_pairs, thumbnail
from client.data.pixels import Gray
from client.data.study import Prepared, Reason
from tests.client.data.site_folder import radiograph

LONG = (
    "There is a dense opacity in the right middle lobe with volume loss and shift of the minor fissure, "
    "a small effusion on the same side and three healed fractures of the lateral ribs below it"
)


def gray(image: Image.Image) -> Gray:
    return np.asarray(image.convert("L")).astype(np.uint16) * np.uint16(257)


def changed(image: Image.Image, how: str) -> Image.Image:
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        return Image.open(buffer)
    if how == "size":
        return image.resize((100, 100))
    return image.point([min(255, int(value * 1.05 + 5)) for value in range(256)])


@pytest.mark.parametrize("how", ["jpeg", "size", "bright"])
def test_changed_copy_is_found_among_others(how: str) -> None:
    images = [radiograph(seed) for seed in range(20)]
    thumbnails = [thumbnail(gray(image)) for image in (*images, changed(images[7], how))]
    assert image_pairs(thumbnails) == [(7, 20)]


def test_near_duplicate_reports_are_found_but_not_templates() -> None:
    texts = [LONG, "The heart is normal. " * 10, LONG.replace("healed ", "")] + ["Lungs are clear. " * 10] * 9
    patients = [f"p{number}" for number in range(len(texts))]
    assert text_pairs(texts, patients) == [(0, 2)]


def test_boilerplate_is_text_of_many_patients() -> None:
    texts = [(f"p{number}", "Normal chest.") for number in range(6)] + [("p1", "A nodule.")] * 9
    assert boilerplate(texts) == {text_hash("normal chest")}


def test_groups_join_through_others() -> None:
    assert groups(["d", "a", "b", "c"], [("c", "b"), ("b", "d")]) == {"a": "a", "b": "b", "c": "b", "d": "b"}


def study(number: int, patient: str, *, image: int, text: str = "") -> Prepared:
    picture = thumbnail(gray(radiograph(image)))
    facts = {"sha256": [f"digest{image}"], "thumbnails": [picture], "flags": []}
    return Prepared(f"row {number}", patient, f"s{number}", (f"{number}.png",), "pa", "", text, "", facts)


def test_same_image_of_one_patient_is_kept_once_and_of_two_patients_not_at_all() -> None:
    decisions = curate(
        [study(1, "a", image=1), study(2, "a", image=1), study(3, "b", image=2), study(4, "c", image=2)]
    )
    assert decisions.dropped == {
        "s2": Reason.DUPLICATE_IMAGE,
        "s3": Reason.IMAGE_CONFLICT,
        "s4": Reason.IMAGE_CONFLICT,
    }


def test_patients_with_near_duplicate_reports_share_a_group() -> None:
    decisions = curate(
        [study(1, "b", image=1, text=LONG), study(2, "a", image=2), study(3, "c", image=3, text=LONG)]
    )
    assert decisions.group == {"a": "a", "b": "b", "c": "b"}
    assert decisions.flags == {"s1": ("near-duplicate-report",), "s2": (), "s3": ("near-duplicate-report",)}
