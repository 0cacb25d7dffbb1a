"""Prompts and reports as ids: lengths, labels, cutting, padding."""

import json
from pathlib import Path

import pytest

from common.errors import BaseInvalid, PromptTooLong
from common.model.prompts import (
    IGNORED,
    LLAVA_RAD_TEMPLATE,
    collate,
    encode_pair,
    encode_prompt,
    prompt_template,
    sentence_case,
)
from common.model.tiny import BOS, EOS, IMAGE, PAD, PROMPT, UNK, tokenizer

WORDS = tokenizer()


def ids(text: str) -> list[int]:
    return list(WORDS.encode(text, add_special_tokens=False))


def test_prompt_holds_the_image_tokens_and_the_indication() -> None:
    prompt = encode_prompt(
        WORDS, image_tokens=16, image_token_id=IMAGE, indication="Chest\n pain", images=2, template=PROMPT
    )
    assert prompt == (BOS, *[IMAGE] * 32, *ids("indication: chest pain. findings:"))


def test_labels_are_the_report_and_its_end() -> None:
    example = encode_pair(
        WORDS, image_tokens=3, image_token_id=IMAGE, indication="cough", report="Clear lungs.", max_tokens=99
    )
    answer = [*ids("clear lungs."), EOS]
    assert list(example.input_ids[-len(answer) :]) == answer == list(example.labels[-len(answer) :])
    assert set(example.labels[: -len(answer)]) == {IGNORED}
    assert len(example.labels) == len(example.input_ids)


def test_a_long_report_is_cut_and_a_long_prompt_refused() -> None:
    def encode(max_tokens: int) -> int:
        example = encode_pair(
            WORDS,
            image_tokens=16,
            image_token_id=IMAGE,
            indication="cough",
            report="Clear lungs. " * 50,
            max_tokens=max_tokens,
            template=PROMPT,
        )
        return len(example.input_ids)

    assert encode(40) == 40
    with pytest.raises(PromptTooLong, match="under 20 tokens"):
        encode(20)


def test_image_marks_in_the_texts_are_not_image_tokens() -> None:
    example = encode_pair(
        WORDS,
        image_tokens=2,
        image_token_id=IMAGE,
        indication="<image> <ima<image>ge>",
        report="<image> clear",
        max_tokens=99,
    )
    assert example.input_ids.count(IMAGE) == 2


def test_an_empty_indication_reads_none() -> None:
    prompt = encode_prompt(WORDS, image_tokens=1, image_token_id=IMAGE, indication=" ", template=PROMPT)
    assert prompt == (BOS, IMAGE, *ids("indication: none. findings:"))


def test_collate_pads_on_the_right() -> None:
    short, long = (
        encode_pair(WORDS, image_tokens=1, image_token_id=IMAGE, indication="a", report=text, max_tokens=99)
        for text in ("clear", "clear lungs.")
    )
    batch = collate([short, long], pad_token_id=PAD)
    assert batch["input_ids"].tolist() == [[*short.input_ids, PAD, PAD], list(long.input_ids)]
    assert batch["labels"].tolist() == [[*short.labels, IGNORED, IGNORED], list(long.labels)]
    assert batch["attention_mask"].sum(1).tolist() == [len(short.input_ids), len(long.input_ids)]


def test_template_comes_from_the_base_or_is_llava_rads(tmp_path: Path) -> None:
    assert prompt_template(tmp_path) == LLAVA_RAD_TEMPLATE
    (tmp_path / "fedrad.json").write_text(json.dumps({"prompt": PROMPT}))
    assert prompt_template(tmp_path) == PROMPT


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"prompt": 3}', '{"prompt": "no image {indication}"}'])
def test_bad_template_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "fedrad.json").write_text(content)
    with pytest.raises(BaseInvalid, match=r"fedrad\.json"):
        prompt_template(tmp_path)


def test_words_come_back_as_they_were_in_lower_case() -> None:
    text = "There is a small right pleural effusion. Support device: cardiac pacemaker."
    assert WORDS.decode(ids(text)) == text.lower().replace(":", " :")
    assert sentence_case("clear lungs. normal heart.") == "Clear lungs. Normal heart."


def test_plain_radiology_english_is_mostly_known() -> None:
    text = (
        "The cardiomediastinal silhouette is within normal limits for size and contour. No focal airspace "
        "disease. Degenerative changes of the thoracic spine. Calcified granuloma in the left upper lobe."
    )
    assert ids(text).count(UNK) == 0
