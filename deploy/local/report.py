"""`report.html`: one self-contained page of a local run: scores, curves, privacy, rounds, example reports.

It shows held-out images and reports of all sites, which only the owner of all the data may look at: the page
stays where the data is. Text is escaped by the template engine; there is no script in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import Mode, Study
from common.files import write_atomic
from common.labeller import present_findings
from common.model.prompts import sentence_case
from deploy.local.measure import HeldOut, Scored

_EXAMPLES_PER_SITE = 2
_INK, _MUTED, _ACCENT, _OTHER, _WARN = "#1d2733", "#5b6b7b", "#0b6e99", "#9db4c0", "#c25b3f"


def write_report(
    path: Path,
    *,
    study: Study,
    result: Mapping[str, Any],
    held: HeldOut,
    scored: Mapping[str, Scored],
    curve: Sequence[tuple[int, float]],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Render the page and write it atomically."""
    import jinja2

    template = (Path(__file__).parent / "report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    metrics = result["metrics"]
    rows = [(_label(name), metrics[name]) for name in _NAMES if name in metrics]
    rows += [(f"{site} alone", value) for site, value in metrics["local"].items()]
    page = environment.from_string(template).render(
        study=study,
        result=result,
        rows=rows,
        cards=_cards(metrics),
        plain=study.privacy.mode is Mode.PLAIN,
        bars=_bars(rows),
        curve=_curve(curve, study) if len(curve) > 1 else "",
        examples=_examples(held, scored["federated"].reports),
        rounds=[event for event in log if event["event"] == "round"][-200:],
        failures=[
            e for e in log if e["event"] in ("round-failed", "site-not-ready", "finish-not-acknowledged")
        ],
    )
    write_atomic(path, page.encode())


_NAMES = {
    "federated": "federated",
    "pooled": "pooled (all data in one place)",
    "federated_shuffled_images": "federated, shuffled images",
    "base": "base, untrained",
}


def _label(name: str) -> str:
    return _NAMES.get(name, name)


def _cards(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key figures: value, name, what to compare it with."""
    federated = metrics["federated"]["finding_f1"]
    cards = [(f"{federated:.3f}", "finding-F1, federated", f"base {metrics['base']['finding_f1']:.3f}")]
    if "pooled" in metrics:
        pooled = metrics["pooled"]["finding_f1"]
        cards.append((f"{federated / max(pooled, 1e-9):.2f}×", "of pooled training", f"pooled {pooled:.3f}"))
    if metrics["local"]:
        site, best = max(metrics["local"].items(), key=lambda item: float(item[1]["finding_f1"]))
        cards.append(
            (
                f"{federated - best['finding_f1']:+.3f}",
                "over the best site alone",
                f"{site} {best['finding_f1']:.3f}",
            )
        )
    blind = metrics["federated_shuffled_images"]["finding_f1"]
    cards.append((f"{blind:.3f}", "with shuffled images", "what the language prior alone gives"))
    return cards


def _examples(held: HeldOut, reports: Sequence[str]) -> list[dict[str, Any]]:
    """Choose a few studies of every site, the first ones, so that nobody picks the good ones."""
    chosen: list[dict[str, Any]] = []
    for site in sorted(set(held.sites)):
        for row in [row for row, name in enumerate(held.sites) if name == site][:_EXAMPLES_PER_SITE]:
            wanted, got = present_findings(held.pairs[row].findings), present_findings(reports[row])
            chosen.append(
                {
                    "site": site,
                    "image": base64.b64encode(held.images[row].read_bytes()).decode(),
                    "truth": held.pairs[row].findings,
                    "written": sentence_case(reports[row]),
                    "found": sorted(wanted & got),
                    "missed": sorted(wanted - got),
                    "invented": sorted(got - wanted),
                }
            )
    return chosen


def _bars(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    figure, axes = _figure(7.2, 0.42 * len(rows) + 0.8)
    names = [name for name, _ in rows]
    values = [float(value["finding_f1"]) for _, value in rows]
    colours = [_ACCENT if name == "federated" else _WARN if "shuffled" in name else _OTHER for name in names]
    axes.barh(range(len(rows)), values, color=colours, height=0.62)
    for row, (_, value) in enumerate(rows):
        low, high = value.get("interval", {}).get("finding_f1", [value["finding_f1"]] * 2)
        axes.plot([low, high], [row, row], color=_INK, linewidth=1.2)
        axes.text(
            max(high, values[row]) + 0.012, row, f"{values[row]:.3f}", va="center", fontsize=9, color=_INK
        )
    axes.set_yticks(range(len(rows)), names, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.12, max(values) * 1.2 + 0.1))
    axes.set_xlabel("finding-F1 on held-out studies of all sites (bar: 95 % bootstrap interval)", fontsize=9)
    return _svg(figure)


def _curve(points: Sequence[tuple[int, float]], study: Study) -> str:
    figure, axes = _figure(7.2, 2.7)
    axes.plot([x for x, _ in points], [y for _, y in points], color=_ACCENT, marker="o", markersize=3.5)
    axes.set_xlabel("rounds", fontsize=9)
    axes.set_ylabel("finding-F1, validation", fontsize=9)
    axes.set_xlim(0, study.rounds)
    axes.set_ylim(0, max(0.05, max(y for _, y in points)) * 1.15)
    axes.grid(axis="y", color="#e3e9ee", linewidth=0.8)
    return _svg(figure)


def _figure(width_in: float, height_in: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_OTHER)
    axes.tick_params(colors=_MUTED, labelsize=9)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "fedrad", "font.family": "sans-serif"}
    ):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]
