"""Words around tokens: text as it streams, loops, sentences and how sure the model was of each.

Pure functions and one small accumulator. Guarantees: what is streamed only ever grows; a loop is found only
where the same run of tokens stands at least three times in a row; sentences cover the text in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from client.serving.engine import Sentence
from common.model.prompts import sentence_case

_MAX_PERIOD = 48
_LEAST_LOOP = 12
_REPEATS = 3
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？；]+")
_ABBREVIATION = re.compile(
    r"(?:^|\s)(?:dr|mr|mrs|ms|vs|approx|no|cf|e\.g|i\.e|etc|st|fig|resp|ca|lt|rt|dept)\.$", re.IGNORECASE
)
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class StreamedText:
    """The text of one answer as its tokens come; `ends[i]` is its length after token i."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.ids: list[int] = []
        self.ends: list[int] = []
        self.text = ""

    def add(self, token_id: int) -> str:
        """Take one token and return what it adds; half a character is held back."""
        self.ids.append(token_id)
        whole = sentence_case(self._decode(self.ids))
        added = ""
        if not whole.endswith(_BROKEN) and whole.startswith(self.text):
            added = whole[len(self.text) :]
            self.text = whole
        self.ends.append(len(self.text))
        return added


def loop_start(ids: Sequence[int]) -> int | None:
    """Return where the second turn of a loop at the end of `ids` begins, None where there is none.

    A run of p tokens that stands at the end 3 times in a row, and over at least 12 tokens, is a loop.
    """
    for period in range(1, min(_MAX_PERIOD, len(ids) // _REPEATS) + 1):
        turns = max(_REPEATS, -(-_LEAST_LOOP // period))
        length = turns * period
        if length > len(ids):
            continue
        tail = ids[len(ids) - length :]
        if all(tail[i] == tail[i + period] for i in range(length - period)):
            start = len(ids) - length
            while start > 0 and ids[start - 1] == ids[start - 1 + period]:
                start -= 1
            return start + period
    return None


def banned_tokens(ids: Sequence[int], size: int) -> set[int]:
    """Return the tokens that would repeat an n-gram of `size` already in `ids` (Hugging Face's rule)."""
    if size <= 0 or len(ids) + 1 < size:
        return set()
    last = tuple(ids[len(ids) - size + 1 :]) if size > 1 else ()
    return {ids[i + size - 1] for i in range(len(ids) - size + 1) if tuple(ids[i : i + size - 1]) == last}


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each sentence without the spaces around it; the last may lack its stop."""
    cuts = [0]
    for match in _END.finditer(text):
        if match.group().startswith(".") and (
            _ABBREVIATION.search(text[: match.end()])
            and match.end() < len(text)
            and not text[match.end() :].lstrip()[:1].isupper()
        ):
            continue
        if re.fullmatch(r"\s*\(?\d{1,2}\.", text[cuts[-1] : match.end()]):
            continue  # the number of a list item
        cuts.append(match.end())
    cuts.append(len(text))
    spans = []
    for start, end in pairwise(cuts):
        part = text[start:end]
        if part.strip():
            lead = len(part) - len(part.lstrip())
            spans.append((start + lead, start + lead + len(part.strip())))
    return spans


def cut_at_sentence(text: str) -> str:
    """Cut a broken-off text behind its last full sentence; one that has none stays as it is."""
    whole = [
        end for start, end in sentence_spans(text) if _END.search(text[start:end], max(0, end - start - 3))
    ]
    return text[: whole[-1]] if whole else text.rstrip()


def sentences_of(text: str, *, ends: Sequence[int], logprobs: Sequence[float]) -> tuple[Sentence, ...]:
    """Split a text and give each sentence the tokens it was written with; `ends` as in StreamedText."""
    spans = sentence_spans(text)
    found = []
    token = 0
    for number, (start, end) in enumerate(spans):
        upto = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        first = token
        while token < len(ends) and (ends[token] <= upto if number + 1 < len(spans) else ends[token] <= end):
            token += 1
        own = [value for value in logprobs[first:token] if math.isfinite(value)]
        mean = sum(own) / len(own) if own else -math.inf
        found.append(
            Sentence(
                text=text[start:end],
                start=start,
                end=end,
                first_token=first,
                end_token=token,
                uncertainty=1.0 - math.exp(mean) if own else 1.0,
                least_probability=math.exp(min(own)) if own else 0.0,
            )
        )
    return tuple(found)
