"""A small rule-based labeller: which findings an English chest report states, denies or doubts.

It finds words of each finding (`finding_words.py`; CheXpert's 14 observations or ChestX-ray14's findings),
then looks in the same clause for negation and doubt, in the manner of NegEx (Chapman et al. 2001). It is
FedRad's own and is not CheXbert; scores made with it compare only with scores made with it. How well it reads
real reports: docs/evaluation.md.

Guarantees: same text, same labels; flipping a negation flips the label. It does not read other languages,
resolve references across sentences, or compare with earlier examinations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from common.finding_words import CHEST14_WORDS, CHEXPERT_WORDS

NO_FINDING = "No Finding"
LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)


class Status(Enum):
    """What a report says of one finding; absent from the result when it says nothing.

    HEDGED is stated with reserve ("probable", "borderline", "A or B"); UNCERTAIN is only raised ("may
    represent", "cannot be excluded").
    """

    POSITIVE = "positive"
    HEDGED = "hedged"
    UNCERTAIN = "uncertain"
    NEGATIVE = "negative"


_ORDER = (Status.NEGATIVE, Status.UNCERTAIN, Status.HEDGED, Status.POSITIVE)


class Vocabulary(Enum):
    """Whose findings are looked for."""

    CHEXPERT = "chexpert"
    CHEST14 = "chest14"


def _compiled(words: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    return {label: re.compile(rf"\b(?:{pattern})(?!\w)") for label, pattern in words.items()}


_FOUND = {
    Vocabulary.CHEXPERT: _compiled(CHEXPERT_WORDS),
    Vocabulary.CHEST14: _compiled(CHEST14_WORDS),
}

_NEGATION = re.compile(
    r"\b(?:no|not|without|none|never|neither|nor|negative for|free of|clear of|absence of|absent|rather than|"
    r"rules? out|ruled out|resolution of|resolved|devoid of|lack of|excludes?|removal of|removed)\b"
)
_FALSE_NEGATION = re.compile(
    r"\b(?:no|not|without) (?:\w+ )?(?:interval |significant |appreciable |definite )*(?:change\w*|"
    r"increase|decrease|"
    r"improvement|progression|longer|only)\b|\bnot (?:excluded|fully|completely|entirely|certain)\b|"
    r"\b(?:cannot|can not|could not|not) (?:\w+ )?(?:be )?(?:excluded?|ruled? out)\b|\bno doubt\b"
)
_NEGATION_AFTER = re.compile(
    r"^[^,]{0,40}?\b(?:(?:is|are|was|were|has|have)(?: been)? (?:not|no longer|resolved|cleared|"
    r"absent|removed)|"
    r"not (?:\w+ )?(?:seen|identified|visualized|present|evident|demonstrated|appreciated|detected)|"
    r"resolved|unlikely|"
    r"no longer (?:seen|present|visible)|absent)\b"
)
_RAISED = re.compile(
    r"\b(?:may|might|could|possibility|suspicious|question\w*|cannot|can not|concern\w*|suggest\w*|"
    r"differential|equivocal|if|consider\w*|correlate\w*)\b"
)
_RAISED_AFTER = re.compile(
    r"^[^,]{0,40}?\b(?:(?:cannot|can not|could not|not) (?:\w+ )?(?:be )?(?:excluded|ruled out)|questioned|"
    r"(?:is|are) considered)\b"
)
_HEDGE = re.compile(
    r"\b(?:possibl[ey]|probabl[ey]|likely|suspected|suspect|presumed|versus|vs|borderline|or)\b"
)
_HEDGE_AFTER = re.compile(r"^[^,]{0,25}?\b(?:possible|probable|suspected|versus|vs)\b")
_SENTENCE = re.compile(r"(?<!\d)\.+(?=\s|$)|\.(?=\s+[a-z])|[;!?\n]+|(?<=\d)\.(?=\s|$)")
_BREAK = re.compile(
    r"\b(?:but|however|although|though|except|aside from|apart from|other than|otherwise|whereas|"
    r"there (?:is|are|has)|"
    r"which|(?<!compatible )(?<!consistent )with (?:persistent|stable|associated|adjacent|small|mild|minimal|"
    r"moderate|large))\b|:"
)
_FRESH = re.compile(
    r"^\s*(?!(?:or|and|nor)\b)(?:\w+ )?(?:\w+ )?(?:small|mild|minimal|moderate|severe|trace|tiny|"
    r"stable|unchanged|persistent|"
    r"left|right|bilateral|bibasilar|subtle|increased|worsening|new|there is|there are|calcified|"
    r"cardiomegaly)\b"
)


def label_report(text: str, vocabulary: Vocabulary = Vocabulary.CHEXPERT) -> dict[str, Status]:
    """Label a report: finding to status, only those it speaks of.

    With CheXpert's words, "No Finding" is positive where every other but support devices is absent.
    """
    said: dict[str, Status] = {}
    for sentence in _SENTENCE.split(_normal(text)):
        for label, status in _label_sentence(sentence, vocabulary):
            said[label] = _stronger(said.get(label), status)
    ill = [
        label
        for label, status in said.items()
        if status is not Status.NEGATIVE and label != "Support Devices"
    ]
    if not ill and vocabulary is Vocabulary.CHEXPERT:
        said[NO_FINDING] = Status.POSITIVE
    return said


def present_findings(
    text: str, vocabulary: Vocabulary = Vocabulary.CHEXPERT, *, least: Status = Status.UNCERTAIN
) -> frozenset[str]:
    """Findings that a report holds for present; those only raised are among them unless `least` is higher."""
    wanted = _ORDER[_ORDER.index(least) :]
    return frozenset(label for label, status in label_report(text, vocabulary).items() if status in wanted)


def _label_sentence(sentence: str, vocabulary: Vocabulary) -> list[tuple[str, Status]]:
    return [
        (label, _status(sentence, match.start(), match.end()))
        for label, pattern in _FOUND[vocabulary].items()
        for match in pattern.finditer(sentence)
    ]


def _status(sentence: str, start: int, end: int) -> Status:
    """Judge one mention by the words around it in its clause."""
    breaks = list(_BREAK.finditer(sentence, 0, start))
    before = sentence[breaks[-1].end() if breaks else 0 : start]
    after_break = _BREAK.search(sentence, end)
    after = sentence[end : after_break.start() if after_break else len(sentence)]
    inside = sentence[start:end]
    masked = _FALSE_NEGATION.sub(lambda m: "~" * len(m.group()), before)
    negated = any(_reaches(masked, cue.end()) for cue in _NEGATION.finditer(masked))
    negated = negated or re.search(r"\b(?:not|no longer)\b", inside) is not None
    if negated or (_NEGATION_AFTER.search(after) and not _RAISED_AFTER.search(after)):
        return Status.NEGATIVE
    if _RAISED.search(before) or _RAISED_AFTER.search(after):
        return Status.UNCERTAIN
    if _HEDGE.search(before) or _HEDGE_AFTER.search(after) or "borderline" in inside:
        return Status.HEDGED
    return Status.POSITIVE


def _reaches(before: str, cue_end: int) -> bool:
    """Say whether a negation runs on: through a list it does, into a fresh statement after a comma not."""
    rest = before[cue_end:]
    if rest.count(",") and _FRESH.search(rest.rsplit(",", 1)[1] + " "):
        return False
    return len(rest.split()) <= 16


def _stronger(one: Status | None, other: Status) -> Status:
    return other if one is None else max(one, other, key=_ORDER.index)


def _normal(text: str) -> str:
    return re.sub(r"[ \t\r\f\v]+", " ", text.lower().replace("’", "'").replace("-", " "))
