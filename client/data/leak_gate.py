"""The leak gate: plant synthetic identifiers in the site's own reports and count what is found.

Guarantees: deterministic for the same reports and seed; `verify_recall` refuses below the set levels, so an
import cannot finish with rules that fail on this site's way of writing. It measures identifiers of the kinds
it plants (names known and titled, numbers, dates, phones, addresses, ages); it is no proof about others.
Strangers' names without title or cue are planted and counted too, but not held to a level: rules miss
them, and the count says what a plugged-in recogniser adds.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from client.data.deidentify import Known, scrub
from client.data.recogniser import Recogniser
from client.data.reports import language_of
from common.errors import LeakGateFailed

KNOWN_RECALL, FREE_RECALL = 1.0, 0.98
SAMPLE = 200

_FAMILY = (
    "Abernathy",
    "Castellanos",
    "Featherstone",
    "Grimaldi",
    "Hollingsworth",
    "Iyengar",
    "Jankowski",
    "Larkin",
    "Mbeki",
    "Oyelaran",
    "Pemberton",
    "Rutherford",
    "Stavros",
    "Thackeray",
    "Uzun",
    "Yamamoto",
)
_GIVEN = (
    "Beatrix",
    "Clement",
    "Delphine",
    "Edmund",
    "Fatima",
    "Gideon",
    "Hermione",
    "Isidro",
    "Jolanta",
    "Kwame",
    "Leopold",
    "Mireille",
    "Nadia",
    "Octavio",
    "Priya",
    "Quentin",
)
_HAN_NAMES = ("欧阳明慧", "司徒建国", "诸葛晓琳", "慕容海涛", "端木春兰")
# Apart from the others, so that one planted name does not hide what became of another.
_UNCUED_FAMILY = ("Vasquez-Pike", "Thorvaldsen", "Okafor", "Bellweather", "Marchetti", "Lindholm")
_UNCUED_GIVEN = ("Rosamund", "Tobias", "Ingeborg", "Chidi", "Floriana", "Anselm")
_KNOWN: dict[str, tuple[str, ...]] = {
    "en": (
        "Patient {given} {family} was seen.",
        "{family}, {given} returns.",
        "Chart {id}.",
        "Study of {date}.",
        "Requested by {physician}.",
        "{upper} tolerated the examination.",
        "Accession number {accession}.",
    ),
    "es": (
        "Paciente {given} {family}.",
        "Historia {id}.",
        "Estudio del {date}.",
        "Solicitado por {physician}.",
    ),
    "zh": ("患者{han}。", "住院号{id}。", "检查日期{han_date}。", "{han}，咳嗽。"),
}
_FREE: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        ("Results were given to Dr. {stranger}.", "{stranger}"),
        ("Called to Mrs. {stranger} at {time}.", "{stranger}"),
        ("Compared with {month} {day}, {year}.", "{month} {day}"),
        ("Electronically signed by {stranger_full}.", "{stranger_full}"),
        ("Contact {phone}.", "{phone}"),
        ("Mail {mail}.", "{mail}"),
        ("A {age} year old woman.", "{age}"),
        ("Lives at {number} {stranger} Street.", "{stranger}"),
        ("SSN {ssn}.", "{ssn}"),
        ("MRN: {mrn}.", "{mrn}"),
        ("Transferred from {stranger} Hospital.", "{stranger}"),
        ("Seen at {time}.", "{time}"),
    ),
    "es": (
        ("Informado a la Dra. {stranger}.", "{stranger}"),
        ("Control del {day} de marzo de {year}.", "{year}"),
        ("Mujer de {age} años.", "{age}"),
        ("Teléfono {phone}.", "{phone}"),
        ("Vive en Calle {stranger} {number}.", "{stranger}"),
    ),
    "zh": (
        ("报告医师：{han}。", "{han}"),
        ("{year}年{day}月{day}日复查。", "{year}年"),
        ("{age}岁女性。", "{age}"),
        ("检查号：{mrn}。", "{mrn}"),
    ),
}
_UNCUED: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        ("As {uncued} wanted, an upright view was taken.", "{uncued}"),
        ("{uncued} agrees.", "{uncued}"),
        ("The side was confirmed, {uncued} being present.", "{uncued}"),
    ),
    "es": (("Presente {uncued}.", "{uncued}"), ("{uncued} está de acuerdo.", "{uncued}")),
    "zh": (("{uncued_han}在场。", "{uncued_han}"), ("由{uncued_han}陪同。", "{uncued_han}")),
}


@dataclass(frozen=True, slots=True)
class LeakScore:
    """How many planted identifiers were found, known ones and free ones, and which templates leaked."""

    known_planted: int
    known_found: int
    free_planted: int
    free_found: int
    uncued_planted: int
    uncued_found: int
    leaked: dict[str, int]

    @property
    def known_recall(self) -> float:
        """Share of known identifiers found, 0 to 1."""
        return self.known_found / max(1, self.known_planted)

    @property
    def free_recall(self) -> float:
        """Share of identifiers found without knowing them, 0 to 1."""
        return self.free_found / max(1, self.free_planted)

    @property
    def uncued_recall(self) -> float:
        """Share of strangers' names without title or cue that are found, 0 to 1."""
        return self.uncued_found / max(1, self.uncued_planted)


def measure_leaks(reports: Sequence[str], *, seed: int, recognise: Recogniser | None = None) -> LeakScore:
    """Plant three identifiers in each report, scrub, and count those that are gone."""
    chooser = random.Random(seed)  # noqa: S311 - test material, not secrets
    counts: Counter[str] = Counter()
    leaked: Counter[str] = Counter()
    for text in reports:
        language = language_of(text) or "en"
        values, known = _invent(chooser)
        sentence = chooser.choice(_KNOWN[language])
        free, secret = chooser.choice(_FREE[language])
        uncued, name = chooser.choice(_UNCUED[language])
        parts = text.split(". ")
        parts.insert(chooser.randint(0, len(parts)), sentence.format(**values).rstrip("."))
        parts.insert(chooser.randint(0, len(parts)), free.format(**values).rstrip("."))
        parts.insert(chooser.randint(0, len(parts)), uncued.format(**values).rstrip("."))
        cleaned = scrub(". ".join(parts), known, recognise).text
        for kind, template, secrets in (
            ("known", sentence, [values[name] for name in re.findall(r"{(\w+)}", sentence)]),
            ("free", free, [secret.format(**values)]),
            ("uncued", uncued, [name.format(**values)]),
        ):
            counts[f"{kind} planted"] += 1
            if any(_fold(part) in _fold(cleaned) for part in secrets):
                leaked[template] += 1
            else:
                counts[f"{kind} found"] += 1
    return LeakScore(
        known_planted=counts["known planted"],
        known_found=counts["known found"],
        free_planted=counts["free planted"],
        free_found=counts["free found"],
        uncued_planted=counts["uncued planted"],
        uncued_found=counts["uncued found"],
        leaked=dict(sorted(leaked.items())),
    )


def verify_recall(score: LeakScore) -> None:
    """Raise LeakGateFailed when a recall is under its level."""
    if score.known_recall < KNOWN_RECALL or score.free_recall < FREE_RECALL:
        raise LeakGateFailed(
            f"expected recall {KNOWN_RECALL} of known and {FREE_RECALL} of free planted identifiers, got "
            f"{score.known_recall:.3f} and {score.free_recall:.3f}; leaking: {', '.join(score.leaked)}"
        )


def _invent(chooser: random.Random) -> tuple[dict[str, str], tuple[Known, ...]]:
    family, given, other = chooser.choice(_FAMILY), chooser.choice(_GIVEN), chooser.choice(_FAMILY)
    physician, han = chooser.choice([name for name in _FAMILY if name != family]), chooser.choice(_HAN_NAMES)
    year, month, day = chooser.randint(2005, 2023), chooser.randint(1, 12), chooser.randint(1, 12)
    number = chooser.randint(10**6, 10**7 - 1)
    values = {
        "family": family,
        "given": given,
        "upper": f"{family} {given}".upper(),
        "id": f"H{number}",
        "accession": f"{chooser.randint(10**7, 10**8 - 1)}",
        "date": chooser.choice(
            (f"{day:02d}/{month:02d}/{year}", f"{year}-{month:02d}-{day:02d}", f"{month}/{day}/{year}")
        ),
        "han_date": f"{year}年{month}月{day}日",
        "physician": physician,
        "han": han,
        "stranger": other,
        "stranger_full": f"{chooser.choice(_GIVEN)} {other}",
        "time": f"{chooser.randint(1, 12)}:{chooser.randint(10, 59)} {chooser.choice(('am', 'pm'))}",
        "month": chooser.choice(("January", "Feb", "October", "December")),
        "day": str(day),
        "year": str(chooser.randint(1998, 2004)),
        "phone": f"{chooser.randint(200, 999)}-{chooser.randint(200, 999)}-{chooser.randint(1000, 9999)}",
        "mail": f"{other.lower()}@clinic.example",
        "age": str(chooser.randint(90, 108)),
        "number": str(chooser.randint(1, 400)),
        "ssn": f"{chooser.randint(100, 899)}-{chooser.randint(10, 99)}-{chooser.randint(1000, 9999)}",
        "mrn": f"{chooser.randint(10**5, 10**6 - 1)}",
        "uncued": f"{chooser.choice(_UNCUED_GIVEN)} {chooser.choice(_UNCUED_FAMILY)}",
        "uncued_han": chooser.choice([name for name in _HAN_NAMES if name != han]),
    }
    known = (
        ("name", f"{family}^{given}"),
        ("name", han),
        ("id", values["id"]),
        ("id", values["accession"]),
        ("study_date", f"{year}{month:02d}{day:02d}"),
        ("physician", physician),
    )
    return values, known


def _fold(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))
