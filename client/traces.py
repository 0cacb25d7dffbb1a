"""Traces of the agent's stages at a site, made from the progress that it tells its own user's programs.

A trace per round, with the id that the server's has; `contribute` has its length, the other stages, which
take milliseconds, are marks at the time of their answer. Guarantees: study id, round, stage and seconds, and
nothing of data; the agent neither waits for this program nor knows the collector.
The seconds of `contribute` grow with the patients drawn: that is why a site's traces stay on loopback.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import grpc

from client import agent_pb2, agent_pb2_grpc
from common.traces import Outbox, Span, span_id, trace_id

log = logging.getLogger("fedrad.traces")

_AGAIN_S = 5.0


class StageSpans:
    """Makes spans of the agent's progress; `studies` maps a study's id to its hash."""

    def __init__(self, site: str, studies: Callable[[], Mapping[str, str]]) -> None:
        self._site, self._studies = site, studies
        self._begun: dict[tuple[str, int, str], float] = {}

    def take(self, study: str, round: int, stage: str, percent: int, *, now: float) -> list[Span]:
        """Return the span that this event ends, if it ends one."""
        place = (study, round, stage)
        if percent < 100:
            self._begun = {place: self._begun.get(place, now)}  # one at a time: another was refused
            return []
        start = self._begun.pop(place, now)
        sha256 = self._studies().get(study, study)
        span = Span(
            trace=trace_id(sha256, round),
            id=span_id("site", self._site, sha256, round, stage, int(now * 1000)),
            name=stage,
            start_unix_s=start,
            end_unix_s=now,
            attributes={"study": study, "round": round, "stage": stage, "seconds": now - start},
        )
        return [span]


def follow(
    address: str, spans: StageSpans, outbox: Outbox, *, stop: threading.Event, again_s: float = _AGAIN_S
) -> None:
    """Send a span for each stage that the agent at `unix:PATH` ends, until `stop` is set."""
    calls: list[grpc.Call] = []

    def end() -> None:
        stop.wait()
        for call in calls:
            call.cancel()

    threading.Thread(target=end, daemon=True).start()
    away = False
    while not stop.is_set():
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            call = agent_pb2_grpc.SiteAgentStub(channel).Progress(agent_pb2.ProgressRequest())
            calls[:] = [call]
            if stop.is_set():
                call.cancel()
            try:
                for event in call:
                    away = False
                    now = time.time()
                    outbox.put(spans.take(event.study, event.round, event.stage, event.percent, now=now))
                    outbox.send()
            except grpc.RpcError as error:
                if not away and not stop.is_set():
                    log.warning("the agent tells nothing, it is asked again: %s", error.code().name)
                away = True
        stop.wait(again_s)
