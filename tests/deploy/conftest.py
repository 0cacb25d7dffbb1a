"""Small synthetic consortia for end-to-end tests of local runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SITES = ("north", "east", "south", "west")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals with 24 patients each."""
    from deploy.local.synthetic import write_synthetic_sites

    out = tmp_path_factory.mktemp("data")
    write_synthetic_sites(out, sites=SITES, patients=dict.fromkeys(SITES, 24), seed=77)
    return out


@pytest.fixture()
def small_study(tmp_path: Path) -> Callable[..., Path]:
    """Write a small seeded study.toml; keyword arguments replace top-level `key = value` lines."""

    def make(mode: str = "plain", *, seeded: bool = True, rounds: int = 4, **changes: object) -> Path:
        from server.studies import study_template

        text = study_template(id="small", base="tiny", sites=SITES, mode=mode, rounds=rounds, patients=400)
        for key, value in {"sampling_rate": 0.3, "resamples": 50, **changes}.items():
            text, found = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", text)
            assert found == 1, key
        path = tmp_path / "study.toml"
        path.write_text(text + ("\n[testing]\nseed = 3\n" if seeded else ""))
        return path

    return make


@pytest.fixture()
def fedrad_local() -> Callable[..., subprocess.Popen[str]]:
    """Start `fedrad-local ARGS…` as its own process."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.local.cli", *map(str, arguments)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start
