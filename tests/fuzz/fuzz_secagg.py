"""Coverage-guided fuzzing of secure aggregation: every parser, and both machines with what parses.

`python -m tests.fuzz.fuzz_secagg -max_total_time=3600` (package atheris); stops at the first input that
ends in anything but a message that formats back to the same bytes, or a named refusal. The corpus starts
from the published vectors.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-untyped, import-not-found]

with atheris.instrument_imports(include=["common.secagg", "client.secagg", "server.secagg"]):
    from client.secagg import SiteRound
    from common.errors import FedRadError
    from common.secagg import messages as m
    from tests.common.secagg.consortium import ADAPTER, Round, consortium

WORLD = consortium(3)
PARSERS: list[tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = [
    (m.parse_keys, m.format_keys),
    (m.parse_key_set, m.format_key_set),
    (m.parse_shares, m.format_shares),
    (m.parse_opening, m.format_opening),
    (m.parse_upload, m.format_upload),
    (m.parse_survivor_set, m.format_survivor_set),
    (m.parse_reveal, m.format_reveal),
]


def stages() -> tuple[list[Round], list[bytes]]:
    """Return a round before each of its stages, and the valid messages of every type."""
    rounds, messages = [], []
    for depth in range(4):
        round = Round.start(WORLD)
        rounds.append(round)
        if depth == 0:
            continue
        key_set = round.keys(WORLD.sites)
        if depth == 1:
            continue
        openings = round.deal(key_set, WORLD.sites)
        if depth == 2:
            continue
        survivor_set = round.upload(openings, WORLD.sites)
        site = round.sites["site-00"]
        snapshot, upload = site.snapshot(), site.upload
        signer = WORLD.signers["site-00"]
        twin = SiteRound.restore(snapshot, terms=WORLD.terms, identities=WORLD.identities, sign=signer)
        if upload is None:
            raise RuntimeError("expected an upload of the first site")
        messages = [
            m.format_keys(site.advertise()),
            m.format_key_set(key_set),
            m.format_shares(site.deal(key_set)),
            m.format_opening(openings["site-00"]),
            m.format_upload(upload),
            m.format_survivor_set(survivor_set),
            m.format_reveal(twin.reveal(survivor_set)),
        ]
    return rounds, messages


ROUNDS, VALID = stages()


def feed(kind: int, message: Any) -> None:
    """Hand a parsed message to the machine that waits for its type; it may only refuse by name.

    Machines that accept move on or stay: a fuzzer that forges no signature brings them only what is valid.
    """
    site = "site-00"
    steps: list[Callable[[], Any]] = [
        lambda: ROUNDS[0].server.accept_keys(message),
        lambda: ROUNDS[1].sites[site].deal(message),
        lambda: ROUNDS[1].server.accept_shares(message),
        lambda: ROUNDS[2].sites[site].open(message, adapter=ADAPTER),
        lambda: ROUNDS[2].server.announce(message),
        lambda: ROUNDS[3].sites[site].reveal(message),
        lambda: ROUNDS[3].server.accept_reveal(message),
    ]
    steps[kind]()


def one_input(data: bytes) -> None:
    """Try one input on the parser that its first byte names."""
    if not data:
        return
    kind = data[0] % len(PARSERS)
    parse, format_message = PARSERS[kind]
    try:
        message = parse(data[1:])
    except FedRadError:
        return
    if format_message(message) != data[1:]:
        raise ValueError("expected the one encoding of a message, got another that parses")
    try:
        feed(kind, message)
    except FedRadError:
        return


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind, message in enumerate(VALID):
            (Path(folder) / f"valid-{kind}").write_bytes(bytes([kind]) + message)
        atheris.Setup([*sys.argv, "-max_len=20000", "-len_control=0", folder], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
