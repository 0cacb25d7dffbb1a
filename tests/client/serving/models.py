"""Random Llavas with a word-level tokenizer whose answers depend on the image: engines under test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from client.serving.decoding import BatchDecoder
from client.serving.engine import Ask, ModelVersion, Options
from common.model import tiny

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
