"""A site's noised counts on its held-out studies: drafts by the round's adapter, read by the labeller.

Guarantees: what is returned carries the site's share of the noise, and one patient moves it by at most the
plan's clip; drafts and exact counts stay here. The caller has charged the budget before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.data.store import Pair
from client.evaluate.federated import chosen_studies, site_contribution
from client.evaluation import generate_reports
from client.features import load_features
from common.config import Study
from common.errors import DataInsufficient
from common.model.prompts import prompt_template
from common.privacy.mechanism import PrivacyPlan
from common.privacy.sampling import Csprng

if TYPE_CHECKING:
    from common.model.loading import AdaptedModel


def evaluation_units(
    adapted: AdaptedModel,
    study: Study,
    pairs: Sequence[Pair],
    plan: PrivacyPlan,
    csprng: Csprng,
    *,
    split: str,
    data: Path,
    cache: Path,
) -> npt.NDArray[np.uint32]:
    """Write, label, count, clip, sum and noise: uint32 [DIMENSION], to be masked.

    The adapter's values are the model's own; a study's first image is read. Raises DataInsufficient.
    """
    held = {pair.study: pair for pair in pairs if pair.split == split}
    patients: dict[str, list[str]] = {}
    for name, pair in held.items():
        patients.setdefault(pair.patient, []).append(name)
    chosen = chosen_studies(patients, plan, csprng)
    names = sorted(name for studies in chosen.values() for name in studies)
    if not names:
        raise DataInsufficient(f"expected at least one study in split {split}, got none")
    features = load_features(
        adapted.model, [data / held[name].images[0] for name in names], base=adapted.directory,
        base_files=study.base.files, cache=cache, progress=lambda what, done, total: None,
    )  # fmt: skip
    written = generate_reports(
        adapted.model, adapted.tokenizer, features=features.rows(list(range(len(names)))),
        indications=[held[name].indication for name in names],
        max_new_tokens=study.training.max_new_tokens, template=prompt_template(adapted.directory),
    )  # fmt: skip
    drafts = dict(zip(names, written, strict=True))
    references = {name: held[name].findings for name in names}
    return site_contribution(chosen, drafts, references, plan, csprng).view(np.uint32)
