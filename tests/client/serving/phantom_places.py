"""How well grounding finds what a sentence speaks of, on phantoms whose findings' places are known.

    python -m tests.client.serving.phantom_places RELEASE [--patients 60] [--seed 5]

A case is a sentence of the model's own draft that names one finding which the phantom has: on one side
(`cases`), or without a side (`unsided`: heart, edema, devices).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.serving.grounding import grid_side, image_attention, span_map
from common.labeller import present_findings
from common.model import phantom_reports, phantoms
from deploy.local.synthetic import HOSPITALS

CELLS = 16
SIDED = frozenset({"Pleural Effusion", "Pneumothorax", "Lung Opacity", "Lung Lesion", "Atelectasis"})


@dataclass(frozen=True)
class Case:
    """One sentence: its finding, the true side, what the draft said, true region and overlay [16, 16]."""

    label: str
    side: str
    said: str
    region: NDArray[np.bool_]
    overlay: NDArray[np.float64]

    @property
    def mass_on_side(self) -> float:
        half = self.overlay[:, : CELLS // 2] if self.side == "right" else self.overlay[:, CELLS // 2 :]
        return float(half.sum())

    @property
    def times_chance(self) -> float:
        """Mass inside the region over the region's share of the picture."""
        return float(self.overlay[self.region].sum() / self.region.mean())


def load_release(directory: Path) -> tuple[Any, Any]:
    """Load a release of a study of the tiny base."""
    from common.model.loading import load_adapted
    from common.model.release import open_release
    from common.model.tiny import tiny_base_directory

    release = open_release(directory, allow_unprotected=True)
    adapted = load_adapted(tiny_base_directory(), release.study.adapter)
    adapted.write_vector(release.adapter)
    return adapted.model, adapted.tokenizer


def cases(model: Any, tokenizer: Any, *, patients: int, seed: int) -> list[Case]:
    """Draw `patients` per hospital, draft, and return every sentence about a finding on one side."""
    return [c for c in all_cases(model, tokenizer, patients=patients, seed=seed) if c.label in SIDED]


def all_cases(model: Any, tokenizer: Any, *, patients: int, seed: int) -> Iterator[Case]:
    """Draw `patients` per hospital, draft, and yield every sentence that counts, with side and without."""
    for number, hospital in enumerate(HOSPITALS.values()):
        for patient in range(patients):
            rng = np.random.default_rng([seed, number, patient])
            findings = phantoms.draw_findings(rng, hospital.prevalence)
            if not any(f.side != "bilateral" for f in findings):
                continue
            picture, places = phantoms.render_places(findings, rng)
            shown = phantoms.expose(picture, hospital.scanner, rng)
            report = phantom_reports.write_report(findings, hospital.style, rng)
            written, attention = _draft(model, tokenizer, shown, report.indication)
            for first, end in _sentences(tokenizer, written):
                text = tokenizer.decode(written[first:end])
                named = present_findings(text) - {"No Finding"}
                true = [f for f in findings if {f.label} == named and f.side != "bilateral"]
                if not true:
                    continue
                region = _moved(places[phantoms.LABELS.index(true[0].label)], hospital.scanner, rng)
                if not region.any():
                    continue
                values = span_map(attention, first_token=first, end_token=end)
                said = next((side for side in phantoms.SIDES if side in text), "")
                yield Case(true[0].label, true[0].side, said, region, _spread(values))


def summarise(found: list[Case], *, seed: int = 0) -> dict[str, Any]:
    """Figures with bootstrap 95 % intervals over cases."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(found), (2000, len(found)))

    def figure(values: list[float]) -> list[float]:
        array = np.array(values)
        low, high = np.percentile(array[rows].mean(1), (2.5, 97.5))
        return [round(float(x), 3) for x in (array.mean(), low, high)]

    return {
        "cases": len(found),
        "draft_says_the_true_side": round(float(np.mean([c.said == c.side for c in found])), 3),
        "most_mass_on_the_right_side": figure([float(c.mass_on_side > 0.5) for c in found]),
        "mass_on_the_right_side": figure([c.mass_on_side for c in found]),
        "times_chance": figure([c.times_chance for c in found]),
        "times_chance_median": round(float(np.median([c.times_chance for c in found])), 2),
        "by_finding": {
            label: {
                "cases": len(some),
                "most_mass_on_the_right_side": round(float(np.mean([c.mass_on_side > 0.5 for c in some])), 3),
                "times_chance": round(float(np.mean([c.times_chance for c in some])), 2),
            }
            for label in sorted(SIDED)
            if (some := [c for c in found if c.label == label])
        },
    }


def _draft(model: Any, tokenizer: Any, shown: NDArray[np.uint8], indication: str) -> tuple[list[int], Any]:
    import torch
    from PIL import Image

    from common.model.images import prepare, read_processor
    from common.model.llava import generate_from_features, llava_of, vision_features
    from common.model.prompts import encode_prompt, prompt_template
    from common.model.tiny import tiny_base_directory

    base = tiny_base_directory()
    pixels = prepare(Image.fromarray(shown).convert("RGB"), read_processor(base))
    features = vision_features(model, torch.from_numpy(pixels)[None]).float()
    prompt = encode_prompt(
        tokenizer,
        image_tokens=features.shape[1],
        image_token_id=llava_of(model).config.image_token_id,
        indication=indication,
        template=prompt_template(base),
    )
    (written,) = generate_from_features(
        model,
        prompt_ids=[prompt],
        features=features,
        max_new_tokens=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return written, image_attention(model, input_ids=list(prompt), features=features, written=written)


def _sentences(tokenizer: Any, written: list[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for index, token in enumerate(written):
        if tokenizer.decode([token]).strip() == ".":
            yield first, index + 1
            first = index + 1


def _moved(places: NDArray[np.float32], scanner: phantoms.Scanner, rng: Any) -> NDArray[np.bool_]:
    """Move a region as the scanner moves the picture."""
    cell = phantoms.SIZE // CELLS
    large = np.kron(places, np.ones((cell, cell), np.float32))
    shown = phantoms.expose(large, phantoms.Scanner(noise=0, zoom=scanner.zoom, shift=scanner.shift), rng)
    return np.asarray(shown.reshape(CELLS, cell, CELLS, cell).mean((1, 3)) > 127)


def _spread(values: NDArray[np.float32]) -> NDArray[np.float64]:
    side = grid_side(len(values))
    cell = CELLS // side
    return np.kron(values.reshape(side, side).astype(np.float64), np.ones((cell, cell)) / cell**2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--patients", type=int, default=60)
    parser.add_argument("--seed", type=int, default=5)
    asked = parser.parse_args()
    started = time.process_time()
    drawn = list(all_cases(*load_release(asked.release), patients=asked.patients, seed=asked.seed))
    figures = summarise([case for case in drawn if case.label in SIDED])
    rest: dict[str, list[float]] = {}
    for case in drawn:
        if case.label not in SIDED:
            rest.setdefault(case.label, []).append(case.times_chance)
    figures["unsided"] = {
        label: {"cases": len(some), "times_chance": round(float(np.mean(some)), 2)}
        for label, some in sorted(rest.items())
    }
    print(json.dumps({**figures, "cpu_s": round(time.process_time() - started, 1)}, indent=1))
