"""Report text: sections by their headings, references to earlier studies removed, doubtful text flagged.

Guarantees: works by rules only, in English, Spanish and Chinese; what is removed is counted and the rules
have a version; a sentence is kept unless a rule names it. It does not understand the report: a section
without a heading and a reference in unusual words stay as they are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

PRIORS_VERSION = "2"
SECTIONS = ("indication", "findings", "impression")

_HEADINGS: Mapping[str, tuple[str, ...]] = {
    "indication": (
        "indication", "indications", "clinical indication", "clinical history", "clinical information",
        "history", "reason for exam", "reason for examination", "reason for study", "indicación",
        "indicacion", "motivo de consulta", "datos clínicos", "datos clinicos", "información clínica",
        "临床诊断", "临床病史", "检查目的", "病史", "主诉", "临床资料",
    ),
    "findings": (
        "findings", "finding", "report", "description", "hallazgos", "descripción", "descripcion", "informe",
        "检查所见", "影像所见", "影像表现", "放射学表现", "所见", "表现", "x线表现",
    ),
    "impression": (
        "impression", "impressions", "conclusion", "conclusions", "opinion", "summary", "assessment",
        "impresión", "impresion", "conclusión", "conclusion", "conclusiones", "impresión diagnóstica",
        "juicio diagnóstico",
        "诊断意见", "影像诊断", "诊断印象", "放射学诊断", "印象", "诊断", "结论", "意见",
    ),
    "comparison": (
        "comparison", "comparisons", "comparison studies", "compared to", "prior studies", "comparación",
        "comparacion", "estudios previos", "对比", "比较", "前片",
    ),
    "technique": (
        "technique", "procedure", "exam", "examination", "study", "views", "técnica", "tecnica",
        "exploración",
        "检查方法", "检查技术", "检查名称", "检查部位",
    ),
    "other": (
        "signed", "electronically signed by", "recommendation", "recommendations", "addendum", "attestation",
        "dictated by", "recomendación", "firmado", "报告医师", "审核医师", "报告日期", "建议",
    ),
}  # fmt: skip
_PRIOR_WORDS = (
    r"(?:prior|previous(?:ly)?|earlier|preceding|comparison|compared|compare|last|recent)\b.{0,60}?\b"
    r"(?:study|studies|exam\w*|radiograph\w*|film\w*|x-?rays?|image\w*|ct|scan\w*|chest|report)"
    r"|(?:compared|comparison|relative) (?:to|with|is made)|in (?:the )?interval"
    r"|since (?:the )?(?:prior|previous|last|___)"
    r"|as compared"
    r"|estudios? (?:previos?|anterior(?:es)?)|radiograf[ií]as? (?:previas?|anterior(?:es)?)"
    r"|comparad[oa]s? con"
    r"|respecto (?:a|al) (?:estudio |control )?(?:previo|anterior)"
    r"|(?:与|较|对比|比较).{0,12}?(?:前片|前次|旧片|既往|上次|原片|___)|前片|旧片"
)
# Words that only make sense against an earlier study; dropping them keeps the finding.
_CHANGE_WORDS = (
    r"(?:interval(?:ly)?|new(?:ly)?|unchanged|stable|persistent(?:ly)?|residual|again|worsen(?:ed|ing)|"
    r"improv(?:ed|ing)|increas(?:ed|ing)|decreas(?:ed|ing)|resolv(?:ed|ing)|progressi(?:on|ve)|similar)"
)
# What an earlier image showed and this one does not.
_GONE = (
    r"\b(?:has|have) (?:\w+ )?(?:resolved|cleared)\b|\b(?:has|have) (?:since |\w+ )?been (?:\w+ )?removed\b"
    r"|\bthere has been (?:(?:an|the|apparent|partial|complete|interval) )*"
    r"(?:removal|extubation|resolution|clearing|no (?:significant |interval )*change)\b"
)
_CHANGES = (
    (r"\bthere has been (?:(?:an|the|apparent|interval) )*development of\b", "There is"),
    (
        r"\bthere (?:has been|is) (?:(?:an|the|some|apparent|interval|slight|mild) )*improvement (?:in|of)\b",
        "There is",
    ),
    (
        r"\b(?:better |as )?(?:demonstrated |seen )?(?:from|on|than|to|with) (?:the )?prior(?: ___)?"
        r"(?=\s*[.,;]|$)",
        "",
    ),
    (r"\bpreviously (?:seen|noted|described|identified|demonstrated|mentioned)\s+", ""),
    (r"\s+(?:but|and)\s+(?:stable|unchanged)(?=\s*[.,;]|$)", ""),
    (r"(?<=[a-z]),?\s+(?:stable|unchanged)(?=\s*[,.;])", ""),
    (
        r"\b(?:interval|again|newly|unchanged|stable|"
        r"(?:slightly |mildly )?(?:improving|improved|worsening|worsened)),?\s+(?!of\b|in\b)(?=[a-zà-ÿ])",
        "",
    ),
)
# Words that refer to an earlier image; what still has them after the removal is flagged.
_REFERS = re.compile(
    r"\b(?:compared|comparison|interval|unchanged|stable|previously (?:seen|noted|described|identified))\b"
    r"|\b(?:prior|previous|earlier|last|preceding) (?:study|studies|exam\w*|radiograph\w*|film\w*|x-?rays?|"
    r"image\w*|imaging|ct|scan\w*|chest|report)\b"
    r"|\b(?:has|have) (?:\w+ )?(?:resolved|cleared)\b"
    r"|前片|旧片|较前|estudios? (?:previos?|anterior)|sin cambios",
    re.I,
)
_NO_CHANGE = (
    r"\W*(?:no (?:significant |interval )*change\b|unchanged\b|stable exam|sin cambios|(?:未见|无)明显变化)"
)
_TEMPLATE = re.compile(
    r"\b(?:normal|clear|unremarkable|no acute|within normal limits|intact)\b"
    r"|未见异常|未见明显|sin alteraciones",
    re.I,
)
_MACHINE = re.compile(
    r"as an ai\b|language model|i cannot (?:provide|interpret)|here is (?:the|a) (?:report|summary)|\*\*[A-Z]"
    r"|^#{1,3} |please consult (?:a|your)|\bcertainly[!,]",
    re.I | re.M,
)
# Two examinations in one report: the image shows the chest only.
_OTHER_PART = re.compile(
    r"\b(?:KUB|knees?|ankles?|hip joint|(?<!abdomen and )pelvis|femur|tibia|foot|wrists?|elbows?|skull|"
    r"sinuses|rodilla|tobillo|cadera|muñeca|codo)\b|膝关节|踝关节|骨盆|腕关节|肘关节",
    re.I,
)
_NEGATION = re.compile(
    r"\b(?:no|not|without|negative for|free of|absence of|resolved|rather than|sin|ni|niega)\b"
    r"|未见|无|没有|否认",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Report:
    """A report in sections, and whether any heading was found."""

    sections: dict[str, str]
    had_headings: bool


def split_sections(text: str) -> Report:
    """Cut free report text at its headings; without a findings heading, what comes first is findings."""
    pattern = re.compile(_heading_pattern(), re.I | re.M)
    sections: dict[str, list[str]] = {}
    current, position = "before", 0
    for match in pattern.finditer(text):
        sections.setdefault(current, []).append(text[position : match.start()])
        current, position = section_of(match.group("heading")), match.end()
    sections.setdefault(current, []).append(text[position:])
    before = sections.pop("before", [])
    if "findings" not in sections and any(part.strip() for part in before):
        sections["findings"] = before
    return Report({name: one_line(" ".join(parts)) for name, parts in sections.items()}, current != "before")


def section_of(heading: str) -> str:
    """Return the section that a heading starts."""
    plain = " ".join(heading.lower().split())
    return next((name for name, headings in _HEADINGS.items() if plain in headings), "other")


def remove_priors(text: str) -> tuple[str, int]:
    """Remove what refers to earlier studies: whole sentences that only compare, phrases in others.

    Returns the text and the number of removals. Source of the idea: CXR-PRO (Ramesh et al. 2022).
    """
    removed = 0
    kept = []
    for sentence in sentences(text):
        shorter, count = _without_priors(sentence)
        removed += count
        if any(char.isalpha() for char in shorter.replace("___", "")):
            kept.append(shorter)
    return " ".join(kept), removed


def sentences(text: str) -> list[str]:
    """Split text into sentences, keeping their stops."""
    parts = re.split(r"(?<=[.;!?])\s+(?=[A-ZÀ-Þ0-9_\"'(¿])|(?<=[。；！？])\s*", text)
    return [part.strip() for part in parts if part.strip()]


def flags_of(sections: Mapping[str, str]) -> tuple[str, ...]:
    """Return the flags of a report, sorted: what a reader should look at before trusting the pair."""
    findings, impression = sections.get("findings", ""), sections.get("impression", "")
    flags = set()
    parts = sentences(findings)
    if parts and all(_TEMPLATE.search(part) or _NEGATION.search(part) for part in parts):
        flags.add("template-normal")
    if _MACHINE.search(findings) or _MACHINE.search(impression):
        flags.add("machine-text")
    if _REFERS.search(findings) or _REFERS.search(impression):
        flags.add("refers-to-prior")
    if _OTHER_PART.search(findings):
        flags.add("other-body-part")
    if len(set(parts)) < len(parts):
        flags.add("repeated-sentence")
    if len(findings.split()) < 5 and language_of(findings) != "zh":
        flags.add("very-short")
    if findings.count("___") * 8 > max(1, len(findings.split())):
        flags.add("much-redacted")
    return tuple(sorted(flags))


def negated(text: str) -> bool:
    """Tell whether words before a finding deny it, in English, Spanish or Chinese."""
    return _NEGATION.search(text) is not None


def language_of(text: str) -> str:
    """Guess zh, es or en from script and common words; 'en' when unsure, '' without letters."""
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return ""
    if sum("CJK" in unicodedata.name(char, "") for char in letters[:400]) * 4 > len(letters[:400]):
        return "zh"
    words = re.findall(r"[a-záéíóúñ]+", text.lower())
    spanish = sum(
        word in {"de", "la", "el", "los", "las", "sin", "se", "con", "en", "del", "no"} for word in words
    )
    english = sum(
        word in {"the", "is", "are", "of", "no", "and", "with", "there", "in", "or"} for word in words
    )
    return "es" if spanish > english else "en"


def one_line(text: str) -> str:
    """Normalise to NFC on one line without control characters, stray colons, dashes and stops."""
    kept = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char for char in text)
    line = " ".join(unicodedata.normalize("NFC", kept).split()).strip(" :-")
    return re.sub(r"(?<=[.!?])(?: \.)+(?= |$)", "", line)


def _heading_pattern() -> str:
    latin: list[str] = []
    han: list[str] = []
    for headings in _HEADINGS.values():
        for heading in headings:
            (han if ord(heading[-1]) > 0x2E7F else latin).append(re.escape(heading).replace(r"\ ", r"\s+"))
    order = sorted(set(latin), key=lambda entry: (-len(entry), entry))
    hans = sorted(set(han), key=lambda entry: (-len(entry), entry))
    return (
        rf"(?:^|(?<=[.\n;)])\s*|(?<=___)\s*)\W{{0,4}}(?P<heading>(?:{'|'.join(order)})(?=\s*:)|(?:{'|'.join(order)})(?=\s*$)"
        rf"|(?:{'|'.join(hans)})(?=\s*[:：\n]))\s*[:：]?"
    )


def _without_priors(sentence: str) -> tuple[str, int]:
    if not re.search(_PRIOR_WORDS, sentence, re.I):
        return ("", 1) if re.match(_NO_CHANGE, sentence, re.I) else _drop_change(sentence)
    # "X, unchanged compared to the prior study" keeps X: cut from the comparing phrase to the stop.
    clause = re.compile(
        rf"[,(]?\s*(?:\b(?:and|but|which|is|are|has|have|been|likely|significantly|slightly|mildly|not)\s+)*"
        rf"(?:{_CHANGE_WORDS}\s+)?(?:\b(?:from|as|when|to|than|with|since|in|on)\s+)*(?:the\s+)?(?:{_PRIOR_WORDS})[^,，;.。；]*\)?",
        re.I,
    )
    rest, count = clause.subn("", sentence)
    rest = re.sub(r"^\s*[,，]\s*", "", rest).strip()
    substance = (
        len(re.findall(r"[a-zà-ÿ]{3,}", rest, re.I)) >= 2 or len(re.findall(r"[\u4e00-\u9fff]", rest)) >= 3
    )
    if not substance or re.match(_NO_CHANGE, rest, re.I):
        return "", 1
    rest, more = _drop_change(rest[:1].upper() + rest[1:])
    return rest, count + more


def _drop_change(sentence: str) -> tuple[str, int]:
    """Drop words of change; a sentence that says nothing but 'unchanged' or 'resolved' goes as a whole."""
    if re.search(_GONE, sentence, re.I):
        return "", 1
    if re.search(
        r"\b(?:is|are|remains?|appears?|overall)?\s*(?<!but )(?<!and )(?<!, )(?:unchanged|stable)\s*[.;]?$",
        sentence,
        re.I,
    ):
        return "", 1
    shorter, count = sentence, 0
    for pattern, instead in _CHANGES:
        shorter, more = re.subn(pattern, instead, shorter, flags=re.I)
        count += more
    shorter, more = re.subn(
        r"[，,]?较前(?:片)?(?:明显|稍|略)?(?:增多|减少|吸收|好转|进展|相仿|增大|缩小)", "", shorter
    )
    return (shorter[:1].upper() + shorter[1:], count + more) if count + more else (sentence, 0)
