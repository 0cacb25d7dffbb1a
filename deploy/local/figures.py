"""Finding-F1 against ε: a made-up consortium's study, trained per ε, kind of privacy and LoRA strategy.

`python -m deploy.local.figures --out docs/figures` makes synthetic hospitals, trains every point, scores it
on all held-out studies and writes `f1_epsilon.json` and `f1_epsilon.svg`. A point that is in the JSON with
the same manifest is not trained again.

Guarantees: sites and server run the functions of a real study (client/contribution.py, server/aggregation.py,
server/optimizer.py); tested to give, bit for bit, the adapter of a study over the whole protocol. Draws and
noise come from seeds in the manifest, so a point can be made again and none of them can be released.

It does not show: messages, masks, ledgers or budgets (nothing of them changes a sum), nor models of another
size or other data than those named in the JSON.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from client.contribution import local_update, noised_sum, plain_sum, round_randomness
from client.home import SiteHome
from client.models import ModelPool
from client.training import TrainingData
from common.canonical import sha256_hex
from common.config import Mode, Study
from common.errors import DataInsufficient
from common.files import write_atomic
from common.model.lora import Vector, initial_vector
from common.privacy.mechanism import ServedRound, View
from common.privacy.sampling import Csprng
from common.privacy.study_plan import plan_of
from common.schedule import active_groups, learning_rate
from common.terminal import Bars, bars, run_program
from deploy.local.compare import central_plan, train_centrally, training_parts
from deploy.local.consortium import set_up
from deploy.local.demo import PATIENTS, SITES
from deploy.local.measure import HeldOut, load_held_out, score
from server.aggregation import Collected, protect
from server.optimizer import initial_state, take_step
from server.studies import TINY, study_template

if TYPE_CHECKING:
    from common.model.loading import AdaptedModel

ROOT = Path(__file__).parents[2]
EPSILONS = (8.0, math.inf, 4.0, 2.0, 1.0)  # most telling first, for who interrupts
MAX_HELD_OUT = 400  # of a site


@dataclass(frozen=True)
class Series:
    """One line of the figure; `central` trains on the union as one site."""

    name: str
    label: str
    color: str
    marker: str
    mode: str = "consortium"
    strategy: str = "alternating"
    central: bool = False
    epsilons: tuple[float, ...] = EPSILONS


SERIES = (
    Series("consortium", "consortium (release ε), alternating", "#0072b2", "o"),
    Series("pooled", "one pooled site, alternating", "#000000", "x", central=True, epsilons=(8.0, math.inf)),
    Series("frozen-a", "consortium (release ε), frozen A", "#d55e00", "s", strategy="frozen-a"),
    # Without noise and with one local step, `local` would be the consortium's own sum.
    Series("local", "each site noises fully (site ε)", "#009e73", "^", mode="local",
           epsilons=tuple(filter(math.isfinite, EPSILONS))),
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What is trained on: prepared folders by site, and the public numbers of the study."""

    data: Path
    sites: tuple[str, ...]
    patients: int
    rounds: int
    source: dict[str, Any]


def train_federated_inprocess(
    adapted: AdaptedModel,
    study: Study,
    parts: Mapping[str, TrainingData],
    initial: Vector,
    *,
    random_bytes: Callable[[int], bytes] = os.urandom,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vector:
    """Run a study's rounds with all sites serving and no messages between them; returns the adapter."""
    vector, state = initial, initial_state(study)
    for round in range(study.rounds):
        floats, units = {}, np.zeros(initial.size, np.uint32)
        for site, data in sorted(parts.items()):
            adapted.write_vector(vector)
            csprng = round_randomness(study, site=site, round=round, seed=random_bytes(32))
            if study.privacy.mode is Mode.CONSORTIUM:
                units += noised_sum(adapted, study, data, csprng, round=round, progress=_silent)
            elif study.privacy.mode is Mode.LOCAL:
                floats[site] = local_update(
                    adapted, study, data, csprng, vector, round=round, progress=_silent
                )
            else:
                floats[site] = plain_sum(adapted, study, data, csprng, round=round, progress=_silent)
        collected = Collected(
            dict.fromkeys(parts, ""), {}, floats=floats or None, units=None if floats else units
        )
        vector, state, _ = take_step(
            study,
            vector,
            state,
            protect(study, collected, round=round).gradient,
            groups=active_groups(study, round),
            learning_rate=learning_rate(study, round),
        )
        progress(round + 1, study.rounds)
    return vector


def _silent(done: int, total: int) -> None:
    return None


# --- points -----------------------------------------------------------------------------------------------


def manifest_text(workload: Workload, series: Series, epsilon: float, seed: int) -> str:
    """Write the seeded manifest of one point; ε infinite means mode plain."""
    private = math.isfinite(epsilon)
    text = study_template(
        id="f1-against-epsilon",
        base="tiny",
        sites=workload.sites,
        mode=series.mode if private else "plain",
        rounds=workload.rounds,
        patients=workload.patients,
        release_epsilon=epsilon if private else 8.0,
        recipe=replace(TINY, strategy=series.strategy),
    )
    return f"{text}\n[testing]\nseed = {seed}\n"


def open_study(work: Path, workload: Workload, text: str) -> tuple[Study, Path, dict[str, SiteHome]]:
    """Sign a manifest below `work` as a local run does; the sites' features are shared by all points."""
    out = work / "studies" / sha256_hex(text.encode())[:16]
    shutil.rmtree(out, ignore_errors=True)  # it holds keys only, and may be an older version's
    write_atomic(out / "study.toml", text.encode())
    made = set_up(out / "study.toml", data=workload.data, out=out, base=None)
    homes = {site: replace(home, directory=work / "features" / site) for site, home in made.homes.items()}
    return made.study, made.base, homes


def train_point(
    adapted: AdaptedModel,
    study: Study,
    parts: Mapping[str, TrainingData],
    initial: Vector,
    series: Series,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> Vector:
    """Train one point: the federated loop, or the union as one site with the release's noise."""
    if not series.central:
        return train_federated_inprocess(adapted, study, parts, initial, progress=progress)
    noise = Csprng.for_test(seed).stream("pooled site")
    return train_centrally(
        adapted,
        study,
        parts,
        initial,
        denominator=study.training.denominator,
        private=study.privacy.mode is not Mode.PLAIN,
        random_bytes=lambda count: noise.words(count // 8).tobytes(),
        progress=progress,
    )


def privacy_of(study: Study, series: Series) -> dict[str, Any]:
    """State what a point's training claims: δ, ε by view and noise multipliers; empty for plain."""
    if study.privacy.mode is Mode.PLAIN:
        return {}
    plan, sites = plan_of(study), len(study.site_ids)
    if series.central:
        plan = central_plan(study)
        claim = {"release_epsilon": plan.epsilon(View.RELEASE)}
    else:
        claim = {"site_epsilon": plan.epsilon(View.SITE)}
    if study.privacy.mode is Mode.CONSORTIUM and not series.central:
        served = ServedRound(sites, plan.server_topup_sigma_units(sites))
        claim["release_epsilon"] = plan.epsilon(View.RELEASE, [served] * study.rounds)
    return {
        "delta": plan.delta, "site_noise": plan.site_noise, "release_noise": plan.release_noise, **claim,
    }  # fmt: skip


def make_points(
    path: Path, work: Path, workload: Workload, points: Sequence[tuple[Series, float, int]], display: Bars
) -> dict[str, Any]:
    """Train and score the points that `path` does not hold yet, saving after each; returns the document."""
    document = _read_document(path, workload)
    done = {(p["series"], float(p["epsilon"]), p["seed"], p["manifest_sha256"]) for p in document["points"]}
    pool = ModelPool()
    parts: dict[str, TrainingData] = {}
    held: HeldOut | None = None
    for number, (series, epsilon, seed) in enumerate(points):
        display.step("points", number, len(points))
        text = manifest_text(workload, series, epsilon, seed)
        key = (series.name, epsilon, seed, sha256_hex(text.encode()))
        if key in done:
            continue
        study, base, homes = open_study(work, workload, text)
        with pool.use(study, base) as adapted:
            parts = parts or training_parts(adapted, study, homes)
            held = held or load_held_out(
                adapted, study, homes, split="test", limit=MAX_HELD_OUT,
                progress=lambda what, done, total: None,
            )  # fmt: skip
            initial = initial_vector(base, study.adapter)
            if not document["base"]:
                document["base"] = score(adapted, study, initial, held).metrics
                document["data"]["training_patients"] = {s: len(d.patients) for s, d in parts.items()}
            started, cpu = time.monotonic(), time.process_time()
            name = f"{series.name} ε {epsilon:g} seed {seed}"

            def show(done: int, total: int, name: str = name) -> None:
                display.step(name, done, total)

            vector = train_point(adapted, study, parts, initial, series, seed=seed, progress=show)
            trained_cpu = time.process_time() - cpu
            metrics = score(adapted, study, vector, held).metrics
        point = {
            "series": series.name,
            "epsilon": epsilon if math.isfinite(epsilon) else "inf",
            "seed": seed,
            "manifest_sha256": key[3],
            "commit": _commit(),
            "privacy": privacy_of(study, series),
            "training_cpu_s": round(trained_cpu, 1),
            "seconds": round(time.monotonic() - started, 1),
            "metrics": metrics,
        }
        kept = [p for p in document["points"] if (p["series"], float(p["epsilon"]), p["seed"]) != key[:3]]
        document["points"] = [*kept, point]
        write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
        display.say(f"{name}: F1 {metrics['finding_f1']:.3f} {metrics['interval']['finding_f1']}")
    display.step("points", len(points), len(points))
    return document


def _read_document(path: Path, workload: Workload) -> dict[str, Any]:
    about = {"rounds": workload.rounds, "nominal_patients": workload.patients}
    fresh = {"data": workload.source | about, "machine": _machine(), "base": {}, "points": []}
    if not path.is_file():
        return fresh
    document: dict[str, Any] = json.loads(path.read_text())
    same = {k: v for k, v in document["data"].items() if k != "training_patients"} == fresh["data"]
    return document if same else fresh


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, one thread used"


# --- picture ----------------------------------------------------------------------------------------------


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw F1 against ε as SVG: the first seed's point with its bootstrap interval, other seeds as dots."""
    import matplotlib
    from matplotlib.figure import Figure

    places = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3, math.inf: 4.3}
    style = {"svg.fonttype": "none", "svg.hashsalt": "fedrad", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        first = min((p["seed"] for p in document["points"]), default=0)
        for at, series in enumerate(SERIES):
            shift = 0.07 * (at - (len(SERIES) - 1) / 2)
            own = sorted(
                (p for p in document["points"] if p["series"] == series.name),
                key=lambda p: float(p["epsilon"]),
            )
            shown = [p for p in own if p["seed"] == first]
            if not shown:
                continue
            xs = [places[float(p["epsilon"])] + shift for p in shown]
            ys = [p["metrics"]["finding_f1"] for p in shown]
            reach = [p["metrics"]["interval"]["finding_f1"] for p in shown]
            below = [max(0.0, y - low) for y, (low, _) in zip(ys, reach, strict=True)]
            above = [max(0.0, high - y) for y, (_, high) in zip(ys, reach, strict=True)]
            axes.errorbar(
                xs, ys, yerr=[below, above], label=series.label, color=series.color, marker=series.marker,
                markersize=6, capsize=3, linewidth=0 if series.central else 1.5, elinewidth=1,
            )  # fmt: skip
            for p in own:
                if p["seed"] != first:
                    x = places[float(p["epsilon"])] + shift
                    axes.plot(x, p["metrics"]["finding_f1"], ".", color=series.color, alpha=0.6)
        if document["base"]:
            before = document["base"]["finding_f1"]
            axes.axhline(before, color="#777777", linestyle=":", linewidth=1)
            axes.annotate("base, before training", (-0.25, before), (0, 3), textcoords="offset points",
                          color="#777777", fontsize=9)  # fmt: skip
        axes.set_xticks(list(places.values()), ["1", "2", "4", "8", "∞ (no privacy)"])
        axes.set_xlim(-0.3, 4.8)
        axes.set_xlabel(f"ε for one patient at one site, δ = 1/(10 · {document['data']['nominal_patients']})")
        axes.set_ylabel("finding-F1 on held-out studies (95 % bootstrap)")
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.07))
        figure.savefig(path, format="svg", metadata={"Date": None})


# --- command ----------------------------------------------------------------------------------------------


def synthetic_workload(work: Path, *, seed: int, quick: bool, display: Bars) -> Workload:
    """Write the made-up hospitals below `work`, as the demo does but with other patients."""
    from deploy.local.synthetic import write_synthetic_sites

    data = work / "data"
    many = dict.fromkeys(SITES, 40) if quick else None
    for site in SITES:
        if not (data / site / "pairs.jsonl").is_file():
            shutil.rmtree(data / site, ignore_errors=True)
            write_synthetic_sites(data, sites=[site], patients=many, seed=seed, progress=display.step)
    source = {"source": "synthetic phantoms", "seed": seed, "quick": quick}
    return Workload(data, SITES, 128 if quick else PATIENTS, 2 if quick else TINY.rounds, source)


def given_workload(data: Path, patients: int) -> Workload:
    """Use prepared folders, one per site; raises DataInsufficient when there are fewer than two."""
    sites = tuple(sorted(path.parent.name for path in data.glob("*/pairs.jsonl")))
    if len(sites) < 2:
        raise DataInsufficient(f"{data}: expected prepared folders of at least two sites, got {len(sites)}")
    return Workload(data, sites, patients, TINY.rounds, {"source": data.name, "seed": None, "quick": False})


def make(
    out: Annotated[Path, typer.Option(help="Where the JSON and the picture go.")] = Path("docs/figures"),
    work: Annotated[Path, typer.Option(help="Where made data and features are kept.")] = Path("runs/figures"),
    quick: Annotated[bool, typer.Option("--quick", help="A few patients, two rounds: a rehearsal.")] = False,
    seed: Annotated[
        int, typer.Option(help="Of the made-up patients; the demo's are seeds 1 and 1000.")
    ] = 1001,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings of each point, each with own draws.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Prepared folders, one per site, instead.")] = None,
    patients: Annotated[int, typer.Option(help="Public nominal training patients of --data.")] = 900,
    name: Annotated[str, typer.Option(help="Of the files.")] = "f1_epsilon",
) -> None:
    """Train and score every point of F1 against ε and draw them; what is there already is kept."""
    import torch

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    work = work / (f"quick-{seed}" if quick else f"data-{data.name}" if data else f"seed-{seed}")
    with bars() as display:
        workload = (
            given_workload(data, patients)
            if data is not None
            else synthetic_workload(work, seed=seed, quick=quick, display=display)
        )
        points = [(s, e, r) for r in range(repeats) for e in EPSILONS for s in SERIES if e in s.epsilons]
        points = points[:4] if quick else points
        document = make_points(out / f"{name}.json", work, workload, points, display)
    draw(document, out / f"{name}.svg")


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(make)
    run_program(app)


if __name__ == "__main__":
    main()
