"""Instruction data: true to the report, with provenance, clean, and never sent off this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from client.data.converters import (
    format_llava,
    format_llava_rad,
    format_pefomed,
    format_vqa_rad,
    parse_llava,
    parse_llava_rad,
    parse_pefomed,
    parse_vqa_rad,
)
from client.data.instructions import (
    Turn,
    instructions,
    local_endpoint,
    model_instruction,
    parse_turns,
    stated,
)
from client.data.store import Pair
from common.errors import InstructionRefused
from tests.client.data.test_check_show_drop import prepared, run

PAIR = Pair(
    "p1",
    "s1",
    ("images/s1-0.png",),
    "pa",
    "",
    "The heart is enlarged. No pleural effusion or pneumothorax. There may be a nodule.",
    "Cardiomegaly.",
    "test",
)


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("Small left pleural effusion.", "effusions?", True),
        ("No effusion or pneumothorax.", "pneumothora\\w+", False),
        ("There may be an effusion.", "effusions?", None),
        ("No right effusion. Small left effusion.", "effusions?", None),
        ("The lungs are clear.", "effusions?", None),
    ],
)
def test_yes_or_no_comes_only_from_what_is_stated(text: str, pattern: str, expected: bool | None) -> None:
    assert stated(text, pattern) is expected


def test_rules_make_description_dialogue_and_questions() -> None:
    made = list(instructions([PAIR]))
    assert [len(sample.turns) for sample in made] == [1, 2, 3]
    assert made[2].turns == (
        Turn("Is there pleural effusion?", "No."),
        Turn("Is there pneumothorax?", "No."),
        Turn("Is there cardiomegaly?", "Yes."),
    )
    assert {(sample.study, sample.made_by, sample.split) for sample in made} == {("s1", "rules-1", "test")}


def test_llava_files_carry_everything_there_and_back() -> None:
    made = list(instructions([PAIR]))
    assert parse_llava(format_llava(made)) == made


def test_other_formats_carry_questions_and_answers() -> None:
    made = list(instructions([PAIR]))
    assert [sample.turns for sample in parse_llava_rad(format_llava_rad(made))] == [
        sample.turns for sample in made
    ]
    single = [turn for sample in made for turn in sample.turns]
    assert [sample.turns for sample in parse_vqa_rad(format_vqa_rad(made))] == [(turn,) for turn in single]
    assert [sample.turns[0].answer for sample in parse_pefomed(format_pefomed(made))] == [
        sample.turns[0].answer for sample in made
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"id": "1"}]',
        '[{"id": "1", "image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}]',
    ],
)
def test_malformed_llava_file_is_refused(text: str) -> None:
    with pytest.raises(InstructionRefused):
        parse_llava(text)


@pytest.mark.parametrize(
    "answer",
    [
        "Sorry.",
        "[]",
        '[{"question": "q"}]',
        '[{"question": "q", "answer": ""}]',
        '[{"question": "What does the report say?", "answer": "Clear lungs."}]',
        '[{"question": "q", "answer": "As an AI language model I cannot tell."}]',
    ],
)
def test_unusable_model_answer_is_refused(answer: str) -> None:
    with pytest.raises(InstructionRefused):
        parse_turns(answer)


def test_model_answer_is_scrubbed() -> None:
    turns = parse_turns('Sure: [{"question": "Who read it?", "answer": "Dr. Jane Doe at 14:20."}]')
    assert turns == [Turn("Who read it?", "___ at ___.")]


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/v1",
        "http://10.0.0.8/v1",
        "http://api.example.org/v1",
        "http://127.0.0.1.evil.org/v1",
    ],
)
def test_endpoint_off_this_machine_is_refused(url: str) -> None:
    with pytest.raises(InstructionRefused, match="loopback"):
        local_endpoint(url, "m")


class Endpoint(BaseHTTPRequestHandler):
    """A small OpenAI-compatible server that repeats a finding of the report."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        finding = body["messages"][0]["content"].split("Report: ")[1].split(".")[0]
        content = json.dumps([{"question": "What is seen?", "answer": f"{finding}."}])
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_local_model_makes_a_sample_that_names_it(endpoint: str) -> None:
    sample = model_instruction(PAIR, local_endpoint(endpoint, "small"), model="small")
    assert sample.turns == (Turn("What is seen?", "The heart is enlarged."),)
    assert sample.made_by == "model:small"


def test_command_writes_rules_and_model_samples(tmp_path: Path, endpoint: str) -> None:
    out = prepared(tmp_path, 3)
    file = tmp_path / "llava.json"
    counts = run("instruct", str(out), "--out", str(file), "--endpoint", endpoint, "--model", "small")
    made = parse_llava(file.read_text())
    assert counts["samples"] == len(made)
    assert sum(sample.made_by == "model:small" for sample in made) == 3
    assert file.stat().st_mode & 0o077 == 0
