"""Gradient inversion, shown: a patient's picture comes out of an un-noised update, and not of a noised one.

The projector's weight gradient of one patient is a sum over the image's tokens of (output gradient) times
(vision feature), so its rows span exactly those features: a 64 x 64 picture of 16 tokens lies in a plane of
16 dimensions out of 128. The attacker knows the public base, takes that plane from the update, and looks for
a picture whose features lie in it. Neither the report nor the labels are needed.

It is a demonstration on the tiny base and synthetic pictures, of one patient alone in an update; a sum over
many patients spans everything and gives this attack nothing, noised or not. It bounds no attacker's skill.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.privacy.mechanism import PrivacyPlan, dequantise, privatise
from common.privacy.sampling import Csprng

if TYPE_CHECKING:
    import torch

Picture = NDArray[np.float32]
_SMOOTHNESS, _STEP_SIZE = 0.01, 0.05


@dataclass(frozen=True)
class Inversion:
    """One attack's outcome: correlation with the true picture, and with what sets it apart from the mean."""

    steps: int
    correlation: float
    correlation_beyond_mean: float


@dataclass(frozen=True)
class Demonstration:
    """Un-noised and noised attack on the same patient, and where the pictures are."""

    clip_norm: float
    noise_multiplier: float
    un_noised: Inversion
    noised: Inversion
    pictures: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def demonstrate(
    out: Path, plan: PrivacyPlan, csprng: Csprng, *, seed: int = 3, steps: int = 300
) -> Demonstration:
    """Attack one synthetic patient's update before and after the plan's noise; PNGs go to `out`.

    Pictures: `true`, `mean` (what the attacker starts from), `from-un-noised`, `from-noised`. The noise is
    one site's share, as if secure aggregation had been broken for it.
    """
    from common.model.loading import load_base
    from common.model.tiny import tiny_base_directory

    directory = tiny_base_directory()
    model, tokenizer = load_base(directory)
    public = [_synthetic(seed + 1 + i, directory)[0] for i in range(100)]
    mean = np.mean(public, axis=0)
    picture, report = _synthetic(seed, directory)
    weight, vector = _projector_gradient(model, tokenizer, directory, picture, report)
    clipped = vector * min(1.0, plan.clip_norm / float(np.linalg.norm(vector)))
    noisy = dequantise(privatise(clipped, plan, csprng), plan)
    found = {}
    results = {}
    for name, update in (("un-noised", clipped), ("noised", noisy)):
        gradient = update[: weight[0] * weight[1]].reshape(weight)
        found[name] = invert(model, gradient, mean, steps=steps)
        results[name] = Inversion(
            steps,
            _correlation(found[name], picture),
            _correlation(found[name] - mean, picture - mean),
        )
    shown = {
        "true": picture,
        "mean": mean,
        "from-un-noised": found["un-noised"],
        "from-noised": found["noised"],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, pixels in shown.items():
        _write_png(out / f"{name}.png", pixels)
    return Demonstration(
        plan.clip_norm,
        plan.site_noise,
        results["un-noised"],
        results["noised"],
        {name: f"{name}.png" for name in shown},
    )


def invert(model: Any, gradient: NDArray[np.float64], start: Picture, *, steps: int) -> Picture:
    """Find a picture [S, S] whose vision features lie in the row space of a projector gradient [out, in]."""
    import torch

    model.requires_grad_(False)
    tokens = (start.shape[0] // model.config.vision_config.patch_size) ** 2
    rows = torch.linalg.svd(torch.from_numpy(gradient).float(), full_matrices=False)[2][:tokens]
    picture = torch.from_numpy(start.astype(np.float32)).requires_grad_(True)
    low, high = float(start.min()) - 0.5, float(start.max()) + 0.5
    optimizer = torch.optim.Adam([picture], lr=_STEP_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        features = _features(model, picture)
        outside = (features - features @ rows.T @ rows).norm(dim=-1) / features.norm(dim=-1)
        roughness = picture.diff(dim=0).abs().mean() + picture.diff(dim=1).abs().mean()
        optimizer.zero_grad()
        (outside.square().mean() + _SMOOTHNESS * roughness).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            picture.clamp_(low, high)
    result: Picture = picture.detach().numpy()
    return result


def _features(model: Any, picture: torch.Tensor) -> torch.Tensor:
    config = model.config
    pixels = picture.expand(1, 3, *picture.shape)
    states = model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    features: torch.Tensor = states[config.vision_feature_layer][:, 1:]
    return features


def _projector_gradient(
    model: Any, tokenizer: Any, directory: Path, picture: Picture, report: Any
) -> tuple[tuple[int, int], NDArray[np.float64]]:
    """Shape of the first projector weight, and the flat projector gradient that starts with it."""
    import torch

    from client.gradients import PatientGradients, patient_loss, per_sample_loss
    from common.model.llava import forward_features
    from common.model.prompts import collate, encode_pair, prompt_template

    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    parameters = sorted(
        ((name, p) for name, p in model.named_parameters() if p.requires_grad),
        key=lambda entry: not entry[0].endswith("linear_1.weight"),
    )
    example = encode_pair(
        tokenizer,
        image_tokens=(picture.shape[0] // model.config.vision_config.patch_size) ** 2,
        image_token_id=model.config.image_token_id,
        indication=report.indication,
        report=report.findings,
        max_tokens=128,
        template=prompt_template(directory),
    )
    inputs = collate([example], pad_token_id=tokenizer.pad_token_id)
    one = torch.zeros(1, dtype=torch.int64)
    with PatientGradients(model, parameters) as engine:
        with torch.no_grad():
            features = _features(model, torch.from_numpy(picture))
        with engine.microbatch(units=1, row_to_unit=one):
            logits = forward_features(
                model,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                features=features,
            )
            patient_loss(per_sample_loss(logits, inputs["labels"]), one).backward()
        engine.accumulate(None)
        flat = engine.take()
    rows, columns = parameters[0][1].shape
    return (rows, columns), flat


def _synthetic(seed: int, base: Path) -> tuple[Picture, Any]:
    """One made-up patient as the base sees it: grey picture [S, S] and report."""
    from PIL import Image

    from common.model import phantom_reports, phantoms
    from common.model.images import prepare, read_processor
    from common.model.tiny import PUBLIC_PREVALENCE, PUBLIC_STYLE

    draw = np.random.default_rng([97, seed])
    findings = phantoms.draw_findings(draw, PUBLIC_PREVALENCE)
    grey = phantoms.expose(phantoms.render(findings, draw), phantoms.Scanner(), draw)
    report = phantom_reports.write_report(findings, PUBLIC_STYLE, draw)
    return prepare(Image.fromarray(grey).convert("RGB"), read_processor(base))[0], report


def _correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def _write_png(path: Path, picture: Picture) -> None:
    from PIL import Image

    low, high = -2.0, 2.0
    grey = np.clip((picture - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    Image.fromarray(grey).resize((256, 256), Image.Resampling.NEAREST).save(path)
