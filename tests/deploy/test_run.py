"""Local runs from study and data to result, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.canonical import sha256_hex
from common.model.tiny import tiny_base_directory

Start = Callable[..., "subprocess.Popen[str]"]
MakeStudy = Callable[..., Path]


def _finish(process: subprocess.Popen[str], timeout_s: float = 240.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def _base_hashes() -> dict[str, str]:
    return {p.name: sha256_hex(p.read_bytes()) for p in sorted(tiny_base_directory().iterdir())}


def _final_adapter(out: Path) -> bytes:
    return (out / "release" / "adapter_model.safetensors").read_bytes()


def test_a_private_study_runs_from_init_to_result(
    small_data: Path, small_study: MakeStudy, tmp_path: Path, fedrad_local: Start
) -> None:
    before = _base_hashes()
    out = tmp_path / "out"
    study = small_study("consortium")
    code, stdout, stderr = _finish(fedrad_local("run", study, "--data", small_data, "--out", out, "--json"))
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result == json.loads((out / "result.json").read_text())
    assert set(result) == {
        "study", "engine", "sites", "rounds", "seconds", "metrics", "privacy", "traffic", "ledger", "release",
        "report",
    }  # fmt: skip
    metrics = result["metrics"]
    for name in ("base", "federated", "federated_shuffled_images", "pooled"):
        assert {"finding_f1", "rouge_l", "exact_match", "n"} <= set(metrics[name])
    assert set(metrics["local"]) == {"north", "east", "south", "west"}
    privacy = result["privacy"]
    assert privacy["release_epsilon"] <= 8.0 < max(privacy["site_epsilon"].values()) <= 16.0
    assert privacy["delta"] <= 1 / (10 * 400)
    traffic = result["traffic"]
    for way in ("up", "down"):
        assert abs(traffic[f"bytes_{way}_per_site_round"] / traffic["adapter_bytes"] - 1) < 0.02
    ledger = result["ledger"]
    assert ledger["verified"] is True and ledger["size"] > result["rounds"] and len(ledger["root"]) == 64
    assert _base_hashes() == before
    page = (out / "report.html").read_text()
    assert "<script" not in page and not re.search(r"(src|href)=.https?:", page)


def test_a_run_killed_in_mid_round_ends_with_the_same_adapter(
    small_data: Path, small_study: MakeStudy, tmp_path: Path, fedrad_local: Start
) -> None:
    study = small_study("consortium", rounds=6)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("--data", small_data, "--no-compare", "--out")
    code, _, stderr = _finish(fedrad_local("run", study, *arguments, whole))
    assert code == 0, stderr
    for wanted_round in (1, 3):
        process = fedrad_local("run", study, *arguments, killed)
        log = killed / "server" / "log.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if log.is_file() and log.read_text().count('"event": "round"') > wanted_round:
                time.sleep(0.15)  # into the round that follows
                break
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    # Keys differ between directories, so the studies do; the seeded draws and noise do not.
    code, _, stderr = _finish(fedrad_local("run", study, *arguments, killed))
    assert code == 0, stderr
    assert _final_adapter(killed) == _final_adapter(whole)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["round"] for e in lines if e["event"] == "round"] == list(range(6))


def test_an_interrupted_run_says_that_it_can_go_on(
    small_data: Path, small_study: MakeStudy, tmp_path: Path, fedrad_local: Start
) -> None:
    out = tmp_path / "out"
    process = fedrad_local("run", small_study(rounds=400), "--data", small_data, "--out", out, "--no-compare")
    log = out / "server" / "log.jsonl"
    until = time.monotonic() + 120
    while not (log.is_file() and '"event": "round"' in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, stderr = _finish(process)
    assert code == 130
    assert "interrupted; the same command goes on" in stderr


def test_another_study_in_the_same_directory_is_refused(
    small_data: Path, small_study: MakeStudy, tmp_path: Path, fedrad_local: Start
) -> None:
    out = tmp_path / "out"
    arguments = ("--data", small_data, "--out", out, "--no-compare")
    assert _finish(fedrad_local("run", small_study(rounds=1), *arguments))[0] == 0
    code, _, stderr = _finish(fedrad_local("run", small_study(rounds=2), *arguments))
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: RunDirectoryBusy:")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("sampling_rate", "sampling_rat", "unknown key; did you mean 'sampling_rate'?"),
        ('mode = "plain"', 'mode = "plane"', "expected one of consortium, local, plain, got 'plane'"),
        ("min_sites = 3", "min_sites = 9", "expected at most the number of sites (4), got 9"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused_by_line(
    small_data: Path,
    small_study: MakeStudy,
    tmp_path: Path,
    fedrad_local: Start,
    old: str,
    new: str,
    expected: str,
) -> None:
    study = small_study()
    study.write_text(study.read_text().replace(old, new, 1))
    code, stdout, stderr = _finish(
        fedrad_local("run", study, "--data", small_data, "--out", tmp_path / "out")
    )
    assert (code, stdout) == (1, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ManifestInvalid:") and "line " in line and expected in line
    assert not (tmp_path / "out").exists()


def test_missing_data_names_the_site(
    small_data: Path, small_study: MakeStudy, tmp_path: Path, fedrad_local: Start
) -> None:
    study = small_study()
    study.write_text(study.read_text().replace('id = "west"', 'id = "northwest"'))
    code, _, stderr = _finish(fedrad_local("run", study, "--data", small_data, "--out", tmp_path / "out"))
    assert code == 1
    assert "DataInsufficient" in stderr and "northwest" in stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_both_engines_end_with_the_same_bytes(
    small_data: Path, small_study: MakeStudy, tmp_path: Path, fedrad_local: Start
) -> None:
    study = small_study("consortium", rounds=20)
    arguments = ("--data", small_data, "--no-compare")
    for engine in ("inprocess", "flower"):
        process = fedrad_local("run", study, *arguments, "--out", tmp_path / engine, "--engine", engine)
        code, _, stderr = _finish(process, timeout_s=1500)
        assert code == 0, stderr
    assert _final_adapter(tmp_path / "inprocess") == _final_adapter(tmp_path / "flower")
