"""Before a new release serves: a fixed set of made-up studies, answered by the old and the new, compared.

Guarantees: the studies are the same for every release and hold no patient's data; the verdict is a pure
function of what was measured. It catches a release that is broken (loops, empty or not-finite answers, one
text for all images, far slower); it does not say that a release is good.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from client.serving.engine import Ask, Engine, Finish, Options, Result
from client.serving.picture import Picture, prepared
from common.canonical import sha256_hex

if TYPE_CHECKING:
    from common.model.images import ImageProcessor

STUDIES = 8
_SEED = 20261122
_INDICATIONS = ("", "Cough.", "Shortness of breath.", "Chest pain.")


@dataclass(frozen=True)
class CanaryFigures:
    """What one release did on the canary studies; times in seconds, doubt as in Sentence.uncertainty."""

    answers: int
    loops: int
    not_finite: int
    empty: int
    cut: int
    distinct: int
    median_s: float
    median_tokens: float
    mean_uncertainty: float


@dataclass(frozen=True)
class CanaryLimits:
    """How much worse a new release may be: more loops, more cut answers, times slower."""

    more_loops: int = 1
    more_cut: int = 2
    slower: float = 3.0
    slack_s: float = 0.5


def canary_pictures() -> tuple[Picture, ...]:
    """Draw the fixed set: phantoms with various findings."""
    from common.model import phantoms

    pictures = []
    for number in range(STUDIES):
        rng = np.random.default_rng([_SEED, number])
        findings = phantoms.draw_findings(rng, dict.fromkeys(phantoms.LABELS, 0.25))
        shown = phantoms.expose(phantoms.render(findings, rng), phantoms.Scanner(), rng)
        pictures.append(Picture(sha256_hex(shown.tobytes()), shown, "png"))
    return tuple(pictures)


def canary_asks(processor: ImageProcessor, options: Options) -> list[Ask]:
    """Ask the fixed questions about the fixed pictures."""
    return [
        Ask(
            f"canary-{number}",
            prepared(picture, processor),
            _INDICATIONS[number % len(_INDICATIONS)],
            options,
        )
        for number, picture in enumerate(canary_pictures())
    ]


async def run_canary(
    engine: Engine, processor: ImageProcessor, *, clock_s: Callable[[], float] = time.monotonic
) -> CanaryFigures:
    """Answer the canary studies, one after the other, and count what went wrong."""
    results: list[Result] = []
    seconds: list[float] = []
    for ask in canary_asks(processor, Options()):
        started = clock_s()
        async for event in engine.submit(ask):
            if isinstance(event, Result):
                results.append(event)
        seconds.append(clock_s() - started)
    doubts = [one.uncertainty for result in results for one in result.sentences]
    return CanaryFigures(
        answers=len(results),
        loops=sum(result.finish is Finish.LOOP for result in results),
        not_finite=sum(
            result.finish is Finish.NOT_FINITE or not all(map(math.isfinite, result.logprobs))
            for result in results
        ),
        empty=sum(not result.text.strip() for result in results),
        cut=sum(result.cut for result in results),
        distinct=len({result.text for result in results}),
        median_s=float(np.median(seconds)) if seconds else 0.0,
        median_tokens=float(np.median([len(result.token_ids) for result in results])) if results else 0.0,
        mean_uncertainty=float(np.mean(doubts)) if doubts else 1.0,
    )


def canary_faults(old: CanaryFigures, new: CanaryFigures, limits: CanaryLimits | None = None) -> list[str]:
    """Say in what a new release is worse than the old; an empty list lets it serve."""
    limits = limits or CanaryLimits()
    faults = []
    if new.answers < STUDIES:
        faults.append(f"answered {new.answers} of {STUDIES} studies")
    if new.not_finite:
        faults.append(f"{new.not_finite} answers were not finite")
    if new.empty > old.empty:
        faults.append(f"{new.empty} answers were empty, before {old.empty}")
    if new.loops > old.loops + limits.more_loops:
        faults.append(f"{new.loops} answers ran in a circle, before {old.loops}")
    if new.cut > old.cut + limits.more_cut:
        faults.append(f"{new.cut} answers were cut, before {old.cut}")
    if new.distinct == 1 and old.distinct > 1:
        faults.append("all images got the same text")
    if new.median_s > limits.slower * old.median_s + limits.slack_s:
        faults.append(f"a report took {new.median_s:.2f} s, before {old.median_s:.2f} s")
    return faults
