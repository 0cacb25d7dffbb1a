"""A SentencePiece file becomes the same tokenizer, with two new tokens at its end."""

from pathlib import Path

import pytest

from common.errors import ConversionRefused
from common.model.convert.vocabulary import Piece, merges_of, parse_pieces, read_vocabulary, tokenizer_of
from tests.common.model.convert.foreign import pieces_file


def test_words_are_joined_by_score_and_bytes_stand_for_the_rest() -> None:
    tokenizer = tokenizer_of(parse_pieces(pieces_file(300)))
    ids = tokenizer.encode("ab no é", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁ab", "▁no", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "ab no é"


def test_better_scores_merge_first() -> None:
    pieces = [Piece(text, score, 1) for text, score in (("a", 0), ("b", 0), ("ab", -2), ("ba", -1))]
    assert merges_of(pieces) == [("b", "a"), ("a", "b")]


def test_new_tokens_come_after_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces_file(300))
    vocabulary = read_vocabulary(tmp_path)
    assert (vocabulary.image_id, vocabulary.pad_id, vocabulary.added) == (300, 301, 2)
    vocabulary.tokenizer.save_pretrained(tmp_path)
    again = read_vocabulary(tmp_path)
    assert (again.image_id, again.pad_id, again.added) == (300, 301, 0)
    assert again.tokenizer.encode("ab<image>no") == vocabulary.tokenizer.encode("ab<image>no")
    assert 300 in again.tokenizer.encode("ab<image>no")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        pieces_file(300)[:-3],
        b"\x0b\x01",
        b"\xff",
    ],
)
def test_other_bytes_are_no_vocabulary(data: bytes) -> None:
    with pytest.raises(ConversionRefused):
        tokenizer_of(parse_pieces(data))


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionRefused, match="got neither"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionRefused, match="expected a tokenizer"):
        read_vocabulary(tmp_path)
