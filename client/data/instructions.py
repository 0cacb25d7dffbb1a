"""Instruction data from prepared reports: rule-based questions, and self-instruct through a local model.

Guarantees: every sample names its study and how it was made (`rules-1` or the model's name); generated text
goes through the same de-identification as reports and is refused when it speaks of a report or of earlier
studies; the endpoint must be on this machine. It does not judge whether a generated answer is true to the
report.
Source of the self-instruct idea: LLaVA-Med (Li et al. 2023).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from client.data.deidentify import scrub
from client.data.reports import flags_of, remove_priors, sentences
from client.data.store import Pair
from common.errors import InstructionRefused

MAX_TURNS = 8
MAX_ANSWER_CHARS = 2_000
RULES_NAME = "rules-1"
DESCRIBE = "Describe the findings of this chest radiograph."
_FINDINGS = (
    ("pleural effusion", r"effusions?"),
    ("pneumothorax", r"pneumothora\w+"),
    ("consolidation", r"consolidations?"),
    ("pulmonary edema", r"(?:pulmonary |interstitial )?edema"),
    (
        "cardiomegaly",
        r"cardiomegaly|enlarged (?:heart|cardiac silhouette)|heart (?:size )?is (?:\w+ )?enlarged",
    ),
    ("atelectasis", r"atelectas\w+"),
    ("a nodule", r"nodules?"),
    ("a fracture", r"fractures?"),
)
_NEGATION = re.compile(r"\b(?:no|not|without|negative for|free of|absence of|resolved)\b", re.I)
_UNSURE = re.compile(
    r"\b(?:may|might|could|possible|possibly|probable|probably|cannot exclude|suspected|versus)\b", re.I
)
_SECOND_HAND = re.compile(
    r"\b(?:reports?|captions?|impression section|findings section|"
    r"(?:given|provided) (?:text|context|information)|"
    r"according to the (?:text|description)|radiologist (?:notes?|noted|says|said|writes|wrote))\b",
    re.I,
)
_PROMPT = (
    "You see the report of a chest radiograph. Write a conversation between a person who asks about the "
    "image and an assistant who sees the image, not the report. Use only what the report says. Do not name "
    "a report, earlier studies, names, dates or places. Answer with a JSON list of two to four objects with "
    "keys question and answer.\n\nReport: "
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question about the image and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """A conversation about one study: its first image, turns, and where it comes from."""

    sample: str
    study: str
    image: str
    turns: tuple[Turn, ...]
    made_by: str
    split: str


def rule_instructions(pair: Pair) -> Iterator[Instruction]:
    """Make samples from a report without a model: description, impression and yes-or-no questions."""
    yield _sample(pair, [Turn(DESCRIBE, pair.findings)], RULES_NAME)
    if pair.impression:
        turns = [
            Turn("What are the findings?", pair.findings),
            Turn("What is your impression?", pair.impression),
        ]
        yield _sample(pair, turns, RULES_NAME)
    questions = [
        Turn(f"Is there {name}?", "Yes." if present else "No.")
        for name, pattern in _FINDINGS
        if (present := stated(pair.findings, pattern)) is not None
    ]
    if questions:
        yield _sample(pair, questions[:MAX_TURNS], RULES_NAME)


def stated(text: str, pattern: str) -> bool | None:
    """Tell whether text affirms (True) or denies (False) a finding; None when silent, unsure or both."""
    answers = set()
    for sentence in sentences(text):
        for clause in re.split(r",? but | however ", sentence, flags=re.I):
            match = re.search(rf"\b(?:{pattern})\b", clause, re.I)
            if match is None:
                continue
            negated = _NEGATION.search(clause[: match.start()]) is not None
            if not negated and _UNSURE.search(clause):
                return None
            answers.add(not negated)
    return answers.pop() if len(answers) == 1 else None


def model_instruction(pair: Pair, ask: Callable[[str], str], *, model: str) -> Instruction:
    """Ask a local model for a conversation about a report; raises InstructionRefused."""
    text = f"{pair.findings} {pair.impression}".strip()
    return _sample(pair, parse_turns(ask(_PROMPT + text)), f"model:{model}")


def parse_turns(answer: str) -> list[Turn]:
    """Parse and clean a model's answer; raises InstructionRefused."""
    start, end = answer.find("["), answer.rfind("]")
    try:
        values = json.loads(answer[start : end + 1])
    except (json.JSONDecodeError, RecursionError) as error:
        raise InstructionRefused("expected a JSON list of questions and answers") from error
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_TURNS:
        raise InstructionRefused(f"expected 1 to {MAX_TURNS} turns")
    turns = []
    for value in values:
        if not isinstance(value, dict) or set(value) != {"question", "answer"}:
            raise InstructionRefused("expected objects with question and answer")
        question, reply = value["question"], value["answer"]
        if not all(isinstance(part, str) and 0 < len(part) <= MAX_ANSWER_CHARS for part in (question, reply)):
            raise InstructionRefused(f"expected texts of 1 to {MAX_ANSWER_CHARS} characters")
        turns.append(clean_turn(Turn(question, reply)))
    return turns


def clean_turn(turn: Turn) -> Turn:
    """Return a turn without identifiers; raises InstructionRefused where it tells of the text behind it."""
    both = f"{turn.question} {turn.answer}"
    if "machine-text" in flags_of({"findings": turn.answer}) or _SECOND_HAND.search(both):
        raise InstructionRefused("expected an answer about the image, got one about a report or a model")
    if any(remove_priors(part)[1] for part in (turn.question, turn.answer)):
        raise InstructionRefused("expected an answer about this image, got one about earlier studies")
    return Turn(scrub(turn.question).text, scrub(turn.answer).text)


def local_endpoint(
    url: str, model: str, *, timeout_s: float = 120, allow_remote: bool = False
) -> Callable[[str], str]:
    """Return a function that asks an OpenAI-compatible endpoint on a loopback address.

    `allow_remote` permits https:// to another machine; what is asked then leaves this one.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    near = parts.scheme == "http" and (host == "localhost" or _is_loopback(host))
    if not near and not (allow_remote and parts.scheme == "https" and host):
        raise InstructionRefused("expected http:// on a loopback address: reports do not leave this machine")

    def ask(prompt: str) -> str:
        from http.client import HTTPConnection, HTTPException, HTTPSConnection

        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        connection = (
            HTTPConnection(host, parts.port or 80, timeout=timeout_s)
            if near
            else HTTPSConnection(host, parts.port or 443, timeout=timeout_s)
        )
        try:
            path = parts.path.rstrip("/") + "/chat/completions"
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read(1 << 20)
            if response.status != 200:
                raise InstructionRefused(f"expected status 200 of the local endpoint, got {response.status}")
            return str(json.loads(data)["choices"][0]["message"]["content"])
        except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            raise InstructionRefused(
                f"expected an answer of the local endpoint, got {type(error).__name__}"
            ) from error
        finally:
            connection.close()

    return ask


def instructions(pairs: Iterable[Pair]) -> Iterator[Instruction]:
    """Make the rule-based samples of all pairs, in order."""
    for pair in pairs:
        yield from rule_instructions(pair)


def _sample(pair: Pair, turns: list[Turn], made_by: str) -> Instruction:
    content: list[Any] = [pair.study, made_by, [(turn.question, turn.answer) for turn in turns]]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    return Instruction(name, pair.study, pair.images[0], tuple(turns), made_by, pair.split)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
