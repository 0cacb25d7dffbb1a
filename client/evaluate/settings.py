"""What to evaluate, on what, with which extras: the settings of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from client.evaluate.judge import Ask


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate on what; `metrics` maps a name to `module:function` of the site's own Python."""

    release: Path
    data: Path
    out: Path
    against: Path | None = None
    split: str = "test"
    limit: int = 0
    base: Path | None = None
    against_base: Path | None = None
    groups: Path | None = None
    questions: Path | None = None
    retrieval: int = 0
    judge_name: str = ""
    ask: Ask | None = field(default=None, compare=False)
    metrics: Mapping[str, str] = field(default_factory=dict)
    weights: Path | None = None
    resamples: int = 1000
    seed: int = 0
    batch_size: int = 32
    examples: int = 0
    operator_key: str | None = None
    allow_unprotected: bool = False
