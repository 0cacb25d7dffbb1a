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
    assert [
        (sample.study, sample.made_by, sample.split) for sample in parse_vqa_rad(format_vqa_rad(made))
    ] == [("s1", "rules-1", "test")] * len(single)
    assert parse_llava_rad(format_llava_rad(made)) == made
    assert [sample.turns for sample in parse_pefomed(format_pefomed(made))] == [made[0].turns]


def test_entries_as_others_write_them_are_read() -> None:
    rad = parse_llava_rad(
        """[{"id": "10_50", "image": "mimic/p10/a.jpg", "generate_method": "gpt4", "reason": "Cough.",
        "impression": null, "view": "AP", "chexpert_labels": {"Edema": 1.0, "Fracture": NaN},
        "conversations": [
        {"from": "human", "value": "<image>\\nDescribe the findings of the chest x-ray.\\n"},
        {"from": "gpt", "value": "No pneumothorax."}]}]"""
    )
    assert rad[0].turns == (Turn("Describe the findings of the chest x-ray.", "No pneumothorax."),)
    assert (rad[0].made_by, rad[0].study) == ("gpt4", "")
    vqa = parse_vqa_rad(
        """[{"qid": 7, "phrase_type": "test_para", "qid_linked_id": "x", "image_name": "synpic1.jpg",
        "image_organ": "CHEST", "evaluation": "evaluated", "question": "How many lungs?", "answer": 2,
        "answer_type": "OPEN"}]"""
    )
    assert (vqa[0].sample, vqa[0].split, vqa[0].turns) == ("7", "test", (Turn("How many lungs?", "2"),))
    captions = parse_pefomed(
        '[{"image": "a.png", "caption": "Clear."}, {"image_path": "b", "report": "Big."}]'
    )
    assert [(sample.image, sample.turns[0].answer) for sample in captions] == [
        ("a.png", "Clear."),
        ("b", "Big."),
    ]


def test_command_converts_and_cleans(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_text(
        json.dumps(
            [
                {"qid": 1, "image_name": "a", "question": "Who read it?", "answer": "Dr. Jane Doe did."},
                {"qid": 2, "image_name": "a", "question": "What does the report say?", "answer": "Clear."},
                {
                    "qid": 3,
                    "image_name": "b",
                    "question": "Changed?",
                    "answer": "Unchanged from the prior film.",
                },
            ]
        )
    )
    ours = tmp_path / "ours.json"
    counts = run("convert", str(theirs), "--from", "vqa-rad", "--to", "llava", "--out", str(ours))
    assert (counts["samples"], counts["refused"]) == (1, 2)
    assert parse_llava(ours.read_text())[0].turns == (Turn("Who read it?", "___ did."),)
    whole = run(
        "convert", str(theirs), "--from", "vqa-rad", "--to", "llava", "--out", str(ours), "--no-clean"
    )
    assert whole["samples"] == 3


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
        '[{"question": "q", "answer": "According to the description the heart is large."}]',
        '[{"question": "q", "answer": "Effusion, increased compared to the prior study."}]',
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
    """A small server of the OpenAI chat completions interface that repeats a finding of the report.

    Models: `small` answers, `talkative` speaks of the report, any other is unknown (404), as servers do.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or self.headers["Content-Type"] != "application/json":
            self.answer(404, {"error": {"message": "not found", "type": "invalid_request_error"}})
        elif body["model"] not in ("small", "talkative"):
            self.answer(404, {"error": {"message": "no such model", "type": "invalid_request_error"}})
        else:
            (message,) = body["messages"]
            assert message["role"] == "user" and not body.get("stream")
            finding = message["content"].split("Report: ")[1].split(".")[0]
            finding = f"The report says: {finding}" if body["model"] == "talkative" else finding
            content = json.dumps([{"question": "What is seen?", "answer": f"{finding}."}])
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": f"```json\n{content}\n```"},
                "logprobs": None,
                "finish_reason": "stop",
            }
            usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
            document = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
            self.answer(200, {**document, "choices": [choice], "usage": usage})

    def answer(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n")

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


@pytest.mark.parametrize(("model", "message"), [("unknown", "status 200"), ("talkative", "about a report")])
def test_model_that_is_unknown_or_speaks_of_the_report_is_refused(
    endpoint: str, model: str, message: str
) -> None:
    with pytest.raises(InstructionRefused, match=message):
        model_instruction(PAIR, local_endpoint(endpoint, model), model=model)


def test_endpoint_that_is_down_is_refused() -> None:
    with pytest.raises(InstructionRefused, match="local endpoint"):
        local_endpoint("http://127.0.0.1:9/v1", "m", timeout_s=2)("Report: x.")


def test_command_writes_rules_and_model_samples(tmp_path: Path, endpoint: str) -> None:
    out = prepared(tmp_path, 3)
    file = tmp_path / "llava.json"
    counts = run("instruct", str(out), "--out", str(file), "--endpoint", endpoint, "--model", "small")
    made = parse_llava(file.read_text())
    assert counts["samples"] == len(made)
    assert sum(sample.made_by == "model:small" for sample in made) == 3
    assert file.stat().st_mode & 0o077 == 0
