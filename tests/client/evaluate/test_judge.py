"""The judge: parsing, CRIMSON's arithmetic, failures by name, and nothing beyond this machine."""

import json

import pytest

from client.data.instructions import local_endpoint
from client.evaluate.judge import ERROR_KINDS, Errors, crimson_score, judge_study, parse_crimson, parse_errors
from common.errors import InstructionRefused, JudgeAnswerInvalid
from tests.client.evaluate.judge_server import judge_server

ZERO = dict.fromkeys(ERROR_KINDS, 0)
GOOD = {"significant": ZERO | {"wrong_location": 2}, "insignificant": ZERO}


def test_six_kinds_are_counted_significant_or_not() -> None:
    assert parse_errors(f"Here it is: {json.dumps(GOOD)} Done.") == Errors((0, 0, 2, 0, 0, 0), (0,) * 6)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "none",
        "[1]",
        json.dumps({"significant": ZERO}),
        json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD | {"significant": {"false_finding": 1}}),
        json.dumps(GOOD | {"significant": ZERO | {"false_finding": -1}}),
        json.dumps(GOOD | {"significant": ZERO | {"false_finding": 1.5}}),
        json.dumps(GOOD | {"significant": ZERO | {"false_finding": True}}),
        json.dumps(GOOD | {"significant": ZERO | {"false_finding": 10**6}}),
        "{" * 10_000,
    ],
)
def test_other_answers_are_no_counts(answer: str) -> None:
    with pytest.raises(JudgeAnswerInvalid):
        parse_errors(answer)


@pytest.mark.parametrize(
    ("matched", "missed", "false", "expected"),
    [
        ([(1.0, 0.0)], [], [], 1.0),
        ([(1.0, 0.5)], [], [], 1 / 1.5),
        ([(1.0, 0.0)], [1.0], [], 0.5),
        ([(1.0, 0.0)], [], [0.5], 0.5),
        ([], [], [], 1.0),
        ([], [], [1.0], -0.5),
        ([(0.5, 0.0)], [], [1.0, 1.0], -1.5 / 2.5),
        ([], [0.5], [], 0.0),
        ([(0.0, 0.0)], [], [], 1.0),
    ],
)
def test_crimson_follows_its_arithmetic(
    matched: list[tuple[float, float]], missed: list[float], false: list[float], expected: float
) -> None:
    assert crimson_score(matched, missed, false) == pytest.approx(expected)


def test_crimson_answers_are_parsed_strictly() -> None:
    answer = {
        "matched": [{"urgency": "urgent", "errors": ["significant", "negligible"]}],
        "missed": [{"urgency": "minor"}],
        "false": [],
    }
    assert parse_crimson(json.dumps(answer)) == pytest.approx((1 / 1.5) / 1.25)
    for change in (
        {"matched": [{"urgency": "grave", "errors": []}]},
        {"matched": [{"urgency": "urgent", "errors": ["bad"]}]},
        {"matched": [{"urgency": "urgent"}]},
        {"missed": {"urgency": "minor"}},
        {"false": [{"urgency": ["urgent"]}]},
    ):
        with pytest.raises(JudgeAnswerInvalid):
            parse_crimson(json.dumps(answer | change))


def test_a_judge_is_asked_over_loopback_and_failures_are_named() -> None:
    with judge_server(break_every=3) as (url, seen):
        ask = local_endpoint(url, "fake")
        first = judge_study(ask, draft="Edema. No effusion.", truth="Edema. Left effusion.")
        assert first.errors == Errors((0, 1, 0, 0, 0, 0), (0,) * 6)
        assert first.crimson == pytest.approx(0.5) and first.failures == ()
        second = judge_study(ask, draft="Edema.", truth="Edema.")
        assert (second.errors, second.crimson) == (None, 1.0)
        assert second.failures == ("errors: expected one JSON object",)
        assert {request["path"] for request in seen} == {"/v1/chat/completions"}
        assert seen[0]["temperature"] == 0 and seen[0]["model"] == "fake"
    third = judge_study(ask, draft="Edema.", truth="Edema.")  # the server is gone
    assert third.errors is None and len(third.failures) == 2
    with judge_server(status=500) as (url, _):
        assert "no answer" in judge_study(local_endpoint(url, "f"), draft="a", truth="b").failures[0]


def test_nothing_leaves_this_machine_unless_told() -> None:
    for url in ("https://judge.hospital.example/v1", "http://10.0.0.8/v1", "http://judge/v1"):
        with pytest.raises(InstructionRefused, match="loopback"):
            local_endpoint(url, "m")
    local_endpoint("https://judge.hospital.example/v1", "m", allow_remote=True)
    with pytest.raises(InstructionRefused, match="loopback"):  # told, but not without encryption
        local_endpoint("http://10.0.0.8/v1", "m", allow_remote=True)
