"""A small rule-based labeller: which of CheXpert's 14 observations an English chest report states.

It finds words of each observation (whole words only), then looks in the same clause for negation and doubt,
in the manner of NegEx (Chapman et al. 2001). It is FedRad's own and is not CheXbert; scores made with it
compare only with scores made with it.

Guarantees: same text, same labels; flipping a negation flips the label. It does not read other languages,
resolve references across sentences, or compare with earlier examinations.
"""

from __future__ import annotations

import re
from enum import Enum

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
    """What a report says of one observation; absent from the result when it says nothing."""

    POSITIVE = "positive"
    UNCERTAIN = "uncertain"
    NEGATIVE = "negative"


_HEART = (
    r"(?:heart(?: size| shadow)?|cardiac (?:silhouette|shadow|contours?|size)|"
    r"cardiac and mediastinal silhouettes?)"
)
_BIG = r"(?:enlarged|enlargement|large|big|prominent|increased|globular)"
_DEGREE = (
    r"(?:(?:is|are|appears?|remains?|shows?|size|was|to be|at|again|not|no longer|mildly|slightly|"
    r"moderately|markedly|severely|borderline|top|mild|moderate|severe|marked|stably|stable|"
    r"minimally|grossly|the|in|size|and|but|overall|significantly|definitely),? )"
)
_MENTIONS: dict[str, str] = {
    "Enlarged Cardiomediastinum": (
        r"widen(?:ed|ing) (?:of the )?(?:superior |upper )?mediastin\w+|mediastin\w+ (?:is |"
        r"appears )?(?:not )?"
        r"(?:mildly |slightly )?widen(?:ed|ing)|mediastinal (?:widening|enlargement)|"
        r"enlarged (?:cardio)?mediastin\w+|"
        r"cardiomediastinal silhouette (?:is |appears |remains )?(?:not )?(?:mildly |moderately )?enlarged"
    ),
    "Cardiomegaly": (
        rf"cardiomegaly|cardiac enlargement|{_HEART} {_DEGREE}{{0,6}}{_BIG}\b|"
        rf"(?:enlarged|enlargement of|large|increased) (?:of )?(?:the )?{_HEART}|enlarged (?:heart|cardiac)|"
        r"(?:left |right )?ventricular (?:enlargement|prominence)"
    ),
    "Lung Opacity": (
        r"opaci(?:ty|ties|fication|fications|fied)|infiltrat(?:e|es|ion|ions)|air ?-?space (?:disease|"
        r"process)\w*|"
        r"(?:hazy|patchy|streaky|interstitial|reticular|nodular|focal) (?:\w+ )?(?:densit(?:y|ies)|markings)|"
        r"interstitial (?:prominence|thickening|disease)|(?:basilar|basal|lobe|lung) densit(?:y|ies)"
    ),
    "Lung Lesion": (
        r"nodul(?:e|es)|fibronodular|nodular (?:\w+ )?(?:opacit(?:y|ies)|densit(?:y|ies)|lesions?|focus|"
        r"foci)|"
        r"(?:lung|pulmonary|cavitary|parenchymal|lobe) lesions?|mass(?:es)?|mass ?-?like|tumou?rs?|"
        r"neoplas\w+|"
        r"metasta\w+|malignan\w+"
    ),
    "Edema": r"(?:o?edema)|(?:heart failure|\bchf)|(?:pulmonary )?vascular congestion with edema",
    "Consolidation": r"consolidat(?:ion|ions|ed|ive)",
    "Pneumonia": r"(?:broncho)?pneumonias?|pneumoni(?:c|tis)|infectious (?:process|infiltrates?)",
    "Atelectasis": (
        r"atelecta\w+|(?:lobe|lobar|lung|segmental) collapse|collapse of the (?:\w+ ){0,3}(?:lobe|"
        r"lung)|collapsed lung"
    ),
    "Pneumothorax": r"(?:hydro)?pneumothora(?:x|ces|cis|xes)",
    "Pleural Effusion": (
        r"(?<!pericardial )(?<!joint )effusions?|pleural fluid|(?:hydro|hemo)thorax|"
        r"fluid in the (?:\w+ )?pleural spaces?"
    ),
    "Pleural Other": (
        r"pleural (?:\w+ )?(?:thickening|scar\w*|plaques?|calcification|fibrosis)|"
        r"pleural ?(?:and )?(?:parenchymal)? scarring|apical (?:\w+ )?(?:cap|capping|thickening)|"
        r"thickening of the (?:\w+ )?pleura|fibrothorax"
    ),
    "Fracture": r"fractur(?:e|es|ed)",
    "Support Devices": (
        r"pacemakers?|pacing (?:device|leads?|wires?)|pacer|defibrillator|\baicd|\bicd|picc|port-?a-?cath|"
        r"mediport|"
        r"(?:infusion|chest|chemo) ports?|catheters?|(?:central|jugular|subclavian|"
        r"venous) (?:venous )?lines?|"
        r"(?:endotracheal|tracheostomy|nasogastric|orogastric|enteric|feeding|chest|thoracostomy|\bet|"
        r"\bng|\bog) "
        r"tubes?|support devices?|stents?|(?:sternotomy|sternal|epicardial|median sternotomy) wires?|"
        r"(?:surgical|vascular) clips?|prosthe(?:sis|tic valve)|valve replacement|balloon pump"
    ),
}
_FOUND = {label: re.compile(rf"\b(?:{pattern})(?!\w)") for label, pattern in _MENTIONS.items()}

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
_DOUBT = re.compile(
    r"\b(?:may|might|could|possibl[ey]|possibility|probabl[ey]|likely|suspected|suspicious|suspect|"
    r"question\w*|versus|"
    r"vs|cannot|can not|concern\w*|suggest\w*|differential|borderline|equivocal|if|consider\w*|or)\b"
)
_DOUBT_AFTER = re.compile(
    r"^[^,]{0,40}?\b(?:cannot|can not|could not|not) (?:\w+ )?(?:be )?(?:excluded|ruled out)|"
    r"^[^,]{0,25}?\b(?:possible|suspected|questioned|is considered|versus|vs)\b"
)
_SENTENCE = re.compile(r"(?<!\d)\.+(?=\s|$)|\.(?=\s+[a-z])|[;!?\n]+|(?<=\d)\.(?=\s|$)")
_BREAK = re.compile(
    r"\b(?:but|however|although|though|except|aside from|apart from|other than|otherwise|whereas|"
    r"there (?:is|are|has)|"
    r"which|with (?:persistent|stable|associated|adjacent|small|mild|minimal|moderate|large))\b|:"
)
_FRESH = re.compile(
    r"^\s*(?!(?:or|and|nor)\b)(?:\w+ )?(?:\w+ )?(?:small|mild|minimal|moderate|severe|trace|tiny|"
    r"stable|unchanged|persistent|"
    r"left|right|bilateral|bibasilar|subtle|increased|worsening|new|there is|there are|calcified|"
    r"cardiomegaly)\b"
)


def label_report(text: str) -> dict[str, Status]:
    """Label a report: observation to status, only those it speaks of, "No Finding" if all absent."""
    said: dict[str, Status] = {}
    for sentence in _SENTENCE.split(_normal(text)):
        for label, status in _label_sentence(sentence):
            said[label] = _stronger(said.get(label), status)
    ill = [
        label
        for label, status in said.items()
        if status is not Status.NEGATIVE and label != "Support Devices"
    ]
    if not ill:
        said["No Finding"] = Status.POSITIVE
    return said


def present_findings(text: str, *, uncertain: bool = True) -> frozenset[str]:
    """Observations a report holds for present, doubtful ones included unless told otherwise."""
    wanted = {Status.POSITIVE, Status.UNCERTAIN} if uncertain else {Status.POSITIVE}
    return frozenset(label for label, status in label_report(text).items() if status in wanted)


def _label_sentence(sentence: str) -> list[tuple[str, Status]]:
    return [
        (label, _status(sentence, match.start(), match.end()))
        for label, pattern in _FOUND.items()
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
    if negated or (_NEGATION_AFTER.search(after) and not _DOUBT_AFTER.search(after)):
        return Status.NEGATIVE
    if _DOUBT.search(before) or _DOUBT_AFTER.search(after) or "borderline" in inside:
        return Status.UNCERTAIN
    return Status.POSITIVE


def _reaches(before: str, cue_end: int) -> bool:
    """Say whether a negation runs on: through a list it does, into a fresh statement after a comma not."""
    rest = before[cue_end:]
    if rest.count(",") and _FRESH.search(rest.rsplit(",", 1)[1] + " "):
        return False
    return len(rest.split()) <= 16


def _stronger(one: Status | None, other: Status) -> Status:
    order = (Status.NEGATIVE, Status.UNCERTAIN, Status.POSITIVE)
    return other if one is None else max(one, other, key=order.index)


def _normal(text: str) -> str:
    return re.sub(r"[ \t\r\f\v]+", " ", text.lower().replace("’", "'").replace("-", " "))
