"""The image guard on real radiographs, with what is chosen and what is measured kept apart.

    python -m tests.client.serving.guard_figures [--seeds 5] [--site central …]

For every seed each site's patients are halved by a salted hash: the threshold's two settings are chosen on
one half (fitted on two thirds of it, asked about the rest), then the guard is calibrated on that half with
them and asked about the other, which no choice has seen. So are half of the kinds of strangers, made and real
ones; what the calibration itself makes (turned, inverted, cut, noise) is never counted. Strangers are judged
by pixels alone, as if they came without a header.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.serving.guard import fit_pictures
from client.serving.guard_image import FALSE_REFUSALS, SHARED, Fitted, look, tower_vector, with_threshold
from client.serving.picture import Picture, prepared, read_picture
from tests.client.serving import strangers

DATA = Path(__file__).parents[4] / "shared" / "data" / "iu-xray"
SITES = ("central", "east", "south", "west")
GRID = tuple(itertools.product((0.005, 0.01, 0.015, 0.02, 0.03), (0.0, 0.1, 0.2, 0.3, 0.4)))
MOST_FALSE, LEAST_RECALL = 0.03, 0.95
_IN_CALIBRATION = ("turned left", "turned right", "upside down", "inverted", "cropped", "uniform noise")
_MANY = 20


Rows = tuple[NDArray[np.float32], NDArray[np.float32]]


class Eyes:
    """The tiny base's vision tower and the guard's own look at a picture; each picture is looked at once."""

    def __init__(self) -> None:
        import torch

        from common.model.images import read_processor
        from common.model.loading import load_base
        from common.model.tiny import tiny_base_directory

        torch.set_num_threads(1)
        self._model, _ = load_base(tiny_base_directory())
        self._processor = read_processor(tiny_base_directory())
        self._rows: dict[str, tuple[Any, Any]] = {}

    async def features(self, picture: Picture) -> NDArray[np.float32]:
        """The tower's features [N, D], as the engine gives them."""
        import torch

        from common.model.llava import vision_features

        pixels = torch.from_numpy(prepared(picture, self._processor))[None]
        found: NDArray[np.float32] = vision_features(self._model, pixels)[0].float().numpy()
        return found

    async def rows(self, pictures: Sequence[Picture]) -> Rows:
        """Looks and tower vectors, as the guard's score takes them."""
        for one in pictures:
            if one.key not in self._rows:
                vector = tower_vector(await self.features(one))
                self._rows[one.key] = look(one.gray, colour=one.colour), vector
        looks, towers = zip(*(self._rows[one.key] for one in pictures), strict=True)
        return np.stack(looks), np.stack(towers)


@dataclass(frozen=True)
class Site:
    """A site's pictures by patient."""

    name: str
    patients: tuple[str, ...]
    pictures: tuple[Picture, ...]

    def halves(self, salt: str) -> tuple[list[Picture], list[Picture]]:
        """Split by a hash of the patient: what is chosen on, and what is held out."""
        parts: tuple[list[Picture], list[Picture]] = ([], [])
        for patient, picture in zip(self.patients, self.pictures, strict=True):
            parts[hashlib.sha256(f"{salt} {patient}".encode()).digest()[0] & 1].append(picture)
        return parts


@dataclass(frozen=True)
class Kind:
    """One kind of stranger."""

    name: str
    real: bool
    pictures: list[Picture]


@dataclass(frozen=True)
class Asked:
    """What one site's guard was asked: own pictures and strangers by kind, as rows."""

    fitted: Fitted
    own: Rows
    strangers: dict[str, Rows]
    spoiled: dict[str, Rows]

    def figures(self, *, false_refusals: float, shared: float) -> dict[str, Any]:
        """How many own pictures and strangers of each kind are refused, of how many."""
        guard = with_threshold(self.fitted, false_refusals=false_refusals, shared=shared)

        def refused(rows: Rows) -> tuple[int, int]:
            return int((guard.score(*rows) > guard.threshold).sum()), len(rows[0])

        return {"own": refused(self.own)} | {name: refused(rows) for name, rows in self.strangers.items()}

    def recall_of_spoiled(self) -> float:
        """Recall, as shipped, of own pictures spoiled as the calibration spoils its."""
        guard = with_threshold(self.fitted)
        return float(np.mean([guard.score(*rows) > guard.threshold for rows in self.spoiled.values()]))


def read_site(name: str) -> Site:
    """Read a site's radiographs as serving reads what arrives."""
    with (DATA / name / "reports.csv").open() as handle:
        rows = sorted((row["patient"], row["image"]) for row in csv.DictReader(handle))
    pictures = tuple(read_picture((DATA / name / image).read_bytes()) for _, image in rows)
    return Site(name, tuple(patient for patient, _ in rows), pictures)


def kinds_of_strangers() -> list[Kind]:
    """Every kind that needs no radiograph; DICOM files by modality and part, without headers."""
    made = strangers.made(np.random.default_rng(5), _MANY)
    found = [
        Kind(name, False, [Picture(f"{name} {n}", pixels, "png") for n, pixels in enumerate(many)])
        for name, many in made.items()
        if name not in _IN_CALIBRATION
    ]
    real = strangers.real()
    found.append(Kind("photographs", True, real["photographs"]))
    for name in sorted({f"DICOM {one.modality} {one.body_part}".strip() for one in real["dicom"]}):
        same = [one for one in real["dicom"] if f"DICOM {one.modality} {one.body_part}".strip() == name]
        plain = [replace(one, kind="png", modality="", body_part="", not_chest=False) for one in same]
        found.append(Kind(name, True, plain))
    return found


def halved(kinds: list[Kind], seed: int) -> tuple[list[Kind], list[Kind]]:
    """Split kinds into those that a choice may look at and those held out, made and real ones alike."""
    rng = np.random.default_rng([seed, 3])
    parts: tuple[list[Kind], list[Kind]] = ([], [])
    for real in (False, True):
        some = [one for one in kinds if one.real is real]
        for place, at in enumerate(rng.permutation(len(some))):
            parts[(place + seed) % 2].append(some[at])
    return parts


async def asked(eyes: Eyes, fit: list[Picture], own: list[Picture], kinds: list[Kind]) -> Asked:
    """Fit on some of a site's pictures and look at others and at strangers."""
    fitted = await fit_pictures(fit, eyes.features, progress=lambda name, done, total: None)
    turned = strangers.turned([one.gray for one in own[:_MANY]], np.random.default_rng(6))
    spoiled = {name: [Picture(name, pixels, "png") for pixels in many] for name, many in turned.items()}
    return Asked(
        fitted,
        await eyes.rows(own),
        {one.name: await eyes.rows(one.pictures) for one in kinds},
        {name: await eyes.rows(pictures) for name, pictures in spoiled.items()},
    )


def added(several: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up counts of several sites."""
    return {
        name: (sum(one[name][0] for one in several), sum(one[name][1] for one in several))
        for name in several[0]
    }


def rates(counts: dict[str, Any]) -> tuple[float, float]:
    """False refusals, and recall over all strangers."""
    hits, of = (sum(counts[name][part] for name in counts if name != "own") for part in (0, 1))
    return counts["own"][0] / counts["own"][1], hits / of


def chosen(sites: list[Asked]) -> tuple[float, float]:
    """Choose the two settings that stay farthest from both limits."""

    def worst(setting: tuple[float, float]) -> float:
        false, recall = rates(
            added([one.figures(false_refusals=setting[0], shared=setting[1]) for one in sites])
        )
        return max(false / MOST_FALSE, (1 - recall) / (1 - LEAST_RECALL))

    return min(GRID, key=worst)


async def one_seed(eyes: Eyes, sites: list[Site], kinds: list[Kind], seed: int) -> dict[str, Any]:
    """Choose on one half, measure on the other."""
    seen, unseen = halved(kinds, seed)
    choosing, measuring = [], []
    for site in sites:
        first, second = site.halves(f"guard {seed}")
        third = len(first) // 3
        choosing.append(await asked(eyes, first[third:], first[:third], seen))
        measuring.append(await asked(eyes, first, second, unseen))
        print(f"seed {seed}: {site.name}", file=sys.stderr, flush=True)
    settings = chosen(choosing)
    spoiled = float(np.mean([one.recall_of_spoiled() for one in measuring]))
    found: dict[str, Any] = {"settings": settings, "spoiled": spoiled}
    for name, (false_refusals, shared) in (("chosen", settings), ("shipped", (FALSE_REFUSALS, SHARED))):
        by_site = [one.figures(false_refusals=false_refusals, shared=shared) for one in measuring]
        counts = added(by_site)
        false, recall = rates(counts)
        real = {one.name for one in unseen if one.real}
        found[name] = {
            "false_refusals": false,
            "asked": counts["own"][1],
            "false_refusals_by_site": {
                site.name: one["own"][0] / one["own"][1] for site, one in zip(sites, by_site, strict=True)
            },
            "recall": recall,
            "recall_real": rates({name: counts[name] for name in counts if name in real | {"own"}})[1],
            "kinds": {name: hits / of for name, (hits, of) in counts.items() if name != "own"},
        }
    return found


def spread(values: Sequence[float]) -> list[float]:
    """Mean, least and most."""
    return [round(float(x), 4) for x in (np.mean(values), min(values), max(values))]


def summary(seeds: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """Figures over seeds: mean, least, most; kinds as the mean over the seeds that held them out."""
    some = [one[which] for one in seeds]
    names = sorted({name for one in some for name in one["kinds"]})
    return {
        "false_refusals": spread([one["false_refusals"] for one in some]),
        "recall": spread([one["recall"] for one in some]),
        "recall_real": spread([one["recall_real"] for one in some]),
        "false_refusals_by_site": {
            site: spread([one["false_refusals_by_site"][site] for one in some])
            for site in some[0]["false_refusals_by_site"]
        },
        "kinds": {
            name: spread([one["kinds"][name] for one in some if name in one["kinds"]]) for name in names
        },
    }


async def measure(seeds: int, names: Sequence[str] = SITES) -> dict[str, Any]:
    """Run every seed; returns both summaries and what was chosen."""
    started = time.process_time()
    eyes, kinds = Eyes(), kinds_of_strangers()
    sites = [read_site(name) for name in names]
    found = [await one_seed(eyes, sites, kinds, seed) for seed in range(seeds)]
    return {
        "seeds": seeds,
        "asked": [one["chosen"]["asked"] for one in found],
        "settings": [one["settings"] for one in found],
        "chosen": summary(found, "chosen"),
        "shipped": summary(found, "shipped"),
        "recall_of_spoiled_own_shipped": spread([one["spoiled"] for one in found]),
        "strangers": {one.name: len(one.pictures) for one in kinds},
        "cpu_s": round(time.process_time() - started, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--site", action="append")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.seeds, given.site or SITES)), indent=1))
