"""`fedrad-site evaluate`: what a release is worth on this site's own held-out studies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.terminal import answer, bars

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Home = Annotated[Path, typer.Option("--home", envvar="FEDRAD_SITE_HOME", help="This site's directory.")]
_DEFAULT_HOME = Path("~/.fedrad-site").expanduser()


def evaluate_command(
    release: Annotated[Path, typer.Option("--release", help="Release directory.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for results; the same command goes on in it.")],
    data: Annotated[Path | None, typer.Option("--data", help="Prepared data; default: this site's.")] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another release to compare with.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which studies: test, validation or train.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="At most this many studies; 0 for all.")] = 0,
    base: Annotated[Path | None, typer.Option("--base", help="Base model directory, if not tiny.")] = None,
    against_base: Annotated[
        Path | None, typer.Option("--against-base", help="The other release's base, if another.")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option("--groups", help="CSV: study or patient, sex, age, scanner.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help="JSON lines: study, question, answer.")
    ] = None,
    retrieval: Annotated[
        int, typer.Option(min=0, help="Match this many reports and images by likelihood; 0 for none.")
    ] = 0,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", help="OpenAI-compatible endpoint on this machine.")
    ] = None,
    judge_model: Annotated[str, typer.Option("--judge-model", help="The judge's model name.")] = "judge",
    judge_remote: Annotated[
        bool, typer.Option("--judge-remote", help="Allow an https judge elsewhere: reports are sent to it.")
    ] = False,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="NAME=module:function of this site's own Python.")
    ] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Folder handed to --metric.")] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap and swap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and the shuffled images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Studies written at a time.")] = 32,
    examples: Annotated[
        int, typer.Option(min=0, help="Show this many reports with their drafts on the page.")
    ] = 0,
    operator_key: Annotated[
        str | None, typer.Option("--operator-key", help="Whose release it must be; default: this site's.")
    ] = None,
    home: Home = _DEFAULT_HOME,
    allow_unprotected: Annotated[
        bool, typer.Option(help="Evaluate a release that has no differential privacy.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a release on held-out studies: findings, wording, controls, groups, against another release."""
    from client.evaluate.running import evaluate
    from client.evaluate.settings import Settings
    from common.errors import EvaluationRefused

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        torch.set_num_threads(1)
    if (home / "site.json").is_file():
        from client.home import open_home

        opened = open_home(home)
        operator_key = operator_key or opened.operator_key
        data = data or opened.data
    if data is None:
        raise EvaluationRefused("--data: expected prepared data, or an enrolled --home")
    if operator_key is None:
        print("warning: no --operator-key and no enrolled --home: who signed is not checked", file=sys.stderr)
    ask = None
    if judge_url:
        from client.data.instructions import local_endpoint

        ask = local_endpoint(judge_url, judge_model, allow_remote=judge_remote)
    settings = Settings(
        release=release,
        data=data,
        out=out,
        against=against,
        split=split,
        limit=limit,
        base=base,
        against_base=against_base,
        groups=groups,
        questions=questions,
        retrieval=retrieval,
        judge_name=judge_model if judge_url else "",
        ask=ask,
        metrics=_named(metric or []),
        weights=weights,
        resamples=resamples,
        seed=seed,
        batch_size=batch_size,
        examples=examples,
        operator_key=operator_key,
        allow_unprotected=allow_unprotected,
    )
    with bars() as display:
        result = evaluate(settings, progress=display.step)

    def text() -> str:
        lines = [f"{result['data']['studies']} studies of {result['data']['patients']} patients"]
        for name, entry in result["scores"].items():
            note = (
                "" if entry["recommended"] else "  (not to decide by)" if name in result["verdicts"] else ""
            )
            lines.append(f"{name:<26} {entry['value']:.3f}  [{entry['low']:.3f}, {entry['high']:.3f}]{note}")
        lines.append(f"report: {out / 'report.html'}")
        return "\n".join(lines)

    answer(result | {"report": str(out / "report.html")}, as_json=as_json, text=text)


def _named(metrics: list[str]) -> dict[str, str]:
    from common.errors import EvaluationRefused

    named = {}
    for entry in metrics:
        name, separator, target = entry.partition("=")
        if not separator or not name.isidentifier():
            raise EvaluationRefused(f"--metric: expected NAME=module:function, got {entry[:80]!r}")
        named[name] = target
    return named
