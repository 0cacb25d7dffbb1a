"""Random Llavas with a word-level tokenizer whose answers depend on the image: engines under test."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.serving.decoding import BatchDecoder
from client.serving.engine import Ask, ModelVersion, Options
from client.serving.plan import EnginePlan
from client.serving.source import ReleaseSource
from common.config import Study, parse_study_toml
from common.identity import SigningKey
from common.model import tiny
from common.model.lora import adapter_tensors, vector_size
from common.model.manifest import hash_base
from common.model.release import write_release
from tests.simulator import study_text

VERSION = ModelVersion(
    version=3,
    study="5" * 64,
    study_id="demo",
    round=20,
    adapter_sha256="a" * 64,
    base="tiny",
    mode="consortium",
    release_epsilon=4.5,
    delta=1e-5,
    protected=True,
)


def talkative_model(seed: int = 1) -> tuple[Any, Any]:
    """The tiny architecture with random weights large enough that pictures change the words."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = tiny.build_model().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model, tiny.tokenizer()


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)).astype(np.float32)


def ask(seed: int, indication: str = "", **options: Any) -> Ask:
    return Ask(f"{seed:064x}", picture(seed), indication, Options(**options))


def decoder(model: Any, tokenizer: Any, **settings: Any) -> BatchDecoder:
    return BatchDecoder(
        model,
        tokenizer,
        version=VERSION,
        template=tiny.PROMPT,
        **({"default_tokens": 24} | settings),
    )


KEY = SigningKey.from_seed(b"o" * 32)
PLAN = EnginePlan("cpu", "float32", "none", "sdpa", 8, 16 << 20, 16 << 20, "a test")


@functools.cache
def talkative_base() -> Path:
    """A base directory of random weights whose answers depend on the image."""
    model, _ = talkative_model()
    folder = Path(tempfile.mkdtemp(prefix="fedrad-test-base-"))
    tiny.write_base(folder, model, losses={})
    return folder


def talkative_study(*, max_new_tokens: int = 24) -> Study:
    """A study of that base whose operator is `KEY`."""
    base = talkative_base()
    parsed = parse_study_toml(study_text(mode="consortium", seed=None))
    return replace(
        parsed,
        base=replace(parsed.base, files=hash_base(base)),
        training=replace(parsed.training, max_new_tokens=max_new_tokens),
        adapter=replace(parsed.adapter, tensors=adapter_tensors(base, parsed.adapter)),
        cohort=replace(parsed.cohort, operator_key=KEY.public),
    )


@functools.cache
def talkative_release(seed: int = 1, *, scale: float = 0.2, round: int = 2, max_new_tokens: int = 24) -> Path:
    """A signed release for it; another seed is another adapter."""
    study = talkative_study(max_new_tokens=max_new_tokens)
    size = vector_size(study.adapter.tensors)
    rng = np.random.default_rng(seed)
    vector = (rng.standard_normal(size) * scale).astype(np.float32)
    folder = Path(tempfile.mkdtemp(prefix="fedrad-test-release-"))
    write_release(folder, study, vector, KEY, round=round, release_epsilon=7.5, card="# A model\n")
    return folder


def talkative_source(seed: int = 1, **settings: Any) -> ReleaseSource:
    return ReleaseSource(talkative_release(seed), talkative_base(), **settings)
