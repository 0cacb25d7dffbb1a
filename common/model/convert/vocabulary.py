"""Tokenizers of foreign checkpoints as `tokenizer.json`, with the image mark in them.

Vicuna and Mistral publish a SentencePiece file (`tokenizer.model`). Its pieces and scores say all there is:
BPE merges follow from the scores, bytes stand for what no piece covers, a space is "▁". An existing
`tokenizer.json` is taken as it is, with the mark added.

Guarantees: no library reads the foreign file but a parser of its three fields; ids of existing tokens do not
change. It handles SentencePiece BPE models without a normaliser of their own, as both use.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConversionRefused

IMAGE, PAD, START, END = "<image>", "<pad>", "<s>", "</s>"
_MAX_BYTES = 64 << 20
_MAX_PIECES = 1 << 20
_UNKNOWN, _CONTROL, _USER = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Piece:
    """One SentencePiece entry; `kind` as in its proto: 1 normal, 2 unknown, 3 control, 4 user, 6 byte."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with its image mark, how many tokens were added to it, and the ids that configs name."""

    tokenizer: Any
    added: int
    image_id: int
    pad_id: int


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read a checkpoint folder's tokenizer and add what is missing of `<image>` and `<pad>`.

    Raises ConversionRefused.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises a bare Exception for a broken file
            raise ConversionRefused(f"{folder / 'tokenizer.json'}: expected a tokenizer") from error
        known = tokenizer.get_vocab()
        tokenizer.bos_token, tokenizer.eos_token = START, END
        if not {START, END} <= known.keys():
            raise ConversionRefused(f"{folder / 'tokenizer.json'}: expected the tokens <s> and </s>")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = tokenizer_of(parse_pieces((folder / "tokenizer.model").read_bytes()))
    else:
        raise ConversionRefused(f"{folder}: expected tokenizer.json or tokenizer.model, got neither")
    before = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.add_special_tokens({"pad_token": PAD})
    ids = tokenizer.convert_tokens_to_ids([IMAGE, PAD])
    return Vocabulary(tokenizer, len(tokenizer) - before, *ids)


def tokenizer_of(pieces: list[Piece]) -> Any:
    """Make the Llama tokenizer of SentencePiece entries (BPE with byte fallback)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    ids = {piece.text: at for at, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    if unknown is None or not {START, END} <= ids.keys():
        raise ConversionRefused("tokenizer.model: expected an unknown token, <s> and </s>")
    bpe = Tokenizer(models.BPE(ids, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL, _USER)]
    bpe.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=START, eos_token=END, unk_token=unknown)


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """List the BPE merges that scores imply: better pieces first, then by the ids of their halves."""
    ids = {piece.text: at for at, piece in enumerate(pieces)}
    ranked: list[tuple[int, int, int, tuple[str, str]]] = []
    for text, at in ids.items():
        if pieces[at].kind != 1:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((at, ids[left], ids[right], (left, right)))
    ranked.sort(key=lambda merge: (-pieces[merge[0]].score, merge[0], merge[1], merge[2]))
    return [merge[3] for merge in ranked]


def parse_pieces(data: bytes) -> list[Piece]:
    """Parse the pieces of a SentencePiece model (protobuf field 1); raises ConversionRefused."""
    if len(data) > _MAX_BYTES:
        raise ConversionRefused(f"tokenizer.model: expected at most {_MAX_BYTES} bytes")
    pieces: list[Piece] = []
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
    except (IndexError, ValueError, struct.error) as error:
        raise ConversionRefused("tokenizer.model: expected a SentencePiece model, got other bytes") from error
    texts = {piece.text for piece in pieces}
    if not 3 <= len(pieces) <= _MAX_PIECES or len(texts) != len(pieces) or "" in texts:
        raise ConversionRefused(
            f"tokenizer.model: expected distinct pieces, got {len(texts)} of {len(pieces)}"
        )
    return pieces


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Walk a protobuf message: (field number, varint or bytes; fixed widths as bytes)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                number, at = _varint(data, at)
                yield key >> 3, number
                continue
            case 1:
                length = 8
            case 2:
                length, at = _varint(data, at)
            case 5:
                length = 4
            case _:
                raise ValueError("wire type")
        if at + length > len(data):
            raise ValueError("length")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("varint")
