"""A report as blocks, and its HTML: headings, text, tables, charts and foldable records, with links.

Guarantees: every text is escaped, there is no script and nothing is loaded from elsewhere, and every link
leads to an anchor of the same page or is not made. It knows nothing of audits: see `report.py`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Link:
    """Text that leads to an anchor of the document."""

    text: str
    anchor: str


@dataclass(frozen=True)
class Mark:
    """A word shown as a coloured mark: good, bad or open."""

    text: str
    tone: str


def entry_link(index: int) -> Link:
    """Link to ledger entry `index`, whose record has the anchor `entry-<index>`."""
    return Link(f"entry {index}", f"entry-{index}")


Cell: TypeAlias = "str | Link | Mark | tuple[str | Link | Mark, ...]"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2
    anchor: str = ""


@dataclass(frozen=True)
class Text:
    parts: tuple[str | Link | Mark, ...]


@dataclass(frozen=True)
class Table:
    """Columns with their share of the width, and rows; `anchors` names each row where given."""

    columns: tuple[str, ...]
    widths: tuple[float, ...]
    rows: tuple[tuple[Cell, ...], ...]
    anchors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over one axis: each series is a name and its (x, y) points; `limits` are named levels."""

    title: str
    x: str
    y: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    limits: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Record:
    """One record in full: a line that unfolds to its text."""

    anchor: str
    summary: str
    body: str


Block: TypeAlias = Heading | Text | Table | Chart | Record
COLOURS = ("#0b5fa5", "#b3541e", "#2f7d4f", "#7a4fa3", "#8a6d00", "#a3346b", "#3d6f78", "#5d5d5d")
_TONES = {"good": "#1d6b3c", "bad": "#a61b1b", "open": "#7a5b00"}
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 "Source Sans 3", "Segoe UI", system-ui, sans-serif; color: #1c2430; margin: 0;
  background: #f4f5f7; }
main { max-width: 62rem; margin: 0 auto; background: #fff; padding: 2.5rem 3rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #d9dde3; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .7rem; max-width: 48rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; table-layout: fixed; }
th, td { text-align: left; vertical-align: top; padding: .32rem .6rem .32rem 0; overflow-wrap: anywhere;
  border-bottom: 1px solid #e6e9ee; }
th { font-weight: 600; color: #4a5565; font-size: .86rem; }
td { font-size: .92rem; font-variant-numeric: tabular-nums; }
tr:target, details:target { background: #fff6d6; }
a { color: #0b5fa5; }
.mark { font-weight: 650; }
details { border-bottom: 1px solid #e6e9ee; padding: .18rem 0; }
summary { cursor: pointer; font-size: .9rem; font-variant-numeric: tabular-nums; }
pre { font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f5f7;
  padding: .6rem; }
figure { margin: .8rem 0 1.2rem; } figcaption { font-size: .88rem; color: #4a5565; }
@media (max-width: 50rem) { main { padding: 1.2rem 1rem 3rem; }
  td, th { padding-right: .35rem; font-size: .8rem; } }
@media print { body { background: #fff; } main { padding: 0; max-width: none; } a { color: inherit; } }
"""


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Render a self-contained HTML page."""
    anchors = frozenset(_anchors(blocks))
    body = "\n".join(_block(block, anchors) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def plain_text(cell: Cell) -> str:
    """A cell's text without links and colours."""
    if isinstance(cell, tuple):
        return " ".join(plain_text(part) for part in cell)
    return cell if isinstance(cell, str) else cell.text


def _anchors(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, Heading | Record) and block.anchor:
            yield block.anchor
        elif isinstance(block, Table):
            yield from block.anchors


def _block(block: Block, anchors: frozenset[str]) -> str:
    if isinstance(block, Heading):
        name = f' id="{html.escape(block.anchor)}"' if block.anchor else ""
        return f"<h{block.level}{name}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{' '.join(_cell(part, anchors) for part in block.parts)}</p>"
    if isinstance(block, Record):
        return (
            f'<details id="{html.escape(block.anchor)}"><summary>{html.escape(block.summary)}</summary>'
            f"<pre>{html.escape(block.body)}</pre></details>"
        )
    return _chart(block) if isinstance(block, Chart) else _table(block, anchors)


def _table(table: Table, anchors: frozenset[str]) -> str:
    columns = "".join(f'<col style="width:{100 * w / sum(table.widths):.1f}%">' for w in table.widths)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = []
    for number, row in enumerate(table.rows):
        name = f' id="{html.escape(table.anchors[number])}"' if table.anchors else ""
        rows.append(f"<tr{name}>" + "".join(f"<td>{_cell(c, anchors)}</td>" for c in row) + "</tr>")
    return (
        f"<table><colgroup>{columns}</colgroup><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(cell: Cell, anchors: frozenset[str]) -> str:
    if isinstance(cell, tuple):
        return " ".join(_cell(part, anchors) for part in cell)
    if isinstance(cell, Link) and cell.anchor in anchors:
        return f'<a href="#{html.escape(cell.anchor)}">{html.escape(cell.text)}</a>'
    if isinstance(cell, Mark):
        return f'<span class="mark" style="color:{_TONES[cell.tone]}">{html.escape(cell.text)}</span>'
    return html.escape(cell if isinstance(cell, str) else cell.text)


def chart_ticks(top: float) -> list[float]:
    """Round values from 0 to at least `top`, at most seven of them."""
    size = 10.0 ** math.floor(math.log10(top / 5))
    step = next(factor * size for factor in (1, 2, 5, 10) if top / (factor * size) <= 5.0001)
    return [round(step * number, 12) for number in range(math.ceil(top / step - 1e-9) + 1)]


def place_labels(wanted: Sequence[float], *, apart: float, lowest: float, highest: float) -> list[float]:
    """Move labels apart so that none overlap, keeping their order; bounds are for the first and last."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = lowest
    for position, number in enumerate(order):
        room = highest - apart * (len(order) - 1 - position)
        placed[number] = max(floor, min(wanted[number], room))
        floor = placed[number] + apart
    return placed


def _chart(chart: Chart) -> str:
    width, height, left, right, bottom = 720.0, 240.0, 48.0, 130.0, 36.0
    ys = [y for _, points in chart.series for _, y in points] + [value for _, value in chart.limits]
    ticks = chart_ticks(max([*ys, 1e-9]))
    top_x = max([x for _, points in chart.series for x, _ in points] + [1.0])

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - right) * x / top_x, 12 + (height - bottom - 12) * (1 - y / ticks[-1])

    def level(value: float, style: str) -> str:
        y = at(0, value)[1]
        return f'<line x1="{left:g}" x2="{width - right:g}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'

    def label(x: float, y: float, text: str, style: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y + 4:.1f}" {style}>{html.escape(text)}</text>'

    parts = []
    for value in ticks:
        parts.append(level(value, 'stroke="#e6e9ee"'))
        parts.append(label(left - 6, at(0, value)[1], f"{value:g}", 'text-anchor="end"'))
    for name, value in chart.limits:
        parts.append(level(value, 'stroke="#a61b1b" stroke-dasharray="4 3"'))
        parts.append(label(width - right + 6, at(0, value)[1], name, 'fill="#a61b1b"'))
    drawn = [(number, name, points) for number, (name, points) in enumerate(chart.series) if points]
    ends = place_labels(
        [at(*points[-1])[1] for _, _, points in drawn], apart=13, lowest=8, highest=height - bottom
    )
    for (number, name, points), y_end in zip(drawn, ends, strict=True):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(label(width - right + 6, y_end, name, f'fill="{colour}"'))
    parts.append(label(left, height - 12, f"{chart.x} 0 to {top_x:g}"))
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(chart.title)}" '
        f'font-size="12" fill="#4a5565">{"".join(parts)}</svg>'
        f"<figcaption>{html.escape(chart.title)}; {html.escape(chart.y)}</figcaption></figure>"
    )
