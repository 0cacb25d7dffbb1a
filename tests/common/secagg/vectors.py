"""Test vectors of the protocol: one whole round of five sites, one of which drops out, and refused messages.

`python -m tests.common.secagg.vectors` writes tests/vectors/secagg/*.json anew; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.secagg import messages as m
from common.secagg.context import setup_digest, survivor_set_digest, threshold
from tests.common.secagg.consortium import ADAPTER, Drop, consortium, run_round

FOLDER = Path(__file__).parents[2] / "vectors" / "secagg"
LENGTH = 9


def round_vector() -> dict[str, Any]:
    """Return every input, secret, message and digest of a round in which site-02 never uploads."""
    world = consortium(5, length=LENGTH, floor=3)
    round, out = run_round(world, {"site-02": Drop.BEFORE_UPLOAD})
    keys = {site: machine.advertise() for site, machine in round.sites.items()}
    key_set = m.KeySet(tuple(keys.values()))
    openings = round.server.openings()
    survivor_set = round.server.survivor_set
    sites: dict[str, Any] = {}
    for at, (name, site) in enumerate(round.sites.items()):
        entry: dict[str, Any] = {
            "identity_seed": (bytes([at + 1]) * 32).hex(),
            "identity_public": world.identities[name],
            "round_seed": site._seed.hex(),
            "mask_private": site._mask_private.hex(),
            "share_private": site._share_private.hex(),
            "self_seed": site._self_seed.hex(),
            "keys": m.format_keys(keys[name]).hex(),
            "shares": m.format_shares(site.deal(key_set)).hex(),
            "opening": m.format_opening(openings[name]).hex(),
            "vector": round.vectors[name].tolist(),
        }
        if site.upload is not None:
            entry["masked"] = round.masked[name].tolist()
            entry["upload"] = m.format_upload(site.upload).hex()
            entry["reveal"] = m.format_reveal(site.reveal(survivor_set)).hex()
        sites[name] = entry
    terms = world.terms
    return {
        "about": "docs/protocol/secagg.md; bytes in hex, vectors as uint32",
        "study": terms.study,
        "configuration": terms.configuration,
        "round": terms.round,
        "attempt": terms.attempt,
        "length": terms.length,
        "floor": terms.floor,
        "threshold": threshold(5),
        "adapter": ADAPTER,
        "terms_digest": terms.digest().hex(),
        "setup_digest": setup_digest(terms, key_set).hex(),
        "context_digest": round.server.context.hex(),
        "survivor_set_digest": survivor_set_digest(survivor_set).hex(),
        "key_set": m.format_key_set(key_set).hex(),
        "survivor_set": m.format_survivor_set(survivor_set).hex(),
        "sites": sites,
        "total": round.total.tolist(),
        "sum": np.asarray(out).tolist(),
    }


def refused_vector() -> list[dict[str, str]]:
    """Return messages that parsers must refuse, each with the name of the refusal."""
    whole = round_vector()
    site = whole["sites"]["site-00"]
    keys, key_set = bytes.fromhex(site["keys"]), bytes.fromhex(whole["key_set"])
    one = len(keys) - 6
    survivors, opening = bytes.fromhex(whole["survivor_set"]), bytes.fromhex(site["opening"])
    name = keys.index(b"site-00")
    cases: list[tuple[str, str, bytes, str]] = [
        ("keys", "empty", b"", "MessageMalformed"),
        ("keys", "another version", b"FRSA\x02" + keys[5:], "MessageMalformed"),
        ("keys", "another type", keys[:5] + b"\x07" + keys[6:], "MessageMalformed"),
        ("keys", "last byte missing", keys[:-1], "MessageMalformed"),
        ("keys", "a byte too many", keys + b"\x00", "MessageMalformed"),
        ("keys", "upper case in a site's name", keys[:name] + b"S" + keys[name + 1 :], "MessageMalformed"),
        ("key_set", "no sites", key_set[:6] + b"\x00", "MessageMalformed"),
        ("key_set", "a site twice", key_set[:6] + b"\x02" + key_set[7 : 7 + one] * 2, "SiteRepeated"),
        (
            "key_set",
            "sites out of order",
            key_set[:6] + b"\x02" + key_set[7 + one : 7 + 2 * one] + key_set[7 : 7 + one],
            "NotCanonical",
        ),
        ("opening", "one box missing", opening[: -m.BOX_BYTES], "MessageMalformed"),
        (
            "survivor_set",
            "more dropped than named",
            survivors[:-9] + b"\x02" + survivors[-8:],
            "MessageMalformed",
        ),
    ]
    return [
        {"message": kind, "what": what, "bytes": data.hex(), "refusal": refusal}
        for kind, what, data, refusal in cases
    ]


FILES: dict[str, Callable[[], Any]] = {"round.json": round_vector, "refused.json": refused_vector}


def text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, build in FILES.items():
        (FOLDER / name).write_text(text(build()))
