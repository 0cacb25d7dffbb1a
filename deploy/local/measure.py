"""Scores of adapters on the held-out studies of all sites, as only a machine that holds all data can make.

Guarantees: every adapter is scored on the same studies with the same decoding; `federated_shuffled_images`
hands each study another study's image. In a consortium no site's figure leaves un-noised; these stay in the
local run's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.data.store import Pair
from client.evaluation import generate_reports, shuffled
from client.features import load_features
from client.home import SiteHome
from common.config import Study
from common.metrics import score_reports
from common.model.lora import Vector
from deploy.local.compare import held_out

if TYPE_CHECKING:
    import torch

    from common.model.loading import AdaptedModel

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """Held-out studies of all sites with the features of each study's first image."""

    sites: tuple[str, ...]
    pairs: tuple[Pair, ...]
    images: tuple[Path, ...]
    features: torch.Tensor


@dataclass(frozen=True)
class Scored:
    """Metrics as in `result.json` and the reports behind them, in the order of the held-out studies."""

    metrics: dict[str, Any]
    reports: list[str]


def load_held_out(
    adapted: AdaptedModel,
    study: Study,
    homes: Mapping[str, SiteHome],
    *,
    split: str,
    limit: int,
    progress: Progress,
) -> HeldOut:
    """Read the studies of a split and their features; the first image stands for a study with several."""
    import torch

    sites: list[str] = []
    pairs: list[Pair] = []
    images: list[Path] = []
    features: list[torch.Tensor] = []
    for site, home in sorted(homes.items()):
        chosen = held_out(home, split, limit=limit)
        paths = [home.data / pair.images[0] for pair in chosen]
        loaded = load_features(
            adapted.model,
            paths,
            base=adapted.directory,
            base_files=study.base.files,
            cache=home.cache,
            progress=progress,
        )
        if chosen:
            features.append(loaded.rows(range(len(chosen))))
        sites += [site] * len(chosen)
        pairs += chosen
        images += paths
    return HeldOut(tuple(sites), tuple(pairs), tuple(images), torch.cat(features))


def score(
    adapted: AdaptedModel, study: Study, vector: Vector, data: HeldOut, *, shuffle: bool = False
) -> Scored:
    """Write a report for every held-out study with one adapter and score them."""
    adapted.write_vector(vector)
    features = shuffled(data.features, seed=0) if shuffle else data.features
    reports = generate_reports(
        adapted.model,
        adapted.tokenizer,
        features=features,
        indications=[pair.indication for pair in data.pairs],
        max_new_tokens=study.training.max_new_tokens,
    )
    metrics = score_reports(
        reports, [pair.findings for pair in data.pairs], resamples=study.evaluation.resamples
    )
    return Scored(metrics, reports)


def by_site(data: HeldOut, reports: Sequence[str], *, resamples: int) -> dict[str, Any]:
    """Score one adapter's reports for each site on its own."""
    scores = {}
    for site in sorted(set(data.sites)):
        rows = [row for row, name in enumerate(data.sites) if name == site]
        scores[site] = score_reports(
            [reports[row] for row in rows], [data.pairs[row].findings for row in rows], resamples=resamples
        )
    return scores
