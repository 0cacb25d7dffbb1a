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

from client.data.glossary import FLAGS, REASONS
from client.data.store import SPLITS, Pair, read_card, read_pairs

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ --ink: #1b1f24; --soft: #5c6670; --line: #d9dde1; --page: #f5f6f8; --sheet: #fff; --bar: #3b6ea5;
  --warn: #9a3412; --warn-bg: #fdf0e7; }}
* {{ box-sizing: border-box; }}
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 100rem;
  color: var(--ink); background: var(--page); }}
h1 {{ font-size: 1.4rem; margin: 0; }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .7rem; }}
.lead {{ color: var(--soft); margin: .2rem 0 1.2rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; }}
.tile, section, article {{ background: var(--sheet); border: 1px solid var(--line); border-radius: 8px; }}
.tile {{ padding: .6rem .9rem; }} .tile b {{ display: block; font-size: 1.5rem; font-weight: 600; }}
.tile span {{ color: var(--soft); }}
.tables {{ columns: 22rem; column-gap: .8rem; }}
section {{ padding: .7rem .9rem; margin-bottom: .8rem; break-inside: avoid; }}
table {{ border-collapse: collapse; width: 100%; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .3rem; }}
td {{ padding: .15rem .5rem .15rem 0; vertical-align: top; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.b {{ width: 34%; padding-right: 0; }}
td small {{ display: block; color: var(--soft); line-height: 1.3; }}
.bar {{ display: block; height: .6rem; margin-top: .35rem; border-radius: 2px; background: var(--bar); }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem; }}
article {{ overflow: hidden; }}
.pictures {{ display: flex; background: #000; }}
.pictures img {{ flex: 1; min-width: 0; height: 16rem; object-fit: contain; }}
.text {{ padding: .6rem .8rem .8rem; max-height: 19rem; overflow-y: auto; }}
.text p {{ margin: .35rem 0 0; overflow-wrap: anywhere; }}
.text b {{ color: var(--soft); font-size: .72rem; letter-spacing: .04em; text-transform: uppercase; }}
.meta {{ color: var(--soft); font-size: .78rem; overflow-wrap: anywhere; }}
.flag {{ display: inline-block; color: var(--warn); background: var(--warn-bg); border-radius: 4px;
  padding: 0 .4rem; margin: .2rem .25rem 0 0; font-size: .75rem; }}
@media print {{ body {{ background: none; padding: 0; }} article {{ break-inside: avoid; }}
  .text {{ max-height: none; }} }}
</style></head><body>
<h1>{title}</h1>
<p class="lead">De-identified reports in full: keep this page inside the hospital. {lead}</p>
<div class="tiles">{tiles}</div>
<h2>Counts</h2><div class="tables">{tables}</div>
<h2>{shown}</h2><main>{cards}</main></body></html>
"""


_CAPTIONS = {
    "dropped": "Left out, by reason",
    "flags": "Flags",
    "findings_words": "Words in the findings",
    "views": "View",
    "languages": "Language",
}


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
    matching = len(chosen)
    chosen = random.Random(seed).sample(chosen, min(count, len(chosen)))  # noqa: S311 - a sample to look at
    described = describe(directory)
    dropped = sum(described["dropped"].values())
    tiles = {
        "studies kept": described["studies"],
        "patients": described["patients"],
        "images": described["images"],
        "studies left out": dropped,
        **{f"in {split}": number for split, number in described["splits"].items()},
    }
    names = ("dropped", "flags", "findings_words", "views", "languages")
    gate = described["card"].get("leak_gate", {})
    lead = (
        f"Leak gate: {gate['known_recall']:.1%} of planted known and {gate['free_recall']:.1%} of free "
        "identifiers were removed."
        if gate
        else ""
    )
    shown = f"{len(chosen)} of {matching} studies" + (f" flagged {flag}" if flag else ", chosen at random")
    return _PAGE.format(
        title=html.escape(f"{described['studies']} studies of {described['patients']} patients"),
        lead=html.escape(lead),
        tiles="".join(
            f'<div class="tile"><b>{number:,}</b><span>{html.escape(name)}</span></div>'
            for name, number in tiles.items()
        ),
        tables="".join(_table(name, described[name]) for name in names if described[name]),
        shown=html.escape(shown),
        cards="".join(_card(directory, pair, facts.get(pair.study, {})) for pair in chosen),
    )


def _card(directory: Path, pair: Pair, facts: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<img alt="" src="data:image/jpeg;base64,{_small(directory / name)}">' for name in pair.images
    )
    flags = "".join(
        f'<span class="flag" title="{html.escape(FLAGS.get(flag, ""))}">{html.escape(flag)}</span>'
        for flag in facts.get("flags", ())
    )
    texts = "".join(
        f"<p><b>{name}</b><br>{html.escape(getattr(pair, name))}</p>"
        for name in ("indication", "findings", "impression")
        if getattr(pair, name)
    )
    meta = html.escape(f"{pair.study} · {pair.view} · {pair.split}")
    return (
        f'<article><div class="pictures">{pictures}</div>'
        f'<div class="text"><div class="meta">{meta}</div>{flags}{texts}</div></article>'
    )


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
    meanings: Mapping[str, str] = {**{str(reason): text for reason, text in REASONS.items()}, **FLAGS}
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}"
        + (f"<small>{html.escape(meanings[key])}</small>" if key in meanings else "")
        + f'</td><td class="n">{value:,}</td>'
        f'<td class="b"><span class="bar" style="width:{100 * value / most:.1f}%"></span></td></tr>'
        for key, value in counts.items()
    )
    caption = html.escape(_CAPTIONS.get(name, name))
    return f"<section><table><caption>{caption}</caption>{rows}</table></section>"
