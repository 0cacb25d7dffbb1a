"""Traces of a study's rounds and stages, made from its `log.jsonl` while the server may be writing it.

One trace per round (the same id at the sites); a span per attempt, below it one per stage and one per site
that is missing, with the reason's name. Guarantees: nothing of a site's data and no free text of a site; the
server that runs the rounds does not know that it is watched.
The log says how long the stages took, not when they began: a round's stages stand one after another in the
protocol's order and end with the round, so their lengths are measured and their places are not. The first
round's span begins with its greeting, which the round's own seconds leave out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import FedRadError
from common.protocol import Stage
from common.traces import Outbox, Span, span_id, trace_id
from server.status import find_studies, read_lines, reason_name

_ORDER = [stage.value for stage in Stage]


def round_spans(study: str, name: str, event: Mapping[str, Any]) -> Iterator[Span]:
    """Yield the spans of one `round` or `round-failed` event of the study of this hash and id; pure."""
    if event.get("event") not in ("round", "round-failed") or "time_unix_s" not in event:
        return
    number, attempt = int(event["round"]), int(event["attempt"])
    seconds = float(event.get("seconds", 0.0))
    end = float(event["time_unix_s"])
    trace, place = trace_id(study, number), (study, number, attempt)
    attributes: dict[str, str | int | float] = {"study": name, "round": number, "attempt": attempt}
    whole = span_id("server", *place)
    failed = "" if event["event"] == "round" else "RoundFailed"
    spent = event.get("stage_seconds", {})
    stages = sorted(set(spent) & set(_ORDER), key=_ORDER.index)
    start = end - sum(float(spent[stage]) for stage in stages)
    yield Span(
        trace=trace, id=whole, name="round", start_unix_s=min(start, end - seconds), end_unix_s=end,
        attributes={**attributes, "seconds": seconds}, failed=failed,
    )  # fmt: skip
    for stage in stages:
        took = float(spent[stage])
        yield Span(
            trace=trace, id=span_id("server", *place, stage), parent=whole, name=stage, start_unix_s=start,
            end_unix_s=start + took, attributes={**attributes, "stage": stage, "seconds": took},
        )  # fmt: skip
        start += took
    for site, why in sorted(event.get("missing", {}).items()):
        reason = reason_name(str(why))
        yield Span(
            trace=trace, id=span_id("server", *place, "missing", site), parent=whole, name="missing",
            start_unix_s=end, end_unix_s=end, attributes={**attributes, "site": site, "reason": reason},
            failed=reason,
        )  # fmt: skip


class StudyTraces:
    """Follows the logs of all studies below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lines: dict[Path, int] = {}

    def new_spans(self) -> list[Span]:
        """Return the spans of all that was logged since the last call; a folder without studies has none."""
        try:
            directories = find_studies(self._directory)
        except FedRadError:
            return []
        return [span for path in directories for span in self._new(path)]

    def _new(self, path: Path) -> Iterable[Span]:
        from server.checkpoint import read_signed_study

        events = read_lines(path / "log.jsonl")
        before = self._lines.get(path, 0)
        if len(events) == before:
            return
        try:
            study = read_signed_study(path)
        except FedRadError:
            return
        self._lines[path] = len(events)
        for event in events[before:]:
            yield from round_spans(study.sha256, study.study.id, event)


def follow(traces: StudyTraces, outbox: Outbox, *, every_s: float, stop: threading.Event) -> None:
    """Send the spans of what is logged from now on until `stop` is set."""
    traces.new_spans()
    while not stop.wait(every_s):
        outbox.put(traces.new_spans())
        outbox.send()
