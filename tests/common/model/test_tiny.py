"""The tiny base: a real checkpoint, remade on the same path, that looks at its images."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.evaluation import generate_reports, shuffled
from common.errors import BaseInvalid
from common.metrics import score_reports
from common.model import phantom_reports, phantoms, tiny
from common.model.images import load_pixels
from common.model.llava import vision_features

FEW = 2
FILES = {
    "config.json",
    "fedrad.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "pretraining.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("remade")
    tiny.make_tiny(out, steps=FEW)
    return out


def path_of(base: Path) -> dict[str, list[float]]:
    path: dict[str, list[float]] = json.loads((base / "pretraining.json").read_text())
    return path


def test_shipped_base_is_whole_and_small() -> None:
    base = tiny.tiny_base_directory()
    assert {path.name for path in base.iterdir()} == FILES
    assert (base / "model.safetensors").stat().st_size <= 3_000_000


def test_plain_transformers_load_it_in_float32() -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    base = tiny.tiny_base_directory()
    model = LlavaForConditionalGeneration.from_pretrained(base)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(base).get_vocab() == tiny.vocabulary()
    assert model.config.image_token_id == tiny.IMAGE


def test_a_remake_writes_the_same_kind_of_base(remade: Path) -> None:
    base = tiny.tiny_base_directory()
    assert {path.name for path in remade.iterdir()} == FILES
    for name in FILES - {"model.safetensors", "pretraining.json"}:
        assert (remade / name).read_bytes() == (base / name).read_bytes(), name


def test_a_short_remake_starts_on_the_shipped_path(remade: Path) -> None:
    """Rounding differs between processors, hence the tolerance."""
    shipped = path_of(tiny.tiny_base_directory())["tower"]
    assert len(shipped) == tiny.Pretraining().tower_steps
    assert path_of(remade)["tower"] == pytest.approx(shipped[:FEW], abs=2e-3)


def test_language_learning_from_the_shipped_tower_starts_on_the_shipped_path() -> None:
    """The shipped tower is rounded to fp16, hence the tolerance."""
    from transformers import LlavaForConditionalGeneration

    plan = tiny.Pretraining()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = tiny.build_model()
    shipped = LlavaForConditionalGeneration.from_pretrained(tiny.tiny_base_directory())
    model.model.vision_tower.load_state_dict(shipped.model.vision_tower.state_dict())
    expected = path_of(tiny.tiny_base_directory())["language"]
    assert len(expected) == plan.align_steps
    assert tiny.train_language(model, plan, steps=FEW) == pytest.approx(expected[:FEW], abs=5e-3)


@pytest.mark.slow
def test_remaking_twice_gives_the_same_bytes(remade: Path, tmp_path: Path) -> None:
    tiny.make_tiny(tmp_path, steps=FEW)
    for name in FILES:
        digests = {hashlib.sha256((base / name).read_bytes()).digest() for base in (remade, tmp_path)}
        assert len(digests) == 1, name


@pytest.mark.slow
def test_images_matter_to_the_shipped_base(tmp_path: Path) -> None:
    """Held-out public phantoms: finding-F1 at least twice that of shuffled images, through image files."""
    from PIL import Image
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    base = tiny.tiny_base_directory()
    model = LlavaForConditionalGeneration.from_pretrained(base)
    words = AutoTokenizer.from_pretrained(base)
    pixels, truth, asked = [], [], []
    for index in range(80):
        rng = np.random.default_rng([99, index])
        findings = phantoms.draw_findings(rng, tiny.PUBLIC_PREVALENCE)
        scanner = tiny.PUBLIC_SCANNERS[index % 2]
        file = tmp_path / f"{index}.png"
        Image.fromarray(phantoms.expose(phantoms.render(findings, rng), scanner, rng)).save(file)
        pixels.append(load_pixels(file, base))
        report = phantom_reports.write_report(findings, tiny.PUBLIC_STYLE, rng)
        truth.append(report.findings)
        asked.append(report.indication)
    features = vision_features(model, torch.from_numpy(np.stack(pixels)))

    def f1(shown: torch.Tensor) -> float:
        said = generate_reports(model, words, features=shown, indications=asked, max_new_tokens=60)
        score = score_reports(said, truth, resamples=0)["finding_f1"]
        assert isinstance(score, float)
        return score

    assert f1(features) > 0.8 > 0.4 > f1(shuffled(features, seed=0))


def test_cache_is_used_when_it_holds_a_base(remade: Path) -> None:
    assert tiny.tiny_base_directory(remade) == remade


def test_missing_shipped_base_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiny, "SHIPPED", tmp_path)
    with pytest.raises(BaseInvalid, match=r"no model\.safetensors"):
        tiny.tiny_base_directory()
