"""One evaluation of a release on a site's held-out studies, from drafts to `result.json` and `report.html`.

    <out>/run.json                settings; another evaluation is refused in the same folder
    <out>/drafts-….jsonl          what each adapter wrote, own images and shuffled ones (0600)
    <out>/judged-….jsonl          a judge's verdicts (0600)
    <out>/result.json             figures, without any report's text
    <out>/report.html             the same to read

Guarantees: release and base are verified before anything runs; a stopped evaluation goes on with the same
command; results appear whole. The figures are the site's own and are exact: they are not for publication as
they are (`federated.py` makes noised ones).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from client.data.store import Pair, read_pairs
from client.evaluate.controls import negation_control, verdicts
from client.evaluate.drafts import Journal, Progress, write_drafts
from client.evaluate.intervals import Scores, bootstrap, compare, patient_sums
from client.evaluate.judge import Ask
from client.evaluate.judged import judge_studies, judge_summary, judge_tables
from client.evaluate.questions import Question, question_template, read_questions, tabulate_answers
from client.evaluate.retrieval import likelihoods, retrieval_scores
from client.evaluate.scores import METRICS, Tables, per_finding, score, tabulate
from client.evaluate.subgroups import LEAST_PATIENTS, group_studies, read_groups
from common.canonical import canonical_json
from common.errors import BaseInvalid, EvaluationRefused
from common.files import write_atomic
from common.model.manifest import verify_base
from common.model.release import Release, open_release

if TYPE_CHECKING:
    from client.features import Features

_QUESTION_TOKENS = 32


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


@dataclass(frozen=True)
class _Written:
    """One release's drafts and what was counted on them; rows are the held-out studies."""

    release: Release
    drafts: list[str]
    tables: Tables
    shuffled: Scores
    extra: dict[str, Any]


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
    result = _result(settings, pairs, runs)
    result["seconds"] = round(time.monotonic() - started, 1)
    from client.evaluate.report import render

    examples = _examples(settings, pairs, runs[0])
    write_atomic(settings.out / "report.html", render(result, examples).encode(), mode=0o600)
    write_atomic(settings.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


# --- running ----------------------------------------------------------------------------------------------


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
    with (settings.data / "pairs.jsonl").open("rb") as handle:
        data = hashlib.file_digest(handle, "sha256").hexdigest()
    settings.out.mkdir(parents=True, exist_ok=True)
    run = canonical_json(
        {
            "adapters": [release.note.adapter_sha256 for release in releases],
            "data": data,
            "split": settings.split,
            "limit": settings.limit,
            "judge": settings.judge_name,
        }
    )
    path = settings.out / "run.json"
    if path.is_file() and path.read_bytes() != run:
        raise EvaluationRefused(f"{path}: expected this evaluation, got another; choose another --out")
    write_atomic(path, run)


def _base(release: Release, given: Path | None) -> Path:
    from common.model.tiny import known_base

    directory = known_base(release.study.base.name, given)
    if directory is None:
        raise BaseInvalid(f"--base: expected the directory of base {release.study.base.name!r}, got none")
    verify_base(directory, release.study.base.files)
    return directory


def _run(
    settings: Settings, release: Release, base: Path, pairs: Sequence[Pair], progress: Progress
) -> _Written:
    import torch

    from client.evaluation import shuffled
    from client.features import load_features
    from common.model.loading import load_adapted

    study, name = release.study, release.note.adapter_sha256[:12]
    adapted = load_adapted(base, study.adapter)
    adapted.write_vector(release.adapter)
    features = load_features(
        adapted.model,
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
            adapted,
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
            settings, adapted, study.training.max_tokens, features, truths, progress
        )
    if settings.questions:
        asked = read_questions(settings.questions)
        extra["questions"] = _questions(settings, asked, adapted, name, pairs, features, progress)
    return _Written(release, drafts, tables, _floats(score(mixed)), extra)


def _retrieval(
    settings: Settings,
    adapted: Any,
    max_tokens: int,
    features: Features,
    truths: Sequence[str],
    progress: Progress,
) -> dict[str, float]:
    from common.model.prompts import prompt_template

    count = min(settings.retrieval, len(truths))
    matrix = likelihoods(
        adapted.model,
        adapted.tokenizer,
        features=features.rows(range(count)),
        reports=truths[:count],
        template=prompt_template(adapted.directory),
        max_tokens=max_tokens,
        batch_size=settings.batch_size,
        progress=lambda done, total: progress("retrieval", done, total),
    )
    return retrieval_scores(matrix, truths[:count])


def _questions(
    settings: Settings,
    asked: Sequence[Question],
    adapted: Any,
    name: str,
    pairs: Sequence[Pair],
    features: Features,
    progress: Progress,
) -> dict[str, Any]:
    template = question_template(adapted.directory)
    row_of = {pair.study: row for row, pair in enumerate(pairs)}
    asked = [question for question in asked if question.study in row_of]
    if not asked:
        raise EvaluationRefused(
            f"{settings.questions}: expected questions about the held-out studies, got none"
        )
    rows = [row_of[question.study] for question in asked]
    answers = write_drafts(
        adapted,
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
    return {"closed": closed, "open": len(asked) - closed, "scores": _scores(tables, settings)}


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


# --- results ----------------------------------------------------------------------------------------------


def _result(settings: Settings, pairs: Sequence[Pair], runs: Sequence[_Written]) -> dict[str, Any]:
    patients = [pair.patient for pair in pairs]
    truths = [pair.findings for pair in pairs]
    sums = [patient_sums(run.tables, patients) for run in runs]
    control = negation_control(truths)
    first = runs[0]
    scores = _scores(sums[0], settings)
    plain = {name: entry["value"] for name, entry in scores.items()}
    result: dict[str, Any] = {
        "schema": 1,
        "release": _about(first.release),
        "data": {"split": settings.split, "studies": len(pairs), "patients": len(set(patients))},
        "resamples": settings.resamples,
        "scores": scores,
        "shuffled_images": first.shuffled,
        "negation_control": control,
        "verdicts": verdicts(control, first.shuffled, plain),
        "findings": per_finding(first.tables["finding_f1"]),
        "subgroups": _subgroups(settings, pairs, first.tables),
        **first.extra,
    }
    if len(runs) > 1:
        other = _scores(sums[1], settings)
        result["against"] = {
            "release": _about(runs[1].release),
            "scores": other,
            "shuffled_images": runs[1].shuffled,
            "comparison": compare(sums[0], sums[1], resamples=settings.resamples, seed=settings.seed),
            **runs[1].extra,
        }
    return result


def _scores(sums: Tables, settings: Settings) -> dict[str, dict[str, Any]]:
    values = _floats(score(sums))
    intervals = bootstrap(sums, resamples=settings.resamples, seed=settings.seed)
    return {
        name: {
            "value": value,
            "low": intervals[name][0],
            "high": intervals[name][1],
            "recommended": name in METRICS and METRICS[name].recommended,
        }
        for name, value in values.items()
    }


def _subgroups(settings: Settings, pairs: Sequence[Pair], tables: Tables) -> list[dict[str, Any]]:
    table = read_groups(settings.groups) if settings.groups else {}
    patients = [pair.patient for pair in pairs]
    groups = group_studies([p.study for p in pairs], patients, [p.view for p in pairs], table)
    found: list[dict[str, Any]] = []
    for group in groups:
        entry: dict[str, Any] = {"kind": group.kind, "name": group.name, "suppressed": group.suppressed}
        if group.suppressed:
            entry |= {
                "patients": None,
                "note": f"under {LEAST_PATIENTS} patients, or hidden with one that is",
            }
        else:
            rows = list(group.rows)
            part = {name: values[rows] for name, values in tables.items()}
            entry |= {"patients": group.patients, "studies": len(rows)}
            entry["scores"] = _scores(patient_sums(part, [patients[row] for row in rows]), settings)
        found.append(entry)
    return found


def _about(release: Release) -> dict[str, Any]:
    note = release.note
    return {
        "study": note.study,
        "round": note.round,
        "adapter": note.adapter_sha256,
        "mode": note.mode,
        "release_epsilon": note.release_epsilon or None,
        "base": release.study.base.name,
    }


def _examples(settings: Settings, pairs: Sequence[Pair], run: _Written) -> list[dict[str, str]]:
    """The worst and the best drafts, for the page; report text, so only when asked for."""
    if not settings.examples:
        return []
    values = METRICS["statement_f1"].combine(run.tables["statement_f1"])
    order = np.argsort(values, kind="stable")
    half = (settings.examples + 1) // 2
    rows = [*order[:half], *order[::-1][: settings.examples - half]]
    return [{"truth": pairs[row].findings, "draft": run.drafts[row]} for row in rows]


def _floats(values: Mapping[str, Any]) -> Scores:
    return {name: float(value) for name, value in values.items()}
