"""Small charts as SVG text, drawn on the server: no script, no font and no colour of their own.

Colours come from the page's stylesheet by class. Guarantees: every text that is put in is escaped, and the
output is well-formed XML whose size does not grow with the number of rounds beyond the bins below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from server.status import EpsilonPoint, FailedAttempt, RoundView

MAX_BARS = 96
MAX_COLUMNS = 48
_WIDTH, _HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 62, 16, 30

Scale = Callable[[float], float]


def epsilon_chart(points: Sequence[EpsilonPoint], *, limit: float, rounds_planned: int) -> str:
    """Draw release ε over the rounds served, beside what the manifest allows."""
    top = _nice_top(max([limit, *(point.epsilon for point in points)]))
    x = _scale(0, max(1, rounds_planned), _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, top, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_y_axis(y, top, ""), *_x_axis(x, rounds_planned, "rounds")]
    parts.append(
        f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>'
    )
    last = points[-1] if points else None
    apart = last is None or abs(y(limit) - y(last.epsilon)) > 26 or x(last.rounds) < _WIDTH - _RIGHT - 60
    parts.append(_text(_WIDTH - _RIGHT + 12, y(limit) + 4, f"≤ {limit:g}", "label limit-label"))
    if last is not None:
        line = " ".join(f"{x(point.rounds):.1f},{y(point.epsilon):.1f}" for point in points)
        base = y(0)
        area = f"{x(points[0].rounds):.1f},{base:.1f} {line} {x(last.rounds):.1f},{base:.1f}"
        parts.append(f'<polygon class="area" points="{area}"/>')
        parts.append(f'<polyline class="line" points="{line}"/>')
        for point in points:
            tip = f"after {point.rounds} rounds: ε {point.epsilon:.2f}"
            radius = 4.5 if point is last else 2.5
            parts.append(_circle(x(point.rounds), y(point.epsilon), radius, "dot", tip))
        below = 18 if not apart or y(last.epsilon) < _TOP + 20 else -10
        anchor = "end" if x(last.rounds) > _WIDTH - _RIGHT - 40 else "middle"
        parts.append(
            _text(x(last.rounds), y(last.epsilon) + below, f"{last.epsilon:.2f}", f"label value {anchor}")
        )
    return _svg(parts, "Release epsilon by round, beside the limit")


def seconds_chart(rounds: Sequence[RoundView], failed: Sequence[FailedAttempt]) -> str:
    """Draw seconds per served round as bars, means of several rounds where there are many.

    A mark under a bar means that attempts of its rounds had failed before.
    """
    bins = _bins(rounds)
    top = _top_of_bars([mean for mean, _ in bins])
    y = _scale(0, top, _HEIGHT - _BOTTOM, _TOP)
    count = max(1, len(bins))
    slot = (_WIDTH - _LEFT - 12) / max(count, 12)
    unlucky = {one.round for one in failed}
    parts = list(_y_axis(y, top, " s"))
    for number, (mean, members) in enumerate(bins):
        left = _LEFT + number * slot
        repeated = any(one.round in unlucky for one in members)
        short = any(one.missing for one in members)
        kind = "bar bar-failed" if repeated else "bar bar-short" if short else "bar"
        tip = _bar_tip(mean, members, repeated=repeated)
        height = max(1.0, y(0) - y(min(mean, top)))
        parts.append(
            f'<rect class="{kind}" x="{left + slot * 0.14:.1f}" y="{y(0) - height:.1f}" '
            f'width="{slot * 0.72:.1f}" height="{height:.1f}" rx="1.5"><title>{escape(tip)}</title></rect>'
        )
        if mean > top:  # cut, and the value written over it
            cut = y(top) + 12
            parts.append(
                f'<line class="cut" x1="{left:.1f}" y1="{cut + 2:.1f}" x2="{left + slot:.1f}" '
                f'y2="{cut - 2:.1f}"/>'
            )
            parts.append(_text(left + slot / 2, y(top) - 5, f"{mean:.0f} s", "label value middle"))
        if number % max(1, -(-count // 8)) == 0:
            parts.append(
                _text(left + slot / 2, _HEIGHT - _BOTTOM + 17, str(members[0].round + 1), "tick middle")
            )
    return _svg(parts, "Seconds per round")


def presence_grid(sites: Sequence[str], rounds: Sequence[RoundView]) -> str:
    """Draw one row per site and one column per round: in the sum, or missing and why; the newest rounds."""
    shown = rounds[-MAX_COLUMNS:]
    width, label, row, gap = 1040, 108, 22, 12
    column = min(34.0, (width - label - gap) / max(1, len(shown)))
    height = row * len(sites) + 22
    parts = []
    for line, site in enumerate(sites):
        middle = row * line + row / 2
        name = site if len(site) <= 16 else f"{site[:15]}…"
        parts.append(f'<text class="label end" x="{label}" y="{middle + 4:.1f}">{escape(name)}</text>')
        for number, one in enumerate(shown):
            left = label + gap + number * column
            reason = one.missing.get(site, "") if site not in one.contributors else ""
            kind = "cell" if site in one.contributors else "cell-missing"
            state = "in the sum" if site in one.contributors else f"missing: {reason or 'not in the sum'}"
            tip = f"{site}, round {one.round + 1}: {state}"
            side = column * 0.74
            parts.append(
                f'<rect class="{kind}" x="{left + column * 0.13:.1f}" y="{middle - 7:.1f}" rx="2.5" '
                f'width="{side:.1f}" height="14"><title>{escape(tip)}</title></rect>'
            )
    for number, one in enumerate(shown):
        if one.round == 0 or (one.round + 1) % 5 == 0 or len(shown) < 6:
            middle_x = label + gap + (number + 0.5) * column
            parts.append(_text(middle_x, row * len(sites) + 16, str(one.round + 1), "tick middle"))
    return _svg(parts, "Which sites were in each round's sum", width=width, height=height, kind="grid")


def meter(share: float, *, text: str, kind: str = "") -> str:
    """Draw how much of a whole is used, as a thin bar."""
    used = 100 * min(1.0, max(0.0, share))
    return (
        f'<svg class="meter {escape(kind)}" viewBox="0 0 100 4" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(text)}"><rect class="rail" width="100" height="4" rx="2"/>'
        f'<rect class="used" width="{used:.2f}" height="4" rx="2"/></svg>'
    )


def _bins(rounds: Sequence[RoundView]) -> list[tuple[float, list[RoundView]]]:
    timed = [one for one in rounds if one.seconds is not None]
    size = max(1, -(-len(timed) // MAX_BARS))
    groups = [timed[start : start + size] for start in range(0, len(timed), size)]
    return [(sum(float(one.seconds or 0) for one in group) / len(group), group) for group in groups]


def _top_of_bars(means: Sequence[float]) -> float:
    """The axis' end: the longest round, or less where one that waited would flatten the rest."""
    if not means:
        return 1.0
    usual = sorted(means)[len(means) // 2]
    longest = max(means)
    return _nice_top(longest if longest <= 6 * usual else 2.5 * usual)


def _bar_tip(mean: float, members: Sequence[RoundView], *, repeated: bool) -> str:
    first, last = members[0].round + 1, members[-1].round + 1
    name = f"round {first}" if first == last else f"rounds {first} to {last}, mean"
    away = sorted({site for one in members for site in one.missing})
    words = [f"{name}: {mean:.1f} s"]
    if away:
        words.append(f"without {', '.join(away)}")
    if repeated:
        words.append("after a failed attempt")
    return "; ".join(words)


def _y_axis(y: Scale, top: float, unit: str) -> list[str]:
    parts = []
    for number in range(5):
        value = top * number / 4
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, y(value) + 4, f"{value:g}{unit}", "tick end"))
    return parts


def _x_axis(x: Scale, last: int, name: str) -> list[str]:
    step = _nice_top(max(1.0, last / 6))
    step = max(1, round(step))
    values = [*range(0, last - step // 2, step), last]
    parts = [_text(x(value), _HEIGHT - _BOTTOM + 17, str(value), "tick middle") for value in values]
    return [*parts, _text(_WIDTH - _RIGHT + 14, _HEIGHT - _BOTTOM + 17, name, "tick")]


def _nice_top(value: float) -> float:
    """The smallest of 1, 2, 4, 5, 8 or 10 times a power of ten that is not below `value`."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10, 20) if step * power >= value * (1 - 1e-9))


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _circle(x: float, y: float, radius: float, kind: str, tip: str) -> str:
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(tip)}</title></circle>'
    )


def _svg(
    parts: Sequence[str], name: str, *, width: float = _WIDTH, height: float = _HEIGHT, kind: str = "chart"
) -> str:
    body = "".join(parts)
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(name)}" xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def by_reason(absences: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Sum the absences of all sites by reason, the most frequent first."""
    total: dict[str, int] = {}
    for one in absences:
        for reason, count in one.items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
