"""What only the whole site shows: duplicate images, near-duplicates across patients, boilerplate, outliers.

Guarantees: the same prepared studies in the same order give the same decisions; an image stored for two
patients is kept for neither; patients that share a near-duplicate image or report are in one group and so
in one split. It sees pseudonyms, hashes, thumbnails and de-identified text only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from client.data.duplicates import boilerplate, groups, image_pairs, text_hash, text_pairs
from client.data.study import Prepared, Reason

MIN_FOR_OUTLIERS = 50


@dataclass(frozen=True, slots=True)
class Curation:
    """Studies to drop with their reason, the group of each patient, and flags added to studies."""

    dropped: dict[str, Reason]
    group: dict[str, str]
    flags: dict[str, tuple[str, ...]]


def curate(studies: Iterable[Prepared]) -> Curation:
    """Compare all prepared studies of a site with each other."""
    names: list[str] = []
    patients: list[str] = []
    texts: list[str] = []
    thumbnails: list[str] = []
    owner: list[int] = []
    first_with: dict[str, int] = {}
    dropped: dict[str, Reason] = {}
    for study in studies:
        index = len(names)
        names.append(study.study)
        patients.append(study.patient)
        texts.append(study.findings)
        for digest in study.facts["sha256"]:
            first = first_with.setdefault(digest, index)
            if first != index:
                same = patients[first] == study.patient
                dropped[study.study] = Reason.DUPLICATE_IMAGE if same else Reason.IMAGE_CONFLICT
                if not same:
                    dropped[names[first]] = Reason.IMAGE_CONFLICT
        for thumbnail in study.facts["thumbnails"]:
            thumbnails.append(thumbnail)
            owner.append(index)
    flags: dict[str, set[str]] = {name: set() for name in names}
    links: list[tuple[str, str]] = []

    def link(one: int, other: int, flag: str) -> None:
        if one != other and names[one] not in dropped and names[other] not in dropped:
            flags[names[one]].add(flag)
            flags[names[other]].add(flag)
            links.append((patients[one], patients[other]))

    for one, other in image_pairs(thumbnails):
        link(owner[one], owner[other], "near-duplicate-image")
    for one, other in text_pairs(texts, patients):
        link(one, other, "near-duplicate-report")
    common = boilerplate(zip(patients, texts, strict=True))
    for name, text in zip(names, texts, strict=True):
        if text_hash(text) in common:
            flags[name].add("boilerplate")
    for index in unusual(thumbnails):
        flags[names[owner[index]]].add("unlike-the-others")
    return Curation(
        dropped, groups(patients, links), {name: tuple(sorted(found)) for name, found in flags.items()}
    )


def unusual(thumbnails: list[str]) -> list[int]:
    """Return indices of thumbnails that do not correlate (under 0.1) with the mean of the site."""
    if len(thumbnails) < MIN_FOR_OUTLIERS:
        return []
    values = np.frombuffer(bytes.fromhex("".join(thumbnails)), dtype=np.uint8).reshape(len(thumbnails), -1)
    centred = values - values.mean(axis=1, keepdims=True, dtype=np.float32)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True) + 1e-9
    mean = centred.mean(axis=0)
    return [int(index) for index in np.flatnonzero(centred @ (mean / np.linalg.norm(mean)) < 0.1)]
