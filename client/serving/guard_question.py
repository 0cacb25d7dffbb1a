"""Is the question about this chest radiograph? Rules over words, English and Chinese.

An indication is a patient's story and may name anything in medicine; it is refused only where it gives the
model orders. A question must ask about the findings of a chest radiograph. Guarantees: a pure function of the
text; the rules are in this file. It is no defence against somebody who wants to mislead the model: the model
itself only ever describes images.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

MAX_CHARACTERS = 2000


def _words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z])(?:{'|'.join(text.split())})(?![a-z])".replace("_", r"[\s-]+"))


_CHEST = _words(
    "chest thorax thoracic lungs? lobes? pulmonary pleura pleural heart hearts? cardiac cardiomediastinal "
    "cardiomegaly mediastin\\w+ hil(?:um|ar|a|i) diaphragms? hemidiaphragms? costophrenic ribs? clavicles? "
    "trachea\\w* airways? aort(?:a|ic) bronch\\w+ "
    "pneumonia pneumothora(?:x|ces) effusions? consolidations? atelecta\\w+ edema oedema opacit(?:y|ies) "
    "nodules? infiltrates? emphysema\\w* copd fibrosis interstitial granuloma\\w* tuberculosis "
    "pacemakers? catheters? endotracheal picc port-a-cath cxr"
)
_READING = _words(
    "x-?rays? radiographs? radiograms? films? images? pictures? scans? studies study views? findings? "
    "impressions? reports? describe description abnormal\\w* normal fractures? lines? tubes? devices? "
    "changes? interpret\\w* read reading"
)
_ELSEWHERE = _words(
    "brain heads? skulls? mri mr cts? ct_scans? tomograph\\w+ ultrasounds? sonogra\\w+ mammogra\\w+ "
    "endoscop\\w+ colonoscop\\w+ ecgs? ekgs? patholog\\w+ histolog\\w+ biops(?:y|ies) fundus retina\\w* skin "
    "dermato\\w+ knees? hips? ankles? wrists? hands? foot feet elbows? pelvis pelvic femurs? tibia\\w* "
    "teeth tooth dental lumbar kidneys? renal bladder uterus fetal fetus prostate bowel colon cats? dogs?"
)
_NOT_READING = _words(
    "prescri\\w+ dos(?:e|es|age|ages) milligrams? mg medications? antibiotics? drugs? treat(?:ments?)? "
    "therap\\w+ prognos\\w+ surviv\\w+ how_long_(?:does|will|do) life_expectancy insurance billing bill "
    "invoices? lawsuits? sue poems? songs? jokes? stor(?:y|ies) essays? recipes? cook\\w* weather capital "
    "president elections? stocks? bitcoin football soccer movies? python javascript code program\\w* script "
    "sql translate homework e-?mails? password\\w* hack\\w* horoscope "
    "who_(?:is|are|was)_(?:this|the)_(?:patient|person|man|woman) patient'?s?_name date_of_birth "
    "social_security address phone_number how_old marry love_you your_name who_made_you which_model"
)
_ORDERS = re.compile(
    r"(?:ignore|disregard|forget|override)\b.{0,40}\b(?:instructions?|rules?|prompts?|above|previous|everything)"
    r"|\b(?:system|developer)\s+(?:prompt|message)|\bjailbreak|\byou\s+are\s+now\b|\bpretend\b"
    r"|\bact\s+as\b|\brole-?\s?play|<\|?\w+\|?>|\[/?inst\]|\bassistant\s*:|\buser\s*:"
    r"|\b(?:write|tell|give|make)\s+(?:me\s+)?(?:a|an|some)\s+(?:poem|story|joke|song|recipe|code|program|script|essay)"
    r"|\b(?:say|write|report|state)\s+(?:only\s+)?(?:that\s+)?(?:everything|it|all|the\s+\w+)\s+(?:is|are)\s+normal\b"
    r"|(?:忽略|无视|不要理会|忘记).{0,20}(?:指令|规则|提示|以上|之前)|系统提示|假装|扮演|你现在是"
)
_ZH_CHEST = re.compile(
    r"胸|肺|心影|心脏|心胸|纵隔|肋|膈|气管|支气管|主动脉|胸腔|积液|气胸|结节|实变|不张|水肿|肺炎|结核|"
    r"起搏器|导管|插管|锁骨"
)
_ZH_READING = re.compile(r"片|影像|图像|报告|所见|发现|描述|异常|正常|印象|诊断意见|骨折|阅片|病灶|阴影")
_ZH_ELSEWHERE = re.compile(
    r"脑|头颅|颅|核磁|磁共振|超声|B超|b超|彩超|乳腺|钼靶|胃镜|肠镜|心电图|病理|活检|眼底|皮肤|膝|髋|踝|"
    r"手腕|手部|足|骨盆|腰椎|牙|肾|膀胱|子宫|胎儿|前列腺|(?:头|腹|胸)部?ct|猫|狗"
)
_ZH_NOT_READING = re.compile(
    r"处方|剂量|用药|吃什么药|开药|抗生素|怎么治|治疗方案|如何治疗|预后|能活多久|保险|费用|多少钱|诗|歌|笑话|"
    r"故事|作文|菜谱|天气|首都|总统|股票|足球|电影|代码|程序|翻译|邮件|密码|姓名|身份证|住址|电话|多大年纪|"
    r"你是谁|叫什么|算命"
)
_WHOLE = re.compile(
    r"(?:chest|thoracic)[\s-]+(?:x-?rays?|radiographs?|films?|images?|pictures?)|cxr|胸部?(?:正位)?[x线光]*片|胸部"
)
_REASONS = {
    "orders": (
        "the text gives the model orders instead of describing a patient or asking about the image",
        "文字是在向模型下指令，而不是描述病情或询问图像",
    ),
    "elsewhere": (
        "the question is about another examination or part of the body",
        "问题涉及其他检查或身体部位",
    ),
    "not-reading": (
        "the question asks for something other than the findings of a chest radiograph",
        "问题不是关于胸部X线片所见",
    ),
    "nothing": (
        "the question does not ask about a chest radiograph",
        "问题与胸部X线片无关",
    ),
    "long": (
        f"the text is longer than {MAX_CHARACTERS} characters",
        f"文字超过{MAX_CHARACTERS}个字符",
    ),
}


@dataclass(frozen=True, slots=True)
class QuestionVerdict:
    """Whether words are refused, and why, in English and Chinese ('' where they are not)."""

    refused: bool
    reason: str
    reason_zh: str


_FINE = QuestionVerdict(False, "", "")


def judge_indication(text: str) -> QuestionVerdict:
    """Judge why a study was made: refused only where it gives orders or is far too long."""
    plain = _plain(text)
    if len(text) > MAX_CHARACTERS:
        return _refused("long")
    return _refused("orders") if _ORDERS.search(plain) else _FINE


def judge_question(text: str) -> QuestionVerdict:
    """Judge a question: refused unless it asks about the findings of a chest radiograph. '' is fine."""
    plain = _plain(text)
    if not plain:
        return _FINE
    if len(text) > MAX_CHARACTERS:
        return _refused("long")
    if _ORDERS.search(plain):
        return _refused("orders")
    if _NOT_READING.search(plain) or _ZH_NOT_READING.search(plain):
        return _refused("not-reading")
    chest = _CHEST.search(plain) or _ZH_CHEST.search(plain)
    if _ELSEWHERE.search(plain) or _ZH_ELSEWHERE.search(plain):
        return _refused("elsewhere")
    if chest or _READING.search(plain) or _ZH_READING.search(plain):
        return _FINE
    return _refused("nothing")


def is_specific(text: str) -> bool:
    """Tell whether a question names something in the chest, rather than asking for a report."""
    plain = _WHOLE.sub(" ", _plain(text))
    return bool(_CHEST.search(plain) or _ZH_CHEST.search(plain))


def _plain(text: str) -> str:
    """Lower case, one form of each character, no invisible ones."""
    kept = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return " ".join("".join(kept).lower().split())


def _refused(why: str) -> QuestionVerdict:
    return QuestionVerdict(True, *_REASONS[why])
