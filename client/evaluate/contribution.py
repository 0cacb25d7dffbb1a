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
from common.config import Study
from common.model.images import load_pixels
from common.model.llava import vision_features
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
) -> npt.NDArray[np.uint32]:
    """Write, label, count, clip, sum and noise: uint32 [DIMENSION], to be masked.

    The adapter's values are the model's own; a study's first image is read. A site without such a patient
    sends its noise alone: that it has none is nobody's to know.
    """
    held = {pair.study: pair for pair in pairs if pair.split == split}
    patients: dict[str, list[str]] = {}
    for name, pair in held.items():
        patients.setdefault(pair.patient, []).append(name)
    chosen = chosen_studies(patients, plan, csprng)
    drafts = {
        name: _draft(adapted, study, held[name], data=data) for studies in chosen.values() for name in studies
    }
    references = {name: held[name].findings for name in drafts}
    return site_contribution(chosen, drafts, references, plan, csprng).view(np.uint32)


def _draft(adapted: AdaptedModel, study: Study, pair: Pair, *, data: Path) -> str:
    """Write one study's draft by itself: in a batch, rounding would let one patient move another's."""
    import torch

    pixels = torch.from_numpy(load_pixels(data / pair.images[0], adapted.directory))[None]
    (written,) = generate_reports(
        adapted.model, adapted.tokenizer, features=vision_features(adapted.model, pixels).float(),
        indications=[pair.indication], max_new_tokens=study.training.max_new_tokens,
        template=prompt_template(adapted.directory),
    )  # fmt: skip
    return written
