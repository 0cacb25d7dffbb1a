"""`data check`: verify a prepared data folder from the outside, without trusting what made it.

Guarantees: reports every broken checksum, orphan, link, unreadable or annotated PNG, near-duplicate across
splits and identifier-like text by kind and place (line or file), never by content. It does not change the
folder and does not look for writing in images unless asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from client.data.deidentify import scrub
from client.data.duplicates import image_pairs, text_pairs, thumbnail
from client.data.pixels import Gray, verify_dimensions
from client.data.store import Pair, dataset_files, file_sha256, read_card, read_checksums, read_pairs
from common.errors import StudyRejected


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a kind and where it is."""

    kind: str
    where: str


def check_dataset(
    directory: Path, *, writing: bool, progress: Callable[[str, int, int], None]
) -> tuple[Problem, ...]:
    """Return all problems of a prepared data folder; raises DatasetInvalid when it cannot be read at all."""
    pairs = read_pairs(directory)
    read_card(directory)
    problems = list(_files(directory, pairs))
    thumbnails: list[str] = []
    owners: list[int] = []
    for number, pair in enumerate(pairs):
        progress("check", number + 1, len(pairs))
        where = f"pairs.jsonl:{number + 1}"
        if any(scrub(text).text != text for text in (pair.indication, pair.findings, pair.impression)):
            problems.append(Problem("identifier-like-text", where))
        for name in pair.images:
            try:
                pixels = read_stored(directory / name)
            except (StudyRejected, OSError, SyntaxError, ValueError):
                problems.append(Problem("image-unreadable", where))
                continue
            if writing and _has_writing(pixels):
                problems.append(Problem("burned-in-text", where))
            thumbnails.append(thumbnail(pixels))
            owners.append(number)
    links = [(owners[one], owners[other]) for one, other in image_pairs(thumbnails)]
    links += text_pairs([pair.findings for pair in pairs], [pair.patient for pair in pairs])
    for one, other in sorted(set(links)):
        if pairs[one].split != pairs[other].split:
            problems.append(Problem("near-duplicate-across-splits", f"pairs.jsonl:{one + 1} and {other + 1}"))
    return tuple(problems)


def read_stored(path: Path) -> Gray:
    """Read a stored PNG as uint16 over the full range; ValueError when it is not as the import writes."""
    with Image.open(path, formats=["PNG"]) as image:
        verify_dimensions(*image.size)
        if image.mode not in ("L", "I;16") or image.info:
            raise ValueError("expected a grey PNG without metadata")
        image.load()
        values = np.asarray(image).astype(np.uint16)
        return values if image.mode == "I;16" else values * np.uint16(257)


def _files(directory: Path, pairs: tuple[Pair, ...]) -> Iterator[Problem]:
    sums = read_checksums(directory)
    for folder, names, _ in os.walk(directory):
        for name in names:
            if (Path(folder) / name).is_symlink():
                yield Problem("link", str((Path(folder) / name).relative_to(directory)))
    present = set(dataset_files(directory)) - {"checksums.json"}
    for name in sorted(present - set(sums)):
        yield Problem("file-without-checksum", name)
    for name in sorted(set(sums) - present):
        yield Problem("file-missing", name)
    for name in sorted(present & set(sums)):
        path = directory / name
        if path.is_symlink():
            yield Problem("link", name)
        elif file_sha256(path) != sums[name]:
            yield Problem("checksum-differs", name)
    used = {image for pair in pairs for image in pair.images}
    for name in sorted(present):
        if name.startswith("images/") and name not in used:
            yield Problem("orphan-image", name)


def _has_writing(pixels: Gray) -> bool:
    from client.data.burned_in import has_burned_in_text

    return has_burned_in_text(pixels)
