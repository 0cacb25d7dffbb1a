"""From one source study to one pair or one reason: images chosen, decoded and stored, text cleaned.

Guarantees: depends on the study, the recipe and the site key only, so it may run in any process, in any
order and again after a crash with the same bytes; text is de-identified before anything else looks at it,
and an image with writing on it is never stored. It does not compare studies with each other
(`duplicates.py` does) and does not choose splits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.deidentify import Known, left_over, scrub
from client.data.labels import disagreements
from client.data.recogniser import Recogniser, load_recogniser
from client.data.reports import flags_of, language_of, one_line, remove_priors, split_sections
from client.data.sitekey import SiteKey, patient_pseudonym, study_pseudonym
from client.data.sources.paths import resolve_inside
from client.data.statements import contradictions
from client.data.store import MAX_IMAGES, MAX_TEXT_CHARS, store_image
from client.data.study import Dropped, Prepared, Reason, SourceImage, SourceStudy
from common.errors import RecogniserInvalid, StudyRejected

SECTIONS = ("indication", "findings", "impression")
_ORDER = {"pa": 0, "ap": 1, "frontal": 2, "": 3}
_SYNONYMS = {
    "antero-posterior": "ap",
    "postero-anterior": "pa",
    "ap axial": "ap",
    "ap supine": "ap",
    "ap erect": "ap",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of the prepared data, but for the source itself."""

    source: Path
    staging: Path | None
    key: SiteKey
    max_side: int = 512
    bits: int = 8
    keep_priors: bool = False
    check_writing: bool = True
    with_dicom: bool = False
    check_chest: bool = True
    recogniser: str = ""


def prepare_study(source: SourceStudy, recipe: Recipe) -> Prepared | Dropped:
    """Turn one source study into a pair with stored images, or into a drop with its reason."""
    study = study_pseudonym(recipe.key, source.study) if source.study else ""
    try:
        if source.reason:
            raise StudyRejected(source.reason)
        if sum(map(len, source.text.values())) > MAX_TEXT_CHARS:
            raise StudyRejected(Reason.REPORT_TOO_LONG)
        images, view, known, image_facts = _images(source, study, recipe)
        recognise = load_recogniser(recipe.recogniser) if recipe.recogniser else None
        sections, facts = clean_report(
            source.text, known, keep_priors=recipe.keep_priors, recognise=recognise
        )
    except StudyRejected as error:
        return Dropped(where=source.where, study=study, reason=Reason(error.reason))
    text = f"{sections['findings']} {sections['impression']}"
    contradicted = disagreements(source.labels, text, language=facts["language"])
    flags = {*facts["flags"], *image_facts.pop("flags"), *(["labels-disagree"] if contradicted else [])}
    facts = {**facts, "flags": sorted(flags), "labels_contradicted": list(contradicted)}
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


def clean_report(
    text: dict[str, str], known: tuple[Known, ...], *, keep_priors: bool, recognise: Recogniser | None = None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return de-identified sections without references to priors, and facts about them.

    Raises StudyRejected: NO_REPORT, NO_FINDINGS, RECOGNISER_FAILED, or IDENTIFIER_LEFT when a known
    identifier remains.
    """
    redactions: Counter[str] = Counter()
    parts: dict[str, str] = {}
    for name, part in text.items():
        try:
            scrubbed = scrub(part, known, recognise)
        except RecogniserInvalid as error:
            raise StudyRejected(Reason.RECOGNISER_FAILED) from error
        redactions.update(scrubbed.replaced)
        parts[name] = scrubbed.text
    if "report" in parts:
        parts = {
            **split_sections(parts["report"]).sections,
            **{k: v for k, v in parts.items() if k != "report"},
        }
    sections = {name: one_line(parts.get(name, "")) for name in SECTIONS}
    if not any(sections.values()):
        raise StudyRejected(Reason.NO_REPORT)
    removed = 0
    if not keep_priors:
        for name in ("findings", "impression"):
            sections[name], count = remove_priors(sections[name])
            removed += count
    if not any(char.isalpha() for char in sections["findings"]):
        raise StudyRejected(Reason.NO_FINDINGS)
    if left_over(" ".join(sections.values()), known):
        raise StudyRejected(Reason.IDENTIFIER_LEFT)
    language = language_of(sections["findings"])
    flags = set(flags_of(sections))
    if contradictions(sections["findings"], sections["impression"], language=language):
        flags.add("sections-disagree")
    facts = {
        "words": len(sections["findings"].split()),
        "language": language,
        "priors_removed": removed,
        "redactions": dict(sorted(redactions.items())),
        "flags": sorted(flags),
    }
    return sections, facts


def dicom_name(image: str) -> str:
    """Return the path of the de-identified DICOM file that belongs to a stored image."""
    return f"dicom/{image.removeprefix('images/').removesuffix('.png')}.dcm"


def normal_view(view: str) -> str | None:
    """Return pa, ap, frontal or '' (unknown) for a frontal view, None for any other."""
    plain = " ".join(view.strip().lower().replace("_", " ").split())
    plain = _SYNONYMS.get(plain, plain)
    return plain if plain in _ORDER else None


def frontal_images(images: tuple[SourceImage, ...]) -> tuple[tuple[SourceImage, ...], str]:
    """Choose the frontal images of a study, PA before AP before unstated; raises StudyRejected for none."""
    if not images:
        raise StudyRejected(Reason.NO_IMAGE)
    frontal = [
        (_ORDER[view], image, view) for image in images if (view := normal_view(image.view)) is not None
    ]
    if not frontal:
        raise StudyRejected(Reason.LATERAL_VIEW)
    frontal.sort(key=lambda entry: entry[0])
    return tuple(image for _, image, _ in frontal), frontal[0][2] or "frontal"


def _images(
    source: SourceStudy, study: str, recipe: Recipe
) -> tuple[tuple[str, ...], str, tuple[Known, ...], dict[str, Any]]:
    from client.data.anatomy import FLAG, QUARANTINE, chest_score
    from client.data.burned_in import has_burned_in_text
    from client.data.dicom import (
        decode_dicom,
        is_dicom,
        known_identifiers,
        read_dicom,
        verify_chest_radiograph,
    )
    from client.data.dicom_header import deidentify_header
    from client.data.duplicates import thumbnail
    from client.data.framing import Framing, frame_radiograph
    from client.data.pixels import decode_raster, encode_png, verify_not_blank

    framing = Framing(max_side=recipe.max_side, bits=recipe.bits)
    known: list[Known] = [("id", source.patient), ("id", source.study), *source.known]
    chosen, view = frontal_images(source.images)
    names: list[str] = []
    digests: list[str] = []
    thumbnails: list[str] = []
    flags: set[str] = set()
    for image in chosen[:MAX_IMAGES]:
        path = resolve_inside(recipe.source, image.path)
        if is_dicom(path):
            dataset = read_dicom(path, pixels=True)
            verify_chest_radiograph(dataset)
            known.extend(known_identifiers(dataset))
            pixels = decode_dicom(dataset)
        else:
            dataset = None
            pixels = decode_raster(path)
        verify_not_blank(pixels)
        if recipe.check_writing and has_burned_in_text(pixels):
            raise StudyRejected(Reason.BURNED_IN_TEXT)
        framed = frame_radiograph(pixels, framing)
        if recipe.check_chest and (score := chest_score(framed.field)) < FLAG:
            if score < QUARANTINE:
                raise StudyRejected(Reason.UNLIKE_CHEST)
            flags.add("unlike-a-chest")
        content = encode_png(framed.values)
        digest = hashlib.sha256(content).hexdigest()
        if digest in digests:
            continue
        names.append(f"images/{study[1:3]}/{study}-{len(names)}.png")
        digests.append(digest)
        thumbnails.append(thumbnail(framed.stored))
        if recipe.staging is not None:
            store_image(recipe.staging, names[-1], content)
            if recipe.with_dicom and dataset is not None:
                deidentify_header(dataset, key=recipe.key, known=tuple(known))
                target = recipe.staging / dicom_name(names[-1])
                target.parent.mkdir(parents=True, exist_ok=True)
                dataset.save_as(target, enforce_file_format=True)
    facts = {"sha256": digests, "thumbnails": thumbnails, "flags": sorted(flags)}
    return tuple(names), view, tuple(dict.fromkeys(known)), facts
