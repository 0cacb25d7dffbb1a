"""A study's rounds as traces: from its log, without free text of a site, to a collector on loopback."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.traces import ATTRIBUTES, Collector, Outbox, Span, trace_id
from server.cli import app
from server.traces import StudyTraces, follow, round_spans
from tests.otlp_collector import attributes, collector
from tests.server.study_folder import log, write_folder

STUDY = "cd" * 32
ROUND = {
    "event": "round", "time_unix_s": 1_800_000_100, "round": 3, "attempt": 2, "seconds": 10.0,
    "cohort": ["north", "south"], "missing": {"south": "SiteRefused: BudgetExceeded: patient 17 of 40"},
    "stage_seconds": {"contribute": 6.0, "unmask": 1.5, "witness": 0.5}, "step_norm": 0.1,
}  # fmt: skip


def test_a_round_is_a_trace_of_its_stages_in_their_order() -> None:
    spans = {span.name: span for span in round_spans(STUDY, "chest", ROUND)}
    assert list(spans) == ["round", "contribute", "unmask", "witness", "missing"]
    assert {span.trace for span in spans.values()} == {trace_id(STUDY, 3)}
    whole = spans["round"]
    assert (whole.start_unix_s, whole.end_unix_s, whole.failed) == (1_800_000_090, 1_800_000_100, "")
    assert all(span.parent == whole.id for name, span in spans.items() if name != "round")
    assert spans["contribute"].end_unix_s == spans["unmask"].start_unix_s == 1_800_000_098
    assert spans["witness"].end_unix_s == whole.end_unix_s
    greeted = {**ROUND, "stage_seconds": {"hello": 30.0, "contribute": 6.0}}
    first, hello, *_ = round_spans(STUDY, "chest", greeted)
    assert first.start_unix_s == hello.start_unix_s == 1_800_000_064
    assert spans["unmask"].attributes["seconds"] == 1.5
    assert len({span.id for span in spans.values()}) == 5


def test_a_missing_site_is_named_with_a_word_of_ours_and_nothing_it_said() -> None:
    spans = list(round_spans(STUDY, "chest", ROUND))
    assert spans[-1].attributes["site"] == "south" and spans[-1].failed == "BudgetExceeded"
    told = json.dumps([vars(span) for span in spans], default=dict)
    assert "patient" not in told
    assert all(set(span.attributes) <= ATTRIBUTES for span in spans)


def test_a_failed_attempt_is_an_error_and_other_events_are_nothing() -> None:
    failed = {
        "event": "round-failed", "time_unix_s": 5, "round": 0, "attempt": 1, "served": 1,
        "missing": {"north": "no answer before the deadline"}, "reason": "too few",
    }  # fmt: skip
    spans = list(round_spans(STUDY, "chest", failed))
    assert [span.failed for span in spans] == ["RoundFailed", "no-answer"]
    assert list(round_spans(STUDY, "chest", {"event": "started", "time_unix_s": 1})) == []


def test_the_same_line_makes_the_same_ids() -> None:
    assert list(round_spans(STUDY, "chest", ROUND)) == list(round_spans(STUDY, "chest", ROUND))


def test_only_what_is_logged_from_now_on_is_followed(tmp_path: Path) -> None:
    study = write_folder(tmp_path / "chest")
    log(tmp_path / "chest", **ROUND)
    stop, looked = threading.Event(), threading.Event()

    class Traces(StudyTraces):
        def new_spans(self) -> list[Span]:
            found = super().new_spans()
            looked.set()
            return found

    with collector() as there:
        outbox = Outbox(Collector(f"{there.url}/v1/traces"))
        thread = threading.Thread(
            target=follow, args=(Traces(tmp_path), outbox), kwargs={"every_s": 0.01, "stop": stop}
        )
        thread.start()
        assert looked.wait(20)
        log(tmp_path / "chest", **{**ROUND, "round": 4})
        with (tmp_path / "chest" / "log.jsonl").open("a") as file:
            file.write('{"event": "round", "torn')
        assert there.came.wait(20)
        stop.set()
        thread.join()
        found = there.spans()
    assert {attributes(span)["fedrad.round"] for span in found} == {"4"}
    assert {span["traceId"] for span in found} == {trace_id(study.sha256, 4)}


def test_the_command_sends_all_once_and_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "chest")
    log(tmp_path / "chest", **ROUND)
    with collector() as there:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", there.url)
        done = CliRunner().invoke(app, ["traces", str(tmp_path), "--once", "--json"])
        assert (done.exit_code, json.loads(done.stdout)) == (0, {"spans": 5})
        assert len(there.spans()) == 5


@pytest.mark.parametrize(
    ("endpoint", "words"), [("", "expected a collector's URL"), ("http://127.0.0.1:1", "takes traces")]
)
def test_the_command_refuses_where_there_is_no_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str
) -> None:
    write_folder(tmp_path / "chest")
    log(tmp_path / "chest", **ROUND)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    done = CliRunner().invoke(app, ["traces", str(tmp_path), "--once"])
    assert done.exit_code == 1
    assert words in str(done.exception)
