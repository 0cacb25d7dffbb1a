"""One evaluation of a release on a site's held-out studies, from drafts to `result.json` and `report.html`.

    <out>/run.json                settings; another evaluation is refused in the same folder
    <out>/drafts-….jsonl          what each adapter wrote, own images and shuffled ones (0600)
    <out>/judged-….jsonl          a judge's verdicts (0600)
    <out>/result.json             figures, without any report's text
    <out>/report.html             the same to read

Guarantees: release and base are verified before anything is written; what runs is loaded as for serving
(float32 on a CPU, float16 or NF4 on a GPU, which was not run); a stopped evaluation goes on with the same
command; results appear whole. The figures are the site's own and are exact: they are not for publication as
they are (`federated.py` makes noised ones).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from client.data.store import Pair, read_pairs
from client.evaluate.drafts import Journal, Progress, write_drafts
from client.evaluate.intervals import patient_sums
from client.evaluate.judged import judge_studies, judge_summary, judge_tables
from client.evaluate.questions import Question, question_template, read_questions, tabulate_answers
from client.evaluate.results import Written, examples_of, floats, result_of, scores_of
from client.evaluate.retrieval import likelihoods, retrieval_scores
from client.evaluate.scores import METRICS, Tables, score, tabulate
from client.evaluate.settings import Settings
from common.canonical import canonical_json
from common.errors import BaseInvalid, EvaluationRefused
from common.files import write_atomic
from common.model.release import Release, open_release

if TYPE_CHECKING:
    from client.features import Features

_QUESTION_TOKENS = 32


@dataclass(frozen=True)
class _Loaded:
    """A release on its base, on the device that this machine has."""

    model: Any
    tokenizer: Any
    directory: Path
    device: str


def evaluate(settings: Settings, *, progress: Progress) -> dict[str, Any]:
    """Run or resume an evaluation; returns what `result.json` holds.

    Raises EvaluationRefused, ReleaseInvalid, SignatureInvalid, BaseHashMismatch, DatasetInvalid.
    """
    started = time.monotonic()
    pairs = _held_out(settings)
    releases = [
        open_release(path, operator_key=settings.operator_key, allow_unprotected=settings.allow_unprotected)
        for path in (settings.release, settings.against)
        if path
    ]
    _enter(settings, releases)
    bases = (settings.base, settings.against_base or settings.base)
    runs = [
        _run(settings, release, _base(release, base), pairs, progress)
        for release, base in zip(releases, bases, strict=False)
    ]
    result = result_of(settings, pairs, runs)
    result["seconds"] = round(time.monotonic() - started, 1)
    from client.evaluate.report import render

    examples = examples_of(settings, pairs, runs[0])
    write_atomic(settings.out / "report.html", render(result, examples).encode(), mode=0o600)
    write_atomic(settings.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _held_out(settings: Settings) -> list[Pair]:
    pairs = [pair for pair in read_pairs(settings.data) if pair.split == settings.split and pair.findings]
    pairs.sort(key=lambda pair: hashlib.sha256(pair.study.encode()).digest())
    chosen = pairs[: settings.limit] if settings.limit else pairs
    if len(chosen) < 2:
        raise EvaluationRefused(
            f"{settings.data}: expected at least 2 studies with findings in split {settings.split!r}, "
            f"got {len(chosen)}"
        )
    return chosen


def _enter(settings: Settings, releases: Sequence[Release]) -> None:
    """Keep the settings that decide the drafts; another evaluation in the folder is refused."""
    settings.out.mkdir(parents=True, exist_ok=True)
    run = canonical_json(
        {
            "adapters": [release.note.adapter_sha256 for release in releases],
            "data": _sha256(settings.data / "pairs.jsonl"),
            "questions": _sha256(settings.questions) if settings.questions else "",
            "seed": settings.seed,
            "split": settings.split,
            "limit": settings.limit,
            "judge": settings.judge_name,
        }
    )
    path = settings.out / "run.json"
    if path.is_file() and path.read_bytes() != run:
        raise EvaluationRefused(f"{path}: expected this evaluation, got another; choose another --out")
    write_atomic(path, run)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise EvaluationRefused(f"{path}: expected a file, got {type(error).__name__}") from error


def _base(release: Release, given: Path | None) -> Path:
    from common.model.tiny import known_base

    directory = known_base(release.study.base.name, given)
    if directory is None:
        raise BaseInvalid(f"--base: expected the directory of base {release.study.base.name!r}, got none")
    return directory


def _run(
    settings: Settings, release: Release, base: Path, pairs: Sequence[Pair], progress: Progress
) -> Written:
    import torch

    from client.evaluation import shuffled
    from client.features import load_features
    from client.serving.launch import engine_plan
    from client.serving.source import ReleaseSource, load_source

    study, name = release.study, release.note.adapter_sha256[:12]
    source = ReleaseSource(
        release.directory,
        base,
        operator_key=settings.operator_key,
        allow_unprotected=settings.allow_unprotected,
    )
    plan = engine_plan(source, max_batch=settings.batch_size)
    model, tokenizer, _ = load_source(source, plan)
    loaded = _Loaded(model, tokenizer, base, plan.device)
    features = load_features(
        model,
        [settings.data / pair.images[0] for pair in pairs],
        base=base,
        base_files=study.base.files,
        cache=settings.out / "features",
        progress=progress,
    )
    other = shuffled(torch.arange(len(pairs)), seed=settings.seed).tolist()
    keys = [pair.study for pair in pairs]
    indications = [pair.indication for pair in pairs]

    def write(images: Sequence[int], kind: str) -> list[str]:
        return write_drafts(
            model,
            tokenizer,
            device=plan.device,
            features=lambda rows: features.rows([images[row] for row in rows]),
            keys=keys,
            indications=indications,
            max_new_tokens=study.training.max_new_tokens,
            journal=Journal(settings.out / f"drafts-{name}-{kind}.jsonl"),
            name=f"{kind} images, round {release.note.round}",
            batch_size=settings.batch_size,
            progress=progress,
        )

    truths = [pair.findings for pair in pairs]
    drafts = write(range(len(pairs)), "own")
    tables = tabulate(drafts, truths) | _plugged(settings, drafts, truths)
    mixed = tabulate(write(other, "shuffled"), truths)
    extra: dict[str, Any] = {}
    if settings.ask:
        journal = Journal(settings.out / f"judged-{name}.jsonl")
        judged = judge_studies(settings.ask, journal, keys, drafts, truths, progress)
        tables |= judge_tables(judged)
        extra["judge"] = judge_summary(settings.judge_name, judged)
    if settings.retrieval:
        extra["retrieval"] = _retrieval(
            settings, loaded, study.training.max_tokens, features, truths, progress
        )
    if settings.questions:
        asked = read_questions(settings.questions)
        extra["questions"] = _questions(settings, asked, loaded, name, pairs, features, progress)
    return Written(release, drafts, tables, floats(score(mixed)), extra)


def _retrieval(
    settings: Settings,
    loaded: _Loaded,
    max_tokens: int,
    features: Features,
    truths: Sequence[str],
    progress: Progress,
) -> dict[str, float]:
    from common.model.prompts import prompt_template

    count = min(settings.retrieval, len(truths))
    matrix = likelihoods(
        loaded.model,
        loaded.tokenizer,
        device=loaded.device,
        features=features.rows(range(count)),
        reports=truths[:count],
        template=prompt_template(loaded.directory),
        max_tokens=max_tokens,
        batch_size=settings.batch_size,
        progress=lambda done, total: progress("retrieval", done, total),
    )
    return retrieval_scores(matrix, truths[:count])


def _questions(
    settings: Settings,
    asked: Sequence[Question],
    loaded: _Loaded,
    name: str,
    pairs: Sequence[Pair],
    features: Features,
    progress: Progress,
) -> dict[str, Any]:
    template = question_template(loaded.directory)
    row_of = {pair.study: row for row, pair in enumerate(pairs)}
    asked = [question for question in asked if question.study in row_of]
    if not asked:
        raise EvaluationRefused(
            f"{settings.questions}: expected questions about the held-out studies, got none"
        )
    rows = [row_of[question.study] for question in asked]
    answers = write_drafts(
        loaded.model,
        loaded.tokenizer,
        device=loaded.device,
        features=lambda asked: features.rows([rows[at] for at in asked]),
        keys=[f"{at}:{question.study}" for at, question in enumerate(asked)],
        indications=[question.question for question in asked],
        max_new_tokens=_QUESTION_TOKENS,
        journal=Journal(settings.out / f"answers-{name}.jsonl"),
        name="questions",
        batch_size=settings.batch_size,
        template=template,
        progress=progress,
    )
    tables = patient_sums(tabulate_answers(asked, answers), [pairs[row].patient for row in rows])
    closed = sum(question.closed for question in asked)
    return {"closed": closed, "open": len(asked) - closed, "scores": scores_of(tables, settings)}


def _plugged(settings: Settings, drafts: list[str], truths: list[str]) -> Tables:
    """Scores of the site's own metrics: `module:function(drafts, references, weights) -> one number each`."""
    tables: Tables = {}
    for name, target in settings.metrics.items():
        module, _, function = target.partition(":")
        if name in METRICS or not function:
            raise EvaluationRefused(f"--metric {name}: expected a new NAME=module:function")
        try:
            called: Callable[..., Any] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise EvaluationRefused(f"--metric {name}: expected {target} to be importable") from error
        values = np.asarray(called(drafts, truths, settings.weights), dtype=np.float64)
        if values.shape != (len(drafts),) or not np.isfinite(values).all():
            raise EvaluationRefused(f"--metric {name}: expected {len(drafts)} finite numbers")
        tables[name] = np.stack([values, np.ones(len(values))], axis=1)
    return tables
