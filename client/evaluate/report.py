"""The evaluation as one self-contained HTML page: scores with intervals, controls, findings, subgroups.

Nothing is loaded from anywhere; plots are inline SVG drawn here. It holds report text only where examples
were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.evaluate.scores import METRICS

_WIDTH, _LEFT, _ROW = 720, 210, 30
_TEMPLATE = "report.html.j2"


def render(result: Mapping[str, Any], examples: Sequence[Mapping[str, str]] = ()) -> str:
    """Render the page of an evaluation's result."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(_TEMPLATE).render(
        result=result,
        examples=examples,
        metrics=METRICS,
        scores_plot=_scores_plot(result),
        findings_plot=_findings_plot(result),
        groups_plot=_groups_plot(result),
    )


def interval_plot(rows: Sequence[tuple[str, list[tuple[float, float, float, str]]]], *, title: str) -> str:
    """Draw rows of points with intervals on 0-1 as SVG: (label, [(value, low, high, colour), …])."""
    from markupsafe import Markup, escape

    height = _ROW * len(rows) + 34
    scale = _WIDTH - _LEFT - 70
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for tick in range(6):
        x = _LEFT + scale * tick / 5
        parts.append(f'<line x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{height - 24}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" class="tick">{tick / 5:.1f}</text>')
    for at, (label, points) in enumerate(rows):
        middle = 6 + _ROW * at + _ROW / 2
        parts.append(f'<text x="{_LEFT - 12}" y="{middle + 4:.1f}" class="label">{escape(label)}</text>')
        for order, (value, low, high, colour) in enumerate(points):
            y = middle + (order - (len(points) - 1) / 2) * 9
            start, point, end = (_LEFT + scale * min(1, max(0, v)) for v in (low, value, high))
            parts.append(
                f'<line x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" class="bar {colour}"/>'
                f'<circle cx="{point:.1f}" cy="{y:.1f}" r="4.5" class="{colour}"/>'
            )
        value = points[0][0]
        parts.append(f'<text x="{_WIDTH - 58}" y="{middle + 4:.1f}" class="value">{value:.3f}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704  (every text in it is escaped above)


def _scores_plot(result: Mapping[str, Any]) -> str:
    rows = []
    for name in METRICS:
        entry, plain = result["scores"][name], result["shuffled_images"][name]
        points = [(entry["value"], entry["low"], entry["high"], "ours")]
        if "against" in result:
            other = result["against"]["scores"][name]
            points.append((other["value"], other["low"], other["high"], "other"))
        points.append((plain, plain, plain, "shuffled"))
        rows.append((name, points))
    return interval_plot(rows, title="Scores with 95 % intervals")


def _findings_plot(result: Mapping[str, Any]) -> str:
    rows = [
        (f"{label} ({counts['cases']})", [(counts["f1"], counts["f1"], counts["f1"], "ours")])
        for label, counts in result["findings"].items()
        if counts["cases"]
    ]
    return interval_plot(rows, title="F1 per finding") if rows else ""


def _groups_plot(result: Mapping[str, Any]) -> str:
    rows = []
    for group in result["subgroups"]:
        if not group["suppressed"]:
            entry = group["scores"]["finding_f1"]
            label = f"{group['kind']}: {group['name']} ({group['patients']})"
            rows.append((label, [(entry["value"], entry["low"], entry["high"], "ours")]))
    return interval_plot(rows, title="finding_f1 by subgroup") if rows else ""
