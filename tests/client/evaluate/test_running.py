"""An evaluation from a release and prepared data to figures and a page: complete, resumable, refusing."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.data.instructions import local_endpoint
from client.evaluate.drafts import Journal
from client.evaluate.running import evaluate
from client.evaluate.scores import METRICS
from client.evaluate.settings import Settings
from common.config import Study
from common.errors import BaseHashMismatch, EvaluationRefused, SignatureInvalid
from common.model.lora import initial_vector
from common.model.manifest import hash_base
from common.model.release import write_release
from common.model.tiny import tiny_base_directory
from deploy.local.synthetic import write_synthetic_sites
from tests.client.evaluate.judge_server import judge_server
from tests.common.model.test_release import KEY, study


def whole_study() -> Study:
    made = study()
    return replace(made, base=replace(made.base, files=hash_base(tiny_base_directory())))


def write(directory: Path, *, noise: float, round: int = 2) -> Path:
    """The tiny base's own projector, disturbed by `noise`, as a release."""
    made = whole_study()
    vector = initial_vector(tiny_base_directory(), made.adapter)
    disturbed = vector + np.float32(noise) * np.random.default_rng(1).standard_normal(
        vector.size, dtype=np.float32
    )
    write_release(directory, made, disturbed, KEY, round=round, release_epsilon=7.5, card="# A model\n")
    return directory


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two releases and a small site whose scanner the tiny base can read."""
    folder = tmp_path_factory.mktemp("given")
    write(folder / "good", noise=0.0)
    write(folder / "bad", noise=0.3, round=1)
    write_synthetic_sites(folder / "data", sites=["north"], patients={"north": 90}, seed=3)
    return folder


def settings(given: Path, out: Path, **changes: object) -> Settings:
    base = Settings(
        release=given / "good",
        data=given / "data" / "north",
        out=out,
        split="train",
        limit=24,
        resamples=100,
        batch_size=8,
        operator_key=KEY.public,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def length_ratio(drafts: Sequence[str], references: Sequence[str], weights: Path | None) -> list[float]:
    """A site's own metric, for `--metric`; a weights folder, where given, holds its scale."""
    scale = float((weights / "scale").read_text()) if weights else 1.0
    return [
        scale * min(len(d), len(r)) / max(len(d), len(r), 1) for d, r in zip(drafts, references, strict=True)
    ]


def test_one_run_gives_scores_controls_comparison_and_a_page(given: Path, tmp_path: Path) -> None:
    (tmp_path / "scale").write_text("0.5")
    groups = tmp_path / "groups.csv"
    lines = (given / "data" / "north" / "pairs.jsonl").read_text().splitlines()
    patients = sorted({json.loads(line)["patient"] for line in lines})
    rows = [f"{patient},{'MF'[at % 2]},50" for at, patient in enumerate(patients)]
    groups.write_text("\n".join(["patient,sex,age", *rows]) + "\n")
    with judge_server(break_every=11) as (url, _):
        result = evaluate(
            settings(
                given,
                tmp_path / "out",
                against=given / "bad",
                groups=groups,
                retrieval=5,
                judge_name="fake",
                ask=local_endpoint(url, "fake"),
                metrics={"length_ratio": f"{__name__}:length_ratio"},
                weights=tmp_path,
                examples=2,
                limit=36,
            ),
            progress=quiet,
        )
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["data"]["studies"] == 36 and result["release"]["round"] == 2
    scores, shuffled = result["scores"], result["shuffled_images"]
    for name in METRICS:
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
        assert scores[name]["recommended"] is METRICS[name].recommended
    assert scores["finding_f1"]["value"] > shuffled["finding_f1"] + 0.2
    assert scores["length_ratio"]["value"] <= 0.5
    found = result["against"]["comparison"]["finding_f1"]
    assert found["difference"] > 0.1 and found["p"] < 0.05
    assert result["judge"]["notices_negation"] == {"errors": True, "crimson": True}
    assert sum(result["judge"]["failures"].values()) > 0
    assert scores["judge_crimson"]["value"] > result["against"]["scores"]["judge_crimson"]["value"]
    assert {(g["kind"], g["name"]) for g in result["subgroups"]} == {("sex", "female"), ("sex", "male")}
    assert result["retrieval"]["n"] == 5
    text = (tmp_path / "out" / "result.json").read_text()
    drafts = Journal(next((tmp_path / "out").glob("drafts-*-own.jsonl"))).read()
    assert not any(record["draft"] in text for record in drafts.values())  # figures only
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.replace("http-equiv", "")
    assert "answers not counted" in page and "This release against the other" in page
    for path in (tmp_path / "out").glob("*.jsonl"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_stopped_evaluation_goes_on_and_ends_the_same(given: Path, tmp_path: Path) -> None:
    whole = evaluate(settings(given, tmp_path / "whole"), progress=quiet)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("shuffled") and done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(given, tmp_path / "out"), progress=stop)
    assert not (tmp_path / "out" / "result.json").exists()
    (own,) = (tmp_path / "out").glob("drafts-*-own.jsonl")
    with own.open("ab") as handle:
        handle.write(b'{"key": "torn')
    asked: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        if "images" in what:
            asked.append(done)

    again = evaluate(settings(given, tmp_path / "out"), progress=count)
    assert asked[:2] == [24, 8]  # all own drafts and the first batch of the control were kept
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_another_evaluation_in_the_folder_is_refused(given: Path, tmp_path: Path) -> None:
    evaluate(settings(given, tmp_path / "out", limit=4), progress=quiet)
    for change in ({"limit": 5}, {"split": "test"}, {"release": given / "bad"}, {"against": given / "bad"}):
        with pytest.raises(EvaluationRefused, match="choose another --out"):
            evaluate(settings(given, tmp_path / "out", **{"limit": 4, **change}), progress=quiet)


def test_what_cannot_be_evaluated_is_refused(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EvaluationRefused, match="at least 2 studies"):
        evaluate(settings(given, out, limit=1), progress=quiet)
    with pytest.raises(SignatureInvalid):
        evaluate(settings(given, out, operator_key="0" * 63 + "1"), progress=quiet)
    with pytest.raises(EvaluationRefused, match="importable"):
        evaluate(settings(given, out, limit=4, metrics={"m": "no_such_module:f"}), progress=quiet)
    with pytest.raises(EvaluationRefused, match="NAME=module:function"):
        evaluate(settings(given, out, limit=4, metrics={"rouge_l": "a:b"}), progress=quiet)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"study": "s", "question": "q", "answer": "no"}\n')
    with pytest.raises(EvaluationRefused, match="answers no questions"):
        evaluate(settings(given, tmp_path / "asked", limit=4, questions=questions), progress=quiet)
    with pytest.raises(EvaluationRefused, match="expected a file"):
        evaluate(settings(given, out, limit=4, questions=tmp_path / "absent"), progress=quiet)
    (out / next(out.glob("drafts-*-own.jsonl")).name).write_text("no record\n")
    with pytest.raises(EvaluationRefused, match="expected a record"):
        evaluate(settings(given, out, limit=4), progress=quiet)
    with pytest.raises(BaseHashMismatch):
        other = tmp_path / "base"
        other.mkdir()
        for path in tiny_base_directory().iterdir():
            data = path.read_bytes()
            (other / path.name).write_bytes(
                data[:-2] + b" \n" if path.name == "tokenizer_config.json" else data
            )
        evaluate(settings(given, tmp_path / "o2", base=other), progress=quiet)


def test_questions_are_asked_where_the_base_says_how(given: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_directory(), base)
    prompts = json.loads((base / "fedrad.json").read_text())
    asked = prompts["prompt"].replace("{indication}", "{question}")
    (base / "fedrad.json").write_text(json.dumps(prompts | {"question": asked}))
    made = study()
    made = replace(made, base=replace(made.base, files=hash_base(base)))
    vector = initial_vector(base, made.adapter)
    write_release(tmp_path / "r", made, vector, KEY, round=2, release_epsilon=7.5, card="# A model\n")
    lines = (given / "data" / "north" / "pairs.jsonl").read_text().splitlines()
    studies = [pair["study"] for pair in map(json.loads, lines) if pair["split"] == "train"]
    questions = tmp_path / "questions.jsonl"
    kinds = ({"question": "Edema?", "answer": "no"}, {"question": "What is seen?", "answer": "edema"})
    questions.write_text(
        "".join(json.dumps({"study": name, **kind}) + "\n" for name in studies for kind in kinds)
    )
    result = evaluate(
        settings(given, tmp_path / "out", release=tmp_path / "r", base=base, limit=6, questions=questions),
        progress=quiet,
    )
    found = result["questions"]
    assert (found["closed"], found["open"]) == (6, 6)
    assert set(found["scores"]) == {
        "vqa_closed", "vqa_open_recall", "vqa_open_f1", "vqa_closed_llava_med_substring"
    }  # fmt: skip
    assert "Questions (6 closed, 6 open)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_command_evaluates_and_prints_one_document(given: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "client.cli", "evaluate", "--release", str(given / "good"),
        "--data", str(given / "data" / "north"), "--out", str(tmp_path / "out"), "--limit", "6",
        "--split", "train", "--operator-key", KEY.public, "--home", str(tmp_path / "none"), "--json",
    ]  # fmt: skip
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["data"]["studies"] == 6
    ran = subprocess.run(
        [*command, "--judge-url", "http://10.0.0.8/v1"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert ran.returncode == 1 and "loopback" in ran.stderr
