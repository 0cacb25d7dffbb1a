"""Rules that find identifiers in report text without knowing the patient: English, Spanish, Chinese.

Guarantees: closed list in a fixed order, applied in sequence, each replacing by `___`; a change of the list
changes `RULES_VERSION`. Rules prefer losing a word to keeping an identifier; they keep measurements,
vertebral levels and ages up to 89.
"""

from __future__ import annotations

import re
from functools import lru_cache

RULES_VERSION = "1"
MARK = "___"

_CAPITAL = r"[A-ZÀ-ÖØ-Þ][A-Za-zÀ-ÖØ-öø-ÿ'’-]*"
_PARTICLE = r"(?:(?:de|del|la|las|los|da|dos|van|von|der|den|di|el|al|bin)\s+){0,2}"
_INITIAL = r"(?:[A-Z]\.\s*)?"
_NAME = rf"{_INITIAL}{_PARTICLE}{_CAPITAL}(?:,?\s+{_INITIAL}{_PARTICLE}{_CAPITAL}){{0,2}}"
_CAPITALS = rf"{_PARTICLE}{_CAPITAL}(?:\s+{_PARTICLE}{_CAPITAL}){{0,2}}"
_MONTH = (
    r"(?:jan(?:uary|\.)?|feb(?:ruary|\.)?|mar(?:ch|\.)?|apr(?:il|\.)?|may|june?|july?|aug(?:ust|\.)?|"
    r"sept?(?:ember|\.)?|oct(?:ober|\.)?|nov(?:ember|\.)?|dec(?:ember|\.)?|enero|febrero|marzo|abril|mayo|"
    r"junio|julio|agosto|septiembre|setiembre|octubre|noviembre|diciembre)"
)
_DONE_BY = (
    r"(?:signed|dictated|reported|interpreted|verified|approved|transcribed|reviewed|performed|ordered|"
    r"discussed|communicated|conveyed|notified|informed|paged|called|telephoned|spoke|firmado|informado|"
    r"comunicado|comentado)"
)
_ROLE = (
    r"(?:attending|resident|fellow|radiologist|technologist|physician|nurse|clinician|surgeon|daughter|son|"
    r"wife|husband|mother|father|sister|brother|médico|radiólogo|radióloga|enfermera|hijo|hija|esposa)"
)
_TITLE = (
    r"(?:[Dd]rs?|DRS?|[Dd]octora?|[Mm]rs?|MRS?|[Mm]s|MS|[Mm]iss|[Pp]rof(?:essor)?|PROF|[Ss]ra?|[Ss]rta|"
    r"[Dd]ra|[Dd]oña)"
)
_CODE = r"[\w-]{0,30}\d[\w-]{0,30}"
_STREET = r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Square)"
_HAN = r"[\u4e00-\u9fff]"

RULES: tuple[tuple[str, str], ...] = (
    (
        "placeholder",
        r"\[\*\*.{0,80}?\*\*\]|\bX{3,}\b|<(?:PHI|REDACTED)>|\[(?:PHI|REDACTED)\]|(?<!_)(?:_{2}|_{4,})(?!_)",
    ),
    ("email", r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}"),
    ("web-address", r"(?i:https?://|www\.)\S{1,200}"),
    ("phone", r"(?<![\w.])\+?\(?\d{2,4}\)?[\s.-]\d{3,4}(?:[\s.-]\d{2,4}){1,3}(?!\w)"),
    (
        "phone",
        r"(?i:\b(?:pager|phone|tel|telephone|ext|extension|beeper|tel[eé]fono)\b|电话)\.?\s*"
        r"(?:(?i:no|number)\b\.?|#)?\s*[:：]?\s*\+?\d[\d() -]{2,20}\d",
    ),
    ("date", r"(?<![\w.])\d{1,4}\s?([/.-])\s?\d{1,2}\s?\1\s?\d{2,4}(?!\w)"),
    (
        "date",
        rf"(?i:\b\d{{1,2}}(?:st|nd|rd|th)?\s+(?:de\s+|of\s+)?{_MONTH}(?:,?\s+(?:de\s+|del\s+)?\d{{4}})?\b)",
    ),
    ("date", rf"(?i:\b{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?(?:,?\s+\d{{4}})\b)"),
    ("date", rf"(?i:\b(?!may\b){_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?!\s?(?:mm|cm)))"),
    ("date", rf"(?i:\b{_MONTH},?\s+(?:de\s+|of\s+|del\s+)?(?:19|20)\d{{2}}\b)"),
    ("date", r"(?:\d{2,4}\s*年\s*)?\d{1,2}\s*月\s*\d{1,2}\s*[日号]|\d{4}\s*年(?:\s*\d{1,2}\s*月)?"),
    ("date", r"(?<![\w.])(?:19[2-9]\d|20[0-4]\d)(?!\d|\.\d|\s?(?:mm|cm|ml|mAs|kV))"),
    (
        "time",
        r"(?i:\b\d{1,2}:\d{2}(?::\d{2})?(?:\s*(?:[ap]\.?m\b\.?|hrs?\b|hours?\b|h\b))?|\b\d{1,2}\s*[ap]\.?m\b\.?)",
    ),
    ("time", r"(?i:\b(?:[01]\d|2[0-3])[0-5]\d\s*(?:hrs?|hours|h)\b)"),
    (
        "labelled-number",
        r"(?i:\b(?:MRN|MR|medical record(?: number| no\.?)?|acc(?:ession)?(?: number| no\.?)?|SSN|NHS|DNI|ID|"
        r"patient id|case|exam|order|bed|room|ward|habitaci[oó]n|cama))\s*[#:：]\s*" + _CODE,
    ),
    (
        "labelled-number",
        r"(?i:\b(?:MRN|SSN|NHS number|medical record number|accession(?: number)?|DNI|room|bed|habitación))"
        r"\s+(?:is\s+)?" + _CODE,
    ),
    (
        "labelled-number",
        r"(?:住院号|门诊号|病历号|检查号|影像号|身份证号?|床号)\s*[:：]?\s*[A-Za-z0-9-]{1,30}",
    ),
    ("address", rf"\b\d{{1,5}}\s+(?:[NSEW]\.?\s+)?{_CAPITAL}(?:\s+{_CAPITAL}){{0,2}}\s+{_STREET}\b\.?"),
    ("address", rf"\b(?:Calle|Avenida|Avda|Plaza|Paseo)\.?\s+{_CAPITALS}(?:,?\s+(?:n[º°.]?\s*)?\d{{1,5}})?"),
    ("place", rf"\b(?:{_CAPITAL}\s+){{1,3}}(?:Hospital|Clinic|Medical Center|Health Center|Infirmary)\b"),
    ("place", rf"\bHospital\s+(?:Universitario\s+|General\s+|Cl[ií]nico\s+)?{_CAPITALS}"),
    ("place", rf"{_HAN}{{2,8}}(?:医院|卫生院|诊所)"),
    ("titled-name", rf"\b{_TITLE}\b\.?\s+{_NAME}"),
    ("titled-name", r"\b(?:dr|mr|mrs|prof|sra|dra)\.?\s+[a-zà-ÿ'’-]{2,30}"),
    ("titled-name", r"\b(?:DR|MR|MRS)\.?\s+[A-Z'’-]{2,30}"),
    (
        "signed-name",
        rf"\b(?i:{_DONE_BY})\s+(?i:electronically\s+)?(?:(?i:by|to|with|por|a|con)\s*:?\s+)?"
        rf"(?:(?i:the|la|el|{_ROLE})\s+){{0,3}}(?:{_TITLE}\.?\s+)?{_NAME}",
    ),
    ("signed-name", rf"\b(?i:{_ROLE})\s*:?\s+{_NAME}"),
    (
        "signed-name",
        rf"\b{_CAPITAL}(?:\s+{_INITIAL}{_CAPITAL}){{0,2}},\s*(?:MD|M\.D\.|DO|D\.O\.|RN|PhD|RT)(?!\w)",
    ),
    (
        "labelled-name",
        rf"\b(?i:patient name|patient|name|paciente|nombre|pt)\s*[:：]\s*{_NAME}"
        rf"|\b(?i:patient's name is|named|se llama)\s+{_NAME}",
    ),
    (
        "labelled-name",
        r"(?:患者|病人|姓名|审核|报告|检查|书写)(?:医师|医生|者|人|姓名)?\s*[:：]\s*[\u4e00-\u9fff·]{2,4}",
    ),
    ("titled-name", rf"{_HAN}{{1,3}}(?:医生|医师|主任|大夫|护士|先生|女士)"),
    (
        "age",
        r"(?<!\d)(?:9\d|1[0-2]\d)(?=\s*-?\s*(?i:y/?o\b|y\.o\.|yrs?\b|years?\b|año|Jahre)|\s*岁)",
    ),
    ("age", r"(?i:\b(?:aged?|edad(?: de)?)|年龄)\s*[:：]?\s*(?:9\d|1[0-2]\d)(?!\d)"),
    ("number", r"(?<![\w.])[A-Za-z]{1,4}-?\d{4,20}[\w-]{0,30}"),
    ("number", r"(?<![\d.])\d{5,40}(?!\d)"),
    ("number", r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"),
)


@lru_cache(maxsize=1)
def compiled_rules() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Compile the rules once, in order."""
    return tuple((name, re.compile(pattern)) for name, pattern in RULES)
