"""Converters between instruction samples and the files of LLaVA, LLaVA-Rad, VQA-RAD and PeFoMed.

Guarantees: entries of LLaVA, LLaVA-Rad and VQA-RAD carry study, maker and split as extra fields, so what we
write comes back; `parse_llava(format_llava(x)) == x`, the others lose what is said with each. Fields that we
do not know are ignored, and no image is opened. Formats: LLaVA docs/Finetune_Custom_Data.md; the
LLaVA-Rad annotations of MIMIC-CXR (PhysioNet, its documented example); VQA_RAD Dataset Public.json
(osf.io/89kps); the IU-Xray, ROCO and VQA loaders of PeFoMed. Tried on entries written after those documents
and loaders, not on the originals' files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from client.data.instructions import DESCRIBE, Instruction, Turn
from common.errors import InstructionRefused

IMAGE = "<image>\n"


def format_llava(samples: Sequence[Instruction]) -> str:
    """Encode as LLaVA conversations; the image token opens the first question."""
    return _format_conversations(samples, maker="made_by")


def parse_llava(text: str) -> list[Instruction]:
    """Decode LLaVA conversations; samples of others get empty study, origin and split."""
    return _parse_conversations(text, maker="made_by")


def format_llava_rad(samples: Sequence[Instruction]) -> str:
    """Encode as LLaVA-Rad: conversations with `generate_method`; nothing of ours is lost."""
    return _format_conversations(samples, maker="generate_method")


def parse_llava_rad(text: str) -> list[Instruction]:
    """Decode LLaVA-Rad samples."""
    return _parse_conversations(text, maker="generate_method")


def format_vqa_rad(samples: Sequence[Instruction]) -> str:
    """Encode as VQA-RAD: one entry per turn, CLOSED for yes and no; which turns go together is lost."""
    return _dump(
        [
            {
                "qid": f"{sample.sample}-{number}",
                "image_name": sample.image,
                "image_organ": "CHEST",
                "question": turn.question,
                "answer": turn.answer,
                "answer_type": "CLOSED" if turn.answer.strip(". ").lower() in ("yes", "no") else "OPEN",
                "evaluation": "not evaluated",
                "phrase_type": "test_freeform" if sample.split == "test" else "freeform",
                "study": sample.study,
                "made_by": sample.made_by,
                "split": sample.split,
            }
            for sample in samples
            for number, turn in enumerate(sample.turns)
        ]
    )


def parse_vqa_rad(text: str) -> list[Instruction]:
    """Decode VQA-RAD: each question becomes a sample of one turn; numbers as answers become text."""
    return [
        Instruction(
            sample=str(entry.get("qid", number)),
            study=_text(entry, "study", ""),
            image=_text(entry, "image_name"),
            turns=(Turn(_text(entry, "question"), str(entry.get("answer", ""))),),
            made_by=_text(entry, "made_by", "unknown"),
            split=_text(entry, "split", "")
            or ("test" if _text(entry, "phrase_type", "").startswith("test") else "train"),
        )
        for number, entry in enumerate(_entries(json_of(text)))
    ]


def format_pefomed(samples: Sequence[Instruction]) -> str:
    """Encode the descriptions as PeFoMed reports: image path and report; questions and origin are lost."""
    return _dump(
        [
            {"image_path": sample.image, "report": sample.turns[0].answer}
            for sample in samples
            if sample.turns[0].question == DESCRIBE
        ]
    )


def parse_pefomed(text: str) -> list[Instruction]:
    """Decode PeFoMed reports or captions: each becomes a description; studies and splits are unknown."""
    return [
        Instruction(
            sample=str(number),
            study="",
            image=_text(entry, "image_path", _text(entry, "image", "")),
            turns=(Turn(DESCRIBE, _text(entry, "report" if "report" in entry else "caption")),),
            made_by="unknown",
            split="",
        )
        for number, entry in enumerate(_entries(json_of(text)))
    ]


FORMATTERS: Mapping[str, Callable[[Sequence[Instruction]], str]] = {
    "llava": format_llava,
    "llava-rad": format_llava_rad,
    "vqa-rad": format_vqa_rad,
    "pefomed": format_pefomed,
}
PARSERS: Mapping[str, Callable[[str], list[Instruction]]] = {
    "llava": parse_llava,
    "llava-rad": parse_llava_rad,
    "vqa-rad": parse_vqa_rad,
    "pefomed": parse_pefomed,
}


def json_of(text: str) -> Any:
    """Parse JSON; raises InstructionRefused."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InstructionRefused("expected JSON") from error


def _conversations(turns: Sequence[Turn]) -> list[dict[str, str]]:
    entries = []
    for number, turn in enumerate(turns):
        entries.append({"from": "human", "value": (IMAGE if number == 0 else "") + turn.question})
        entries.append({"from": "gpt", "value": turn.answer})
    return entries


def _turns(entries: Any) -> tuple[Turn, ...]:
    values = _entries(entries)
    if (
        not values
        or len(values) % 2
        or any(_text(entry, "from") != ("human", "gpt")[number % 2] for number, entry in enumerate(values))
    ):
        raise InstructionRefused("expected human and gpt in turns")
    texts = [_text(entry, "value") for entry in values]
    return tuple(
        Turn(question.replace("<image>", "").strip(), answer)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    )


def _format_conversations(samples: Sequence[Instruction], *, maker: str) -> str:
    return _dump(
        [
            {
                "id": sample.sample,
                "image": sample.image,
                maker: sample.made_by,
                "split": sample.split,
                "study": sample.study,
                "conversations": _conversations(sample.turns),
            }
            for sample in samples
        ]
    )


def _parse_conversations(text: str, *, maker: str) -> list[Instruction]:
    return [
        Instruction(
            sample=_text(entry, "id"),
            study=_text(entry, "study", ""),
            image=_text(entry, "image"),
            turns=_turns(entry.get("conversations")),
            made_by=_text(entry, maker, "unknown"),
            split=_text(entry, "split", ""),
        )
        for entry in _entries(json_of(text))
    ]


def _entries(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InstructionRefused("expected a list of objects")
    return value


def _text(entry: dict[str, Any], name: str, default: str | None = None) -> str:
    value = entry.get(name, default)
    if not isinstance(value, str):
        raise InstructionRefused(f"expected text in field {name!r}")
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
