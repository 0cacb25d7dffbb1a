"""The model card of a release: what it is, what went in, what it was measured at, what it is not."""

from __future__ import annotations

from typing import Any

from common.config import Mode, Study


def model_card(study: Study, result: dict[str, Any], *, adapter_sha256: str) -> str:
    """Write the card as Markdown with the front matter that model hubs read."""
    metrics = result["metrics"]
    rows = "\n".join(
        f"| {name} | {value['finding_f1']:.3f} | {value['rouge_l']:.3f} | {value['exact_match']:.3f} "
        f"| {value['n']} |"
        for name, value in metrics.items()
        if isinstance(value, dict) and "finding_f1" in value
    )
    stages = ", ".join(f"{stage.name.value} {stage.rounds} rounds" for stage in study.stage)
    return f"""---
base_model: {study.base.name}
library_name: peft
tags: [radiology, federated-learning, fedrad]
---

# {study.study.id}: adapter {adapter_sha256[:12]}

{study.study.purpose}. Trained by FedRad across {len(study.site_ids)} sites; images and reports never
left them.

**{_privacy(study, result)}**

- Study `{result["study"]}`, {result["rounds"]} rounds ({stages}), LoRA rank {study.adapter.rank}
  (strategy {study.adapter.strategy.value}) and the projector; the base `{study.base.name}` is unchanged.
- Adapter SHA-256 `{adapter_sha256}`.

| held-out studies | finding-F1 | ROUGE-L | exact match | n |
|---|---|---|---|---|
{rows}

`federated_shuffled_images` gives every study another study's image: what remains is the language prior.

## Not for
Clinical decisions. A draft of the findings section needs a radiologist. Views other than frontal chest
radiographs, and hospitals unlike the ones that trained it, were not measured.
"""


def _privacy(study: Study, result: dict[str, Any]) -> str:
    if study.privacy.mode is Mode.PLAIN:
        return "No differential privacy (mode plain): for public or synthetic data only."
    privacy = result["privacy"]
    seeded = " SEEDED FOR A TEST, hence no guarantee." if study.testing else ""
    return (
        f"Differential privacy for one patient at one site: ε = {privacy['release_epsilon']:.2f} at "
        f"δ = {privacy['delta']:.1e} for anyone with this release.{seeded}"
    )
