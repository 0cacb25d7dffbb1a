"""Prompt and report as token ids: what the model is asked and what it should answer.

The template is the base's own (`fedrad.json` in its directory, key `prompt`), else LLaVA-Rad's in Vicuna's
frame. `<image>` in it stands for all image tokens of all images. Guarantees: labels are -100 on prompt and
padding; the report always ends with the end token unless it was cut at `max_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BaseInvalid, PromptTooLong

if TYPE_CHECKING:
    import torch

IGNORED = -100
MARK = "<image>"
LLAVA_RAD_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nProvide a description of the "
    "findings in the radiology image given the following indication: {indication} ASSISTANT:"
)


@dataclass(frozen=True, slots=True)
class Example:
    """One training pair; `labels` repeats `input_ids` where the report is, -100 elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def prompt_template(base_dir: Path) -> str:
    """Read the base's prompt template, or LLaVA-Rad's where it has none."""
    path = base_dir / "fedrad.json"
    if not path.is_file():
        return LLAVA_RAD_TEMPLATE
    try:
        template = json.loads(path.read_text())["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise BaseInvalid(f"{path}: expected an object with the key prompt") from error
    if not isinstance(template, str) or template.count(MARK) != 1 or "{indication}" not in template:
        raise BaseInvalid(f"{path}: expected a prompt with one {MARK} and {{indication}}")
    return template


def encode_prompt(
    tokenizer: Any,
    *,
    image_tokens: int,
    image_token_id: int,
    indication: str,
    images: int = 1,
    template: str = LLAVA_RAD_TEMPLATE,
) -> tuple[int, ...]:
    """Encode the question: start token, text before, `images * image_tokens` placeholders, text after."""
    before, after = template.split(MARK)
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if before:
        ids += tokenizer.encode(before, add_special_tokens=False)
    ids += [image_token_id] * (images * image_tokens)
    asked = after.replace("{indication}", _plain(indication) or "none")
    ids += [i for i in tokenizer.encode(asked, add_special_tokens=False) if i != image_token_id]
    return tuple(ids)


def encode_pair(
    tokenizer: Any,
    *,
    image_tokens: int,
    image_token_id: int,
    indication: str,
    report: str,
    images: int = 1,
    max_tokens: int,
    template: str = LLAVA_RAD_TEMPLATE,
) -> Example:
    """Encode question and answer; the answer is cut so that all fits in `max_tokens`.

    Raises PromptTooLong when the question alone leaves no room.
    """
    prompt = encode_prompt(
        tokenizer,
        image_tokens=image_tokens,
        image_token_id=image_token_id,
        indication=indication,
        images=images,
        template=template,
    )
    if len(prompt) >= max_tokens:
        raise PromptTooLong(f"expected a prompt under {max_tokens} tokens, got {len(prompt)}")
    answer = [i for i in tokenizer.encode(_plain(report), add_special_tokens=False) if i != image_token_id]
    answer = [*answer, tokenizer.eos_token_id][: max_tokens - len(prompt)]
    return Example((*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


def collate(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right: `input_ids`, `attention_mask`, `labels`, each int64 [B, T]."""
    import torch

    longest = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        ids[row, :count] = torch.tensor(example.input_ids)
        labels[row, :count] = torch.tensor(example.labels)
        mask[row, :count] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sentence_case(text: str) -> str:
    """Capitalise the first letter of each sentence, for showing what a lower-case model wrote."""
    return ". ".join(part[:1].upper() + part[1:] for part in text.strip().split(". "))


def _plain(text: str) -> str:
    """One line without the image mark."""
    return " ".join(text.replace(MARK, " ").split())
