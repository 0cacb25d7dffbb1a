"""A merged copy answers as base and adapter do, is made whole or not at all, and changes nothing else."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from client.serving.merging import merge_bytes, merge_release, merged_name
from client.serving.source import load_source, version_of
from common.errors import ServingRefused
from tests.client.serving.hosting import png
from tests.client.serving.models import (
    PLAN,
    ask,
    decoder,
    talkative_base,
    talkative_release,
    talkative_source,
)
from tests.client.serving.test_decoding import drain


def contents(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in folder.iterdir()}


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_a_merged_copy_answers_the_same_and_changes_nothing_else(tmp_path: Path) -> None:
    before = contents(talkative_base(), talkative_release())
    source = talkative_source(merged=tmp_path / "merged")
    model, words, release = load_source(source, PLAN)
    plain, _, _ = load_source(talkative_source(), PLAN)
    merged, unmerged = decoder(model, words, max_batch=1), decoder(plain, words, max_batch=1)
    for seed in range(4):
        merged.submit(seed, ask(seed))
        unmerged.submit(seed, ask(seed))
    one, other = drain(merged), drain(unmerged)
    assert [one[i].token_ids for i in range(4)] == [other[i].token_ids for i in range(4)]
    for i in range(4):
        np.testing.assert_allclose(one[i].logprobs, other[i].logprobs, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert any("lora" in name for name, _ in plain.named_parameters())
    assert version_of(release, version=4).label.startswith(release.study.study.id)
    assert before == contents(talkative_base(), talkative_release())
    (copy,) = copies(tmp_path / "merged")
    weights = (copy / "model.safetensors").stat()
    assert 0 <= weights.st_size - merge_bytes(talkative_base()) < 100_000
    assert merge_release(release, base=talkative_base(), into=tmp_path / "merged") == copy
    assert (copy / "model.safetensors").stat().st_ino == weights.st_ino  # found, checked, not made again


def test_a_damaged_copy_and_what_a_killed_process_left_are_made_again(tmp_path: Path) -> None:
    release = talkative_source().opened()
    copy = merge_release(release, base=talkative_base(), into=tmp_path)
    whole = contents(copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    left = tmp_path / f".{copy.name}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert merge_release(release, base=talkative_base(), into=tmp_path) == copy
    assert contents(copy) == whole and copies(tmp_path) == [copy]


def test_the_two_copies_used_last_are_kept(tmp_path: Path) -> None:
    one, two, three = (talkative_source(seed).opened() for seed in (1, 2, 3))
    names = [tmp_path / merged_name(release) for release in (one, two, three)]
    for release, copy in zip((one, two), names, strict=False):
        merge_release(release, base=talkative_base(), into=tmp_path)
        os.utime(copy, (1, 1 + names.index(copy)))
    merge_release(one, base=talkative_base(), into=tmp_path)  # used again: the other one is older now
    merge_release(three, base=talkative_base(), into=tmp_path)
    assert copies(tmp_path) == sorted([names[0], names[2]])


def test_a_full_disk_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, 1 << 20, 0))
    with pytest.raises(ServingRefused, match=r"GB free for a copy of the model, got 0\.0 GB"):
        merge_release(talkative_source().opened(), base=talkative_base(), into=tmp_path)
    assert copies(tmp_path) == []


def command(name: str, home: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "client.cli", name, "--home", str(home), "--release", str(talkative_release()),
        "--base", str(talkative_base()), *more,
    ]  # fmt: skip


def served(home: Path, *more: str) -> list[dict[str, Any]]:
    """Serve, ask about three pictures, and return what came."""
    options = ("--no-guard", "--no-page", "--open", "--port", "0", *more)
    with subprocess.Popen(command("serve", home, *options), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"on (http://\S+)", line)))
        answers = [httpx.post(f"{url}v1/report", content=png(n), timeout=300).json() for n in range(3)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    return answers


@pytest.mark.slow
def test_served_merged_and_unmerged_answers_are_the_same(tmp_path: Path) -> None:
    before = contents(talkative_base(), talkative_release())
    plain, merged = served(tmp_path / "plain"), served(tmp_path / "merged", "--merge")
    assert [one["text"] for one in merged] == [one["text"] for one in plain]
    for one, other in zip(merged, plain, strict=True):
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-4)
        assert one["model"] == other["model"]
    assert not (tmp_path / "plain" / "cache").exists()
    assert len(copies(tmp_path / "merged" / "cache" / "merged")) == 1
    assert before == contents(talkative_base(), talkative_release())


@pytest.mark.slow
def test_a_kill_in_the_middle_of_merging_leaves_no_copy_and_the_next_start_makes_one(tmp_path: Path) -> None:
    release = talkative_source().opened()
    folder = tmp_path / "cache" / "merged"
    copy = folder / merged_name(release)
    staging = folder / f".{copy.name}.partial"
    told = command("bench", tmp_path, "--merge", "--reports", "1", "--tokens", "8", "--json")
    for begun in (staging, staging / "model.safetensors"):
        with subprocess.Popen(told, stdout=subprocess.DEVNULL) as process:
            while not begun.exists():
                assert process.poll() is None
                time.sleep(0.001)
            process.kill()
        assert staging.exists() and not copy.exists()
    done = subprocess.run(told, capture_output=True, text=True, check=True)
    assert f'"merged_copy_bytes": {merge_bytes(talkative_base())}' in done.stdout
    assert copies(folder) == [copy]
    fresh = merge_release(release, base=talkative_base(), into=tmp_path / "fresh")
    assert {p.name: p.read_bytes() for p in fresh.iterdir()} == {
        p.name: p.read_bytes() for p in copy.iterdir()
    }
