"""`fedrad-site bench`: its figures fit together; `doctor --gpu` without a card says so and fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.serving.bench import bench_text
from common.model.manifest import tensor_shapes
from tests.client.serving.models import talkative_base, talkative_release


def test_the_figures_of_a_bench_fit_together(tmp_path: Path) -> None:
    told = ["bench", "--home", tmp_path, "--release", talkative_release(), "--base", talkative_base()]
    more = ["--reports", 2, "--tokens", 8, "--cpu", "--json"]
    result = CliRunner().invoke(app, [*map(str, told + more)], catch_exceptions=False)
    value = json.loads(result.stdout)
    assert (value["device"], value["dtype"], value["batch"], value["threads"]) == ("CPU", "float32", 2, 1)
    assert 0 < value["tokens_per_report"] <= 8
    assert value["seconds_per_report"] * value["tokens_per_s_1"] == pytest.approx(value["tokens_per_report"])
    assert value["tokens_per_s_batch"] > 0 and value["first_token_s"] > 0
    limit = value["memory_bandwidth_bytes_per_s"] / value["weights_bytes"]
    assert value["bandwidth_limit_tokens_per_s"] == limit
    shapes = tensor_shapes(talkative_base())
    read = [n for n in shapes if n == "lm_head.weight" or n.startswith("model.language_model.layers")]
    adapted = value["weights_bytes"] - 4 * sum(math.prod(shapes[name]) for name in read)
    assert 0 < adapted < value["weights_bytes"] / 4  # the unmerged adapter and the last norm
    assert value["engine"] == "transformers"
    assert value["peak_memory_bytes"] > value["weights_bytes"] and value["merged_copy_bytes"] == 0
    text = bench_text(value)
    assert f"the memory bus allows {limit:.1f}" in text and "merged copy" not in text


def test_a_missing_card_is_one_clear_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--gpu", "--home", str(tmp_path), "--json"])
    assert result.exit_code == 1
    (gpu,) = [one for one in json.loads(result.stdout)["findings"] if one["check"] == "gpu"]
    assert gpu["state"] == "fail" and gpu["seen"].startswith("expected a graphics card (--gpu), got none")
    assert "nvidia-smi" in gpu["todo"]
