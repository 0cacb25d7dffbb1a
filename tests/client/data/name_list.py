"""A recogniser for the tests: finds the capitalised words of a short list, as a trained model would names."""

import re
from collections.abc import Iterator

from client.data.leak_gate import _UNCUED_FAMILY, _UNCUED_GIVEN

_NAMES = "|".join(map(re.escape, (*_UNCUED_FAMILY, *_UNCUED_GIVEN, "Ellsworth", "Jane")))
_LISTED = re.compile(rf"\b(?:{_NAMES})(?:\s(?:{_NAMES}))?\b")


def find_names(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the listed names, and measurements under a label that identifies nobody."""
    for match in _LISTED.finditer(text):
        yield match.start(), match.end(), "PERSON"
    for match in re.finditer(r"\d+ mm", text):
        yield match.start(), match.end(), "QUANTITY"


def find_half(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield parts of words, as sub-word models do."""
    for match in re.finditer("Ellsw", text):
        yield match.start(), match.end(), "B-PER"


def fail(text: str) -> Iterator[tuple[int, int, str]]:
    """Fail on every text."""
    raise RuntimeError("no memory left, and the text was " + text)


def beyond(text: str) -> list[tuple[int, int, str]]:
    """Name a place outside the text."""
    return [(0, len(text) + 5, "PERSON")]
