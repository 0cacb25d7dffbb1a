"""The guard: decides on one request before a word is written, and is calibrated on the site's own images.

Guarantees: a refusal has a code and a reason in two languages; without a calibration for this base there is
no guard, and serving refuses to start unless told so. The calibration stays at the site.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from client.data.framing import AS_IMPORTED, AS_STORED, Framing, prepared_folder
from client.serving.guard_image import (
    LEAST_PICTURES,
    Fitted,
    ImageGuard,
    drawn,
    fit_guard,
    look,
    parse_guard,
    spoiled,
    stacked,
    tower_vector,
    with_threshold,
)
from client.serving.guard_question import judge_indication, judge_question
from client.serving.picture import Picture, read_picture
from common.canonical import sha256_hex
from common.errors import FedRadError, GuardNotCalibrated

Progress = Callable[[str, int, int], None]
Features = Callable[[Picture], Awaitable[NDArray[np.float32]]]
_MOST_PICTURES = 1200
_SEED = 20261122
_FARTHEST = 1e6


@dataclass(frozen=True, slots=True)
class Decision:
    """Answer or refuse, and why, in two languages; `code` is '' where nothing is refused.

    `ood_score` says how far the image is from this site's own; above `ood_threshold` it is refused. Both are
    None where the guard is off.
    """

    refused: bool
    code: str
    reason: str
    reason_zh: str
    ood_score: float | None
    ood_threshold: float | None


ALLOWED_UNGUARDED = Decision(False, "", "", "", None, None)


class Guard(Protocol):
    """Decides on a request from its image's features [N, D] and its words."""

    def decide(
        self, picture: Picture, features: NDArray[np.float32], *, indication: str, question: str
    ) -> Decision: ...


@dataclass(frozen=True)
class CalibratedGuard:
    """The guard of one base at one site."""

    image: ImageGuard

    def decide(
        self, picture: Picture, features: NDArray[np.float32], *, indication: str, question: str
    ) -> Decision:
        """Refuse a wrong image, wrong words, or both; header facts of a DICOM file count first."""
        score = _FARTHEST  # features that are no numbers are as far as can be
        if np.isfinite(features).all():
            found = self.image.score(
                look(picture.gray, colour=picture.colour)[None], tower_vector(features)[None]
            )
            score = min(float(found[0]), _FARTHEST)
        far = score > self.image.threshold
        english, chinese, code = [], [], ""
        if picture.not_chest or picture.view == "lateral":
            code = "not-a-frontal-chest"
            english.append("the DICOM header says that this is no frontal chest radiograph")
            chinese.append("DICOM标头表明这不是胸部正位片")
        elif far:
            code = "image-out-of-domain"
            english.append("the image does not look like the frontal chest radiographs of this hospital")
            chinese.append("图像与本院的胸部正位片不符")
        words = judge_indication(indication)
        if not words.refused:
            words = judge_question(question)
        if words.refused:
            code = "image-and-question" if code else "question-out-of-scope"
            english.append(words.reason)
            chinese.append(words.reason_zh)
        return Decision(bool(code), code, "; ".join(english), "；".join(chinese), score, self.image.threshold)


def guard_path(folder: Path, *, base_files: str) -> Path:
    """Where the calibration for a base lies; `base_files` is the hash of its pinned files."""
    return folder / f"guard-{base_files[:24]}.npz"


def read_guard(path: Path) -> CalibratedGuard:
    """Read a stored calibration; raises GuardNotCalibrated."""
    if not path.is_file():
        raise GuardNotCalibrated(f"{path}: expected a calibration, got none; `fedrad-site guard calibrate`")
    return CalibratedGuard(parse_guard(path.read_bytes()))


def pick_pictures(paths: Sequence[Path], *, most: int = _MOST_PICTURES) -> list[Path]:
    """Choose at most that many of a site's images, the same ones every time."""
    ordered = sorted(paths, key=lambda path: sha256_hex(str(path.name).encode()))
    return ordered[:most]


async def calibrate_guard(
    paths: Sequence[Path], features: Features, *, progress: Progress, framing: Framing = AS_IMPORTED
) -> ImageGuard:
    """Calibrate on the site's own frontal images; unreadable ones are left out.

    Files of a prepared folder are taken as they are, others brought into stored form. Raises
    GuardNotCalibrated with too few of them.
    """
    return with_threshold(await fit_pictures(_read_own(paths, framing), features, progress=progress))


async def fit_pictures(pictures: Sequence[Picture], features: Features, *, progress: Progress) -> Fitted:
    """Fit a guard on a site's own pictures, and on spoiled and drawn ones made beside them.

    Raises GuardNotCalibrated with too few pictures.
    """
    if len(pictures) < LEAST_PICTURES:
        raise GuardNotCalibrated(
            f"expected at least {LEAST_PICTURES} readable images of this site, got {len(pictures)}"
        )
    rng = np.random.default_rng(_SEED)
    many = max(400, min(2 * len(pictures), 1200))
    bad = [spoiled(pictures[int(rng.integers(len(pictures)))].gray, rng) for _ in range(many)]
    bad += [drawn(rng) for _ in range(many // 4)]
    strangers = [Picture(f"stranger-{number}", pixels, "png") for number, pixels in enumerate(bad)]
    towers: list[NDArray[np.float32]] = []
    for done, picture in enumerate([*pictures, *strangers]):
        towers.append(tower_vector(await features(picture)))
        progress("guard calibration", done + 1, len(pictures) + len(strangers))
    split = len(pictures)
    return fit_guard(
        np.stack([look(one.gray, colour=one.colour) for one in pictures]),
        np.stack(towers[:split]),
        bad_looks=stacked(bad),
        bad_towers=np.stack(towers[split:]),
    )


def _read_own(paths: Sequence[Path], framing: Framing) -> list[Picture]:
    pictures: list[Picture] = []
    for path in paths:
        try:
            stored = prepared_folder(path) is not None
            pictures.append(read_picture(path.read_bytes(), AS_STORED if stored else framing))
        except (OSError, FedRadError):
            continue
    return pictures
