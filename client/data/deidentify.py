"""De-identification of report text: known identifiers of the patient and staff, then rules.

Guarantees: every occurrence of an identifier that header or table gives, in any of the usual spellings and
with one typing error in longer names, becomes `___`; so do dates, times, phone numbers, e-mail addresses,
long numbers, titled or signed names, and ages over 89. Working through the same text twice changes nothing.
It does not find the name of a stranger written without title or cue: `leak_gate.py` measures what is
found, a local recogniser can be plugged in (`recogniser.py`), and doubt means quarantine.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from client.data.recogniser import Recogniser, identifying_spans
from client.data.redaction_rules import MARK, compiled_rules
from client.data.vocabulary import PROTECTED

Known = tuple[str, str]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_TITLES = "dr mr mrs ms md jr sr de la del van von da di el al"
_HAN = re.compile(r"[\u3400-\u9fff]")
_COMMON_PLACE = """
    hospital clinic medical center centre university general health street department radiology systems
    institute road avenue
    """


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """Text without identifiers and how many replacements each rule made."""

    text: str
    replaced: Counter[str]


def scrub(text: str, known: Sequence[Known] = (), recognise: Recogniser | None = None) -> Scrubbed:
    """Replace identifiers in report text by `___`: known ones, then by rules, then those of a recogniser.

    `known` holds (kind, value) of header and table: kind is one of name, id, date, place, phone, physician,
    address, birth_date, study_date. Raises RecogniserInvalid when the recogniser fails.
    """
    replaced: Counter[str] = Counter()
    text = unicodedata.normalize("NFC", text)
    for pattern in known_patterns(tuple(known)):
        text, count = pattern.subn(MARK, text)
        replaced["known"] += count
    text, count = _scrub_misspelt(text, known)
    replaced["known-misspelt"] += count
    for rule, pattern in compiled_rules():
        text, count = pattern.subn(MARK, text)
        replaced[rule] += count
    for start, end in reversed(identifying_spans(recognise, text) if recognise else ()):
        if text[start:end].strip("_ .,"):
            text = text[:start] + MARK + text[end:]
            replaced["recogniser"] += 1
    text = re.sub(rf"{MARK}(?:[\s,^/-]*{MARK})+", MARK, text)
    return Scrubbed(text, +replaced)


def left_over(text: str, known: Sequence[Known]) -> tuple[str, ...]:
    """Return the kinds of known identifiers that still occur in `text`, ignoring case and punctuation."""
    found = []
    folded = _fold(text)
    for kind, value in known:
        for spelling in _spellings(kind, value):
            folded_spelling = _fold(spelling)
            if (
                len(folded_spelling.strip()) >= 3
                and spelling.lower() not in PROTECTED
                and folded_spelling in folded
            ):
                found.append(kind)
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=256)
def known_patterns(known: tuple[Known, ...]) -> tuple[re.Pattern[str], ...]:
    """Compile the patterns that find known identifiers, longest spelling first."""
    loose: set[str] = set()
    careful: set[str] = set()
    for kind, value in known:
        for spelling in _spellings(kind, value):
            if spelling.lower() in PROTECTED:
                careful.add(spelling)
            else:
                loose.add(spelling)
    patterns = []
    if loose:
        # Spellings that differ in their separators only make the same pattern.
        ordered = dict.fromkeys(_flexible(spelling) for spelling in sorted(loose, key=lambda s: (-len(s), s)))
        alternatives = "|".join(ordered)
        patterns.append(re.compile(rf"(?:{alternatives})(?:['’]s\b)?", re.I))
    if careful:
        # A name that is also a plain word of reports: replaced where it is written as a name.
        words = "|".join(
            re.escape(word.capitalize()) + "|" + re.escape(word.upper()) for word in sorted(careful)
        )
        patterns.append(re.compile(rf"(?<=[^.\s]\s)(?:{words})\b(?:['’]s\b)?"))
        patterns.append(re.compile(rf"\b(?:{words})(?=\s*,?\s*{MARK})"))
    return tuple(patterns)


def _spellings(kind: str, value: str) -> Iterable[str]:
    """Yield the ways in which an identifier may be written."""
    value = unicodedata.normalize("NFC", value).strip()
    if kind in ("name", "physician"):
        yield from _name_spellings(value)
    elif kind in ("date", "birth_date", "study_date"):
        yield from _date_spellings(value)
    elif kind in ("place", "address"):
        yield value
        for word in _WORD.findall(value):
            if len(word) >= 5 and word.lower() not in _COMMON_PLACE.split() and word.lower() not in PROTECTED:
                yield word
    elif len(value) >= 3 and (any(map(str.isdigit, value)) or len(value) >= 5):
        yield value
        digits = re.sub(r"\D", "", value)
        if len(digits) >= 5:
            yield digits
            if len(digits.lstrip("0")) >= 5:
                yield digits.lstrip("0")


def _name_spellings(value: str) -> Iterable[str]:
    for group in value.split("="):
        parts = [part for part in re.split(r"[\^,\s]+", group) if part]
        if parts and all(_HAN.search(part) for part in parts):
            yield "".join(parts)
            continue
        words = [word for part in parts for word in _WORD.findall(part) if len(word) >= 2]
        if len(words) >= 2:
            yield "".join(words[:2]) if len("".join(words[:2])) >= 8 else " ".join(words[:2])
        for word in words:
            if word.lower().strip(".") not in (
                "dr",
                "mr",
                "mrs",
                "ms",
                "md",
                "jr",
                "sr",
                "de",
                "la",
                "del",
                "van",
                "von",
            ):
                yield word


def _date_spellings(value: str) -> Iterable[str]:
    digits = re.sub(r"\D", "", value)[:8]
    try:
        day = datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))
    except ValueError:
        if len(value) >= 6:
            yield value
        return
    month = day.strftime("%B")
    for separator in ("-", "/", ".", " "):
        for parts in (("%Y", "%m", "%d"), ("%d", "%m", "%Y"), ("%m", "%d", "%Y")):
            padded = day.strftime(separator.join(parts))
            yield padded
            yield re.sub(r"(?<!\d)0", "", padded)
    yield digits
    yield day.strftime("%d%m%Y")
    yield day.strftime("%m%d%Y")
    for name in (month, month[:3]):
        yield f"{day.day} {name} {day.year}"
        yield f"{name} {day.day} {day.year}"
    yield f"{day.year}年{day.month}月{day.day}日"


def _flexible(spelling: str) -> str:
    """Make a pattern that allows other separators, and word boundaries outside ideographs."""
    body = r"[\s,.^/_-]*".join(re.escape(part) for part in re.split(r"[\s,.^/_-]+", spelling) if part)
    if _HAN.search(spelling):
        return body
    return rf"(?<![^\W_]){body}(?![^\W_])"


def _scrub_misspelt(text: str, known: Sequence[Known]) -> tuple[str, int]:
    """Replace words that are one edit (two in long ones) away from a known name."""
    from rapidfuzz.distance import DamerauLevenshtein

    names = {
        word.lower()
        for kind, value in known
        if kind in ("name", "physician")
        for word in _name_spellings(value)
        if len(word) >= 5 and word.isalpha() and not _HAN.search(word)
    }
    if not names:
        return text, 0
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        word = match.group().lower()
        if len(word) < 4 or word in PROTECTED:
            return match.group()
        for name in names:
            limit = 2 if len(name) >= 8 else 1
            if DamerauLevenshtein.distance(name, word, score_cutoff=limit) <= limit:
                count += 1
                return MARK
        return match.group()

    return _WORD.sub(replace, text), count


def _fold(text: str) -> str:
    """Lower case, letters and digits only, one space between words, spaces at both ends."""
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "
