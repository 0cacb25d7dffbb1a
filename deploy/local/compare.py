"""What a consortium's model is compared with, on one machine that holds everybody's data.

`pooled` is central training on the union of all sites, with the same draws' distribution and the same
privacy; `local-<site>` is one site training alone on its own data, without noise, since a model that stays at
home needs none. Both use the study's own gradient, schedule and optimizer. Only a local run can do this:
in a consortium nobody holds the union.

Run as a program (`python -m deploy.local.compare OUT`) it works beside the federated run and leaves
`OUT/compare/<name>.f32` and `<name>.json`; what is there already is not made again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.contribution import draw_patients, round_randomness
from client.data.store import Pair, read_pairs
from client.features import Features
from client.home import SiteHome, open_home
from client.models import ModelPool
from client.training import Draw, TrainingData, gradient_sum, prepare_training
from common.config import Study
from common.files import write_atomic
from common.model.lora import Vector, group_mask, read_adapter, vector_from_bytes, vector_to_bytes
from common.model.prompts import Example
from common.privacy.mechanism import Mode as PlanMode
from common.privacy.mechanism import PrivacyPlan, dequantise, privatise
from common.privacy.sampling import Csprng
from common.privacy.study_plan import plan_of
from common.schedule import active_groups, learning_rate
from server.checkpoint import read_signed_study
from server.optimizer import initial_state, take_step

if TYPE_CHECKING:
    import torch

    from common.model.loading import AdaptedModel

RandomBytes = Callable[[int], bytes]


class UnionFeatures(Features):
    """Features of several sites, addressed as one list."""

    def __init__(self, parts: Sequence[tuple[Features, int]]) -> None:
        super().__init__(None, None)
        self._parts = parts

    def rows(self, indices: Sequence[int]) -> torch.Tensor:
        import torch

        rows = []
        for index in indices:
            for features, count in self._parts:
                if index < count:
                    rows.append(features.rows([index]))
                    break
                index -= count
        return torch.cat(rows)


def union(parts: Mapping[str, TrainingData]) -> TrainingData:
    """Put the sites' training data together; patients become `site/patient`."""
    patients: list[str] = []
    studies: dict[str, tuple[int, ...]] = {}
    examples: list[Example] = []
    rows: list[tuple[int, ...]] = []
    features: list[tuple[Features, int]] = []
    images = 0
    for site, data in sorted(parts.items()):
        offset = len(examples)
        examples.extend(data.examples)
        rows.extend(tuple(row + images for row in own) for own in data.image_rows)
        for patient in data.patients:
            patients.append(f"{site}/{patient}")
            studies[f"{site}/{patient}"] = tuple(row + offset for row in data.studies[patient])
        count = sum(len(own) for own in data.image_rows)
        features.append((data.features, count))
        images += count
    return TrainingData(tuple(patients), studies, tuple(examples), tuple(rows), UnionFeatures(features))


def train_centrally(
    adapted: AdaptedModel,
    study: Study,
    parts: Mapping[str, TrainingData],
    initial: Vector,
    *,
    denominator: float,
    private: bool,
    random_bytes: RandomBytes = os.urandom,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vector:
    """Train on the union of `parts` as one site would, all rounds; returns the adapter.

    Patients of all sites share microbatches, so this is not the federated sum computed once more.
    """
    together = union(parts)
    index_of = {site: {p: f"{site}/{p}" for p in data.patients} for site, data in parts.items()}
    offset_of, offset = {}, 0
    for site, data in sorted(parts.items()):
        offset_of[site] = offset
        offset += len(data.examples)
    vector, state = initial, initial_state(study)
    plan = central_plan(study) if private else None
    for round in range(study.rounds):
        draw: list[tuple[str, Sequence[int]]] = []
        for site, data in sorted(parts.items()):
            csprng = round_randomness(study, site=site, round=round, seed=random_bytes(32))
            own: Draw = draw_patients(study, data, csprng)
            draw += [(index_of[site][p], [row + offset_of[site] for row in rows]) for p, rows in own]
        draw.sort(key=lambda entry: entry[0][::-1])  # mix the sites within microbatches
        adapted.write_vector(vector)
        total = gradient_sum(
            adapted,
            together,
            draw,
            groups=active_groups(study, round),
            clip_norm=study.privacy.clip_norm if private else None,
            microbatch_patients=study.training.microbatch_patients,
        )
        if plan is not None:
            total = _noised(total, study, plan, round=round, seed=random_bytes(32))
        vector, state, _ = take_step(
            study,
            vector,
            state,
            (total / denominator).astype(np.float32),
            groups=active_groups(study, round),
            learning_rate=learning_rate(study, round),
        )
        progress(round + 1, study.rounds)
    return vector


def central_plan(study: Study) -> PrivacyPlan:
    """The plan of the pooled site: all of the release's noise on one sum, and no other party."""
    plan = plan_of(study)
    return replace(
        plan,
        mode=PlanMode.LOCAL,
        sites=1,
        colluders=0,
        dropouts=0,
        local_steps=1,
        site_noise=plan.release_noise,
    )


def _noised(
    total: npt.NDArray[np.float64], study: Study, plan: PrivacyPlan, *, round: int, seed: bytes
) -> npt.NDArray[np.float64]:
    trained = group_mask(study.adapter.tensors, active_groups(study, round))
    noised = np.zeros_like(total)
    noised[trained] = dequantise(privatise(total[trained], plan, Csprng(seed)), plan)
    return noised


def held_out(home: SiteHome, split: str, *, limit: int) -> tuple[Pair, ...]:
    """Choose the same at most `limit` studies of a split every time, spread over the folder."""
    chosen = sorted((p for p in read_pairs(home.data) if p.split == split), key=lambda p: p.study[::-1])
    return tuple(chosen[:limit])


def training_parts(
    adapted: AdaptedModel, study: Study, homes: Mapping[str, SiteHome]
) -> dict[str, TrainingData]:
    """Load every site's training split from the features that the run has computed."""
    return {
        site: prepare_training(
            adapted,
            study,
            read_pairs(home.data),
            data=home.data,
            cache=home.cache,
            progress=lambda what, done, total: None,
        )
        for site, home in sorted(homes.items())
    }


def comparison_path(out: Path, name: str) -> Path:
    return out / "compare" / f"{name}.f32"


def read_comparison(out: Path, name: str, study: Study) -> Vector:
    return vector_from_bytes(comparison_path(out, name).read_bytes(), study.adapter.tensors)


def compare_all(out: Path, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Train whatever comparison of a local run is not there yet."""
    study = read_signed_study(out / "server")
    homes = {site: open_home(out / "sites" / site) for site in study.site_ids}
    pool = ModelPool()
    first = next(iter(homes.values()))
    with pool.use(study, first.base_directory(study.base.name)) as adapted:
        parts = training_parts(adapted, study, homes)
        initial = read_adapter(out / "server" / "initial", study.adapter.tensors)
        jobs: list[tuple[str, dict[str, TrainingData], float, bool]] = [
            ("pooled", parts, study.training.denominator, study.privacy.site_noise > 0)
        ]
        for site, data in parts.items():
            own = max(1.0, study.training.sampling_rate * len(data.patients))
            jobs.append((f"local-{site}", {site: data}, own, False))
        for name, used, denominator, private in jobs:
            path = comparison_path(out, name)
            if path.is_file():
                continue
            started = time.time()

            def progress(done: int, total: int, name: str = name) -> None:
                say(json.dumps({"name": name, "done": done, "total": total}))

            vector = train_centrally(
                adapted, study, used, initial, denominator=denominator, private=private, progress=progress
            )
            write_atomic(
                path.with_suffix(".json"), json.dumps({"seconds": round(time.time() - started, 2)}).encode()
            )
            write_atomic(path, vector_to_bytes(vector))


def main() -> None:
    import torch

    torch.set_num_threads(1)
    compare_all(Path(sys.argv[1]), say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
