"""`fedrad-local audit-privacy`: attack the finished study in OUT and write `OUT/privacy-audit.json`.

Members are the patients of the sites' training splits, others those of the test splits; the split is random
by patient, so only training can tell them apart. Every figure stands beside the epsilon claimed for it.

Only a machine that holds all data can do this; nothing here runs in a consortium.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from client.data.store import read_pairs
from client.home import open_home
from client.models import ModelPool
from client.training import prepare_training
from common.config import Mode
from common.errors import DataInsufficient
from common.files import write_atomic
from common.model.lora import read_adapter
from common.privacy.mechanism import View
from common.privacy.sampling import Csprng
from common.privacy.study_plan import plan_of
from deploy.local.privacy_audit import (
    Scores,
    canary_audit,
    membership_inference,
    membership_scores,
    patient_losses,
)
from server.checkpoint import read_signed_study

Progress = Callable[[str, int, int], None]


def audit_run(
    out: Path, *, canaries: int = 1000, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Run both attacks on the study in `out` and return what `privacy-audit.json` holds.

    Raises DataInsufficient when a split has no patients, or when the study has not finished.
    """
    study = read_signed_study(out / "server")
    last = out / "server" / "rounds" / f"{study.rounds - 1:06d}"
    if not last.is_dir():
        raise DataInsufficient(f"{out}: expected a finished study of {study.rounds} rounds, got fewer")
    tensors = study.adapter.tensors
    before, after = read_adapter(out / "server" / "initial", tensors), read_adapter(last, tensors)
    homes = {site: open_home(out / "sites" / site) for site in study.site_ids}
    scores: dict[str, list[Scores]] = {"train": [], "test": []}
    first = homes[study.site_ids[0]]
    with ModelPool().use(study, first.base_directory(study.base.name)) as adapted:
        for number, home in enumerate(homes.values()):
            progress("membership", number, len(homes))
            for split, found in scores.items():
                data = prepare_training(
                    adapted,
                    study,
                    read_pairs(home.data),
                    data=home.data,
                    cache=home.cache,
                    progress=lambda what, done, total: None,
                    split=split,
                )
                losses = [patient_losses(adapted, data, vector) for vector in (before, after)]
                found.append(membership_scores(*losses))
        progress("membership", len(homes), len(homes))
    private = study.privacy.mode is not Mode.PLAIN
    delta = study.privacy.delta if private else 1 / (10 * study.training.patients)
    membership = membership_inference(
        np.concatenate(scores["train"]), np.concatenate(scores["test"]), delta=delta
    )
    result: dict[str, Any] = {
        "study": study.sha256,
        "mode": study.privacy.mode.value,
        "delta": delta,
        "claimed": None,
        "membership": asdict(membership),
        "canaries": [],
    }
    if private:
        plan = plan_of(study)
        result["claimed"] = {view.value: plan.epsilon(view) for view in View}
        audits = canary_audit(
            plan,
            Csprng.from_os(),
            canaries=canaries,
            progress=lambda done, total: progress("canaries", done, total),
        )
        result["canaries"] = [{**asdict(audit), "consistent": audit.consistent} for audit in audits]
    write_atomic(out / "privacy-audit.json", (json.dumps(result, indent=2) + "\n").encode())
    return result
