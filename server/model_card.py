"""The model card of a release: what it is, what went in, what it was measured at, what it is not.

Data stand in buckets, as the sites stated them in the ledger; figures are those handed in, never made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.config import Mode, Study
from common.ledger.entries import DataUse, Evaluation


@dataclass(frozen=True)
class Facts:
    """What a card says beside the manifest.

    `site_epsilon` is the largest that a site stated; both ε are 0 where nothing is claimed. `metrics` maps
    the name of an evaluation to `finding_f1`, `rouge_l`, `exact_match` and `n`; `by_group` the same by
    site or subgroup.
    """

    adapter_sha256: str
    rounds: int
    site_epsilon: float
    release_epsilon: float
    data: Sequence[DataUse] = ()
    evaluations: Sequence[Evaluation] = ()
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_group: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def model_card(study: Study, facts: Facts) -> str:
    """Write the card as Markdown with the front matter that model hubs read."""
    stages = ", ".join(f"{stage.name.value} {stage.rounds} rounds" for stage in study.stage)
    return f"""---
base_model: {study.base.name}
library_name: peft
tags: [radiology, federated-learning, fedrad]
---

# {study.study.id}: adapter {facts.adapter_sha256[:12]}

{study.study.purpose}. Trained by FedRad across {len(study.site_ids)} sites; images and reports never
left them.

**{_privacy(study, facts)}**

- Study `{study.sha256}`, {facts.rounds} rounds ({stages}), LoRA rank {study.adapter.rank}
  (strategy {study.adapter.strategy.value}) and the projector; the base `{study.base.name}` is unchanged,
  and its licence goes with it: read it beside the base's files before use.
- Adapter SHA-256 `{facts.adapter_sha256}`.

## Data
{_data(facts.data)}

## Measured
{_federated(facts.evaluations)}{_table(facts.metrics) if facts.metrics else "No other figures were given."}
{_groups(facts.by_group)}
## Not for
Clinical decisions. A draft of the findings section needs a radiologist. Views other than frontal chest
radiographs, and hospitals unlike the ones that trained it, were not measured. The privacy claim holds
per hospital: a patient seen at two of them is protected at each, with both ε added up.
"""


def _privacy(study: Study, facts: Facts) -> str:
    if study.privacy.mode is Mode.PLAIN:
        return "No differential privacy (mode plain): for public or synthetic data only."
    seeded = " SEEDED FOR A TEST, hence no guarantee." if study.testing else ""
    return (
        f"Differential privacy for one patient at one site, δ = {study.privacy.delta:.1e}: ε = "
        f"{facts.release_epsilon:.2f} against anyone with this release, ε ≤ {facts.site_epsilon:.2f} against "
        f"the server that ran the study.{seeded}"
    )


def _data(stated: Sequence[DataUse]) -> str:
    if not stated:
        return "The sites stated nothing about their data."
    rows = [
        f"| {use.site} | {use.patients} | {use.studies} |" for use in sorted(stated, key=lambda u: u.site)
    ]
    return "\n".join(["| site | training patients | training studies |", "|---|---|---|", *rows])


def _federated(evaluations: Sequence[Evaluation]) -> str:
    """Say what the federated evaluation of this very adapter found."""
    if not evaluations:
        return ""
    figures = evaluations[-1].metrics
    return (
        f"Across the sites' held-out studies ({evaluations[-1].studies} patients, noised counts): finding-F1 "
        f"{figures['finding_f1']:.3f} (95 % interval {figures['finding_f1.low']:.3f} to "
        f"{figures['finding_f1.high']:.3f}). These figures cost their readers ε = "
        f"{figures['release_epsilon']:.2f} on top of the release's.\n\n"
    )


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f"| {name} | {value['finding_f1']:.3f} | {value['rouge_l']:.3f} | {value['exact_match']:.3f} "
        f"| {value['n']} |"
        for name, value in metrics.items()
    ]
    head = ["| held-out studies | finding-F1 | ROUGE-L | exact match | n |", "|---|---|---|---|---|"]
    note = (
        "\n\n`federated_shuffled_images` gives every study another study's image: what remains is the "
        "language prior."
    )
    return "\n".join([*head, *rows]) + (note if "federated_shuffled_images" in metrics else "")


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> str:
    return f"\n### By site or subgroup\n{_table(groups)}\n" if groups else ""
