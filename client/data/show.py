"""`data show`: counts and histograms of a prepared data folder, and a contact sheet as one HTML file.

Guarantees: every text is escaped and the page forbids scripts and any network access by its own policy, so
a report cannot act on its reader; the sheet shows the same studies for the same seed. It shows
de-identified reports in full: keep the file inside the hospital.
"""

from __future__ import annotations

import base64
import html
import io
import json
import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from client.data.store import SPLITS, Pair, read_card, read_pairs

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" 
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2rem; color: #1b1f24; background: #f6f7f8; }}
h1 {{ font-size: 1.3rem; }} table {{ border-collapse: collapse; margin-bottom: 1.5rem; }}
td {{ padding: .1rem .8rem .1rem 0; }} td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.bar {{ background: #3b6ea5; height: .7rem; display: inline-block; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }}
article {{ background: #fff; border: 1px solid #d9dde1; border-radius: 6px; padding: .6rem; }}
article img {{ width: 100%; background: #000; border-radius: 4px; }}
.meta {{ color: #667; font-size: .8rem; overflow-wrap: anywhere; }} .flag {{ color: #a33; }}
</style></head><body><h1>{title}</h1>{tables}<main>{cards}</main></body></html>
"""


def describe(directory: Path) -> dict[str, Any]:
    """Return counts and histograms of a prepared data folder."""
    pairs = read_pairs(directory)
    facts = read_facts(directory)
    dropped: Counter[str] = Counter()
    drops = directory / "drops.jsonl"
    if drops.is_file():
        dropped.update(json.loads(line)["reason"] for line in drops.read_text("utf-8").splitlines())
    return {
        "studies": len(pairs),
        "patients": len({pair.patient for pair in pairs}),
        "splits": {split: sum(pair.split == split for pair in pairs) for split in SPLITS},
        "images": sum(len(pair.images) for pair in pairs),
        "views": dict(Counter(pair.view for pair in pairs).most_common()),
        "findings_words": _histogram([len(pair.findings.split()) for pair in pairs]),
        "languages": dict(Counter(fact.get("language", "") for fact in facts.values()).most_common()),
        "flags": dict(Counter(flag for fact in facts.values() for flag in fact["flags"]).most_common()),
        "dropped": dict(dropped.most_common()),
        "card": read_card(directory),
    }


def read_facts(directory: Path) -> dict[str, dict[str, Any]]:
    """Read `facts.jsonl`: study → facts; empty where there is none."""
    path = directory / "facts.jsonl"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as handle:
        return {fact["study"]: fact for fact in map(json.loads, handle)}


def contact_sheet(directory: Path, *, count: int, seed: int, flag: str = "") -> str:
    """Return an HTML page with counts and `count` randomly chosen studies, or those with one flag."""
    pairs = read_pairs(directory)
    facts = read_facts(directory)
    chosen = [pair for pair in pairs if not flag or flag in facts.get(pair.study, {}).get("flags", ())]
    chosen = random.Random(seed).sample(chosen, min(count, len(chosen)))  # noqa: S311 - a sample to look at
    described = describe(directory)
    tables = "".join(
        _table(name, described[name])
        for name in ("splits", "views", "languages", "findings_words", "flags", "dropped")
        if described[name]
    )
    cards = "".join(_card(directory, pair, facts.get(pair.study, {})) for pair in chosen)
    title = f"{described['studies']} studies of {described['patients']} patients"
    return _PAGE.format(title=html.escape(title), tables=tables, cards=cards)


def _card(directory: Path, pair: Pair, facts: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<img alt="" src="data:image/jpeg;base64,{_small(directory / name)}">' for name in pair.images
    )
    flags = " ".join(f'<span class="flag">{html.escape(flag)}</span>' for flag in facts.get("flags", ()))
    texts = "".join(
        f"<p><b>{name}</b> {html.escape(getattr(pair, name))}</p>"
        for name in ("indication", "findings", "impression")
        if getattr(pair, name)
    )
    meta = html.escape(f"{pair.study} · {pair.view} · {pair.split}")
    return f'<article>{pictures}<p class="meta">{meta} {flags}</p>{texts}</article>'


def _small(path: Path) -> str:
    with Image.open(path, formats=["PNG"]) as image:
        small = (
            image.point(lambda value: value / 256).convert("L")
            if image.mode == "I;16"
            else image.convert("L")
        )
        small.thumbnail((320, 320))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _histogram(values: list[int]) -> dict[str, int]:
    edges = (0, 5, 10, 20, 40, 80, 160, 320)
    counts = {f"{low}-{high - 1}": 0 for low, high in pairwise(edges)} | {f"{edges[-1]}+": 0}
    names = list(counts)
    for value in values:
        counts[names[max(at for at, edge in enumerate(edges) if value >= edge)]] += 1
    return counts


def _table(name: str, counts: Mapping[str, int]) -> str:
    most = max(counts.values()) or 1
    rows = "".join(
        f'<tr><td>{html.escape(str(key))}</td><td class="n">{value}</td>'
        f'<td><span class="bar" style="width:{12 * value / most:.2f}rem"></span></td></tr>'
        for key, value in counts.items()
    )
    return f"<table><caption>{html.escape(name.replace('_', ' '))}</caption>{rows}</table>"
