"""From one source study to one pair or one reason: images chosen, decoded and stored, text cleaned.

Guarantees: depends on the study, the recipe and the site key only, so it may run in any process, in any
order and again after a crash with the same bytes. It does not compare studies with each other
(`duplicates.py` does) and does not choose splits.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.sitekey import SiteKey, patient_pseudonym, study_pseudonym
from client.data.sources.paths import resolve_inside
from client.data.store import MAX_IMAGES, MAX_TEXT_CHARS, store_image
from client.data.study import Dropped, Prepared, Reason, SourceImage, SourceStudy
from common.errors import StudyRejected

_VIEWS = {
    "pa": "pa",
    "ap": "ap",
    "frontal": "frontal",
    "ap axial": "ap",
    "antero-posterior": "ap",
    "postero-anterior": "pa",
    "": "",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of the prepared data, but for the source itself."""

    source: Path
    staging: Path | None
    key: SiteKey
    max_side: int = 512
    bits: int = 8


def prepare_study(source: SourceStudy, recipe: Recipe) -> Prepared | Dropped:
    """Turn one source study into a pair with stored images, or into a drop with its reason."""
    study = study_pseudonym(recipe.key, source.study) if source.study else ""
    try:
        if source.reason:
            raise StudyRejected(source.reason)
        sections, facts = _report(source)
        images, view, image_facts = _images(source, study, recipe)
    except StudyRejected as error:
        return Dropped(where=source.where, study=study, reason=Reason(error.reason))
    return Prepared(
        where=source.where,
        patient=patient_pseudonym(recipe.key, source.patient),
        study=study,
        images=images,
        view=view,
        indication=sections["indication"],
        findings=sections["findings"],
        impression=sections["impression"],
        facts={**facts, **image_facts},
    )


def normal_view(view: str) -> str | None:
    """Return pa, ap, frontal or '' (unknown) for a frontal view, None for any other."""
    return _VIEWS.get(view.strip().lower().replace("_", " "))


def clean_text(text: str) -> str:
    """Normalise to NFC on one line without control characters."""
    kept = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char for char in text)
    return " ".join(unicodedata.normalize("NFC", kept).split())


def _report(source: SourceStudy) -> tuple[dict[str, str], dict[str, Any]]:
    if sum(map(len, source.text.values())) > MAX_TEXT_CHARS:
        raise StudyRejected(Reason.REPORT_TOO_LONG)
    sections = {
        name: clean_text(source.text.get(name, "")) for name in ("indication", "findings", "impression")
    }
    if not any(sections.values()):
        raise StudyRejected(Reason.NO_REPORT)
    if not any(char.isalpha() for char in sections["findings"]):
        raise StudyRejected(Reason.NO_FINDINGS)
    return sections, {"words": len(sections["findings"].split())}


def _images(source: SourceStudy, study: str, recipe: Recipe) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    from client.data.pixels import decode_raster, encode_png, fit_within, verify_not_blank

    if not source.images:
        raise StudyRejected(Reason.NO_IMAGE)
    chosen, view = frontal_images(source.images)
    names: list[str] = []
    digests: list[str] = []
    for number, image in enumerate(chosen[:MAX_IMAGES]):
        pixels = decode_raster(resolve_inside(recipe.source, image.path))
        verify_not_blank(pixels)
        content = encode_png(fit_within(pixels, max_side=recipe.max_side), bits=recipe.bits)
        names.append(f"images/{study[1:3]}/{study}-{number}.png")
        digests.append(hashlib.sha256(content).hexdigest())
        if recipe.staging is not None:
            store_image(recipe.staging, names[-1], content)
    return tuple(names), view, {"sha256": digests}


def frontal_images(images: tuple[SourceImage, ...]) -> tuple[tuple[SourceImage, ...], str]:
    """Choose the frontal images of a study, PA before AP before unstated; raises StudyRejected for none."""
    order = {"pa": 0, "ap": 1, "frontal": 2, "": 3}
    frontal = [
        (order[view], image, view) for image in images if (view := normal_view(image.view)) is not None
    ]
    if not frontal:
        raise StudyRejected(Reason.LATERAL_VIEW)
    frontal.sort(key=lambda entry: entry[0])
    return tuple(image for _, image, _ in frontal), frontal[0][2] or "frontal"
