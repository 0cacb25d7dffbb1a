"""Coverage-guided fuzzing of everything else that a peer's bytes reach, and of the agent as a whole.

`python -m tests.fuzz.fuzz_peer --all --seconds 3600 --log LOG` gives every target and `fuzz_secagg` the same
time and writes one line per target; `python -m tests.fuzz.fuzz_peer TARGET [libFuzzer options]` runs one.
An input must end in a value that formats back to the same bytes, or in a named error, within 20 s and 2 GiB.
JSON is also mutated as a tree and envelopes are signed again, so that inputs get past syntax and signature:
target `agent` is a relay and an operator who lies, target `reply` a site that lies. It needs atheris.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris  # type: ignore[import-untyped, import-not-found]

with atheris.instrument_imports(include=["common", "client", "server"]):
    from client import service
    from client.agent import SiteAgent
    from common import protocol
    from common.canonical import canonical_json, parse_canonical, sha256_hex
    from common.config import format_study, parse_study
    from common.errors import BaseInvalid, BodyTooLarge, FedRadError, NotCanonical
    from common.identity import SigningKey
    from common.ledger import bundle, checkpoint, entries, note, release_proof, witness
    from common.model.lora import vector_from_bytes
    from common.records import format_record, parse_record, sign_record, signed_from_json, signed_to_json
    from common.relay import join_envelope, split_envelope
    from server.aggregation import parse_floats, parse_units
    from server.round import parse_contribution, parse_hello

TARGETS = (
    "envelope", "body", "reply", "relay", "frames", "canonical", "study", "record", "note", "checkpoint",
    "cosign", "proof", "line", "verifier-key", "entry", "trust", "bundle", "vector", "agent",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 - 1, -(2**53) + 1, 0.5, 1e300, -1e-300, "", "a", "é", "\x00",
    "../x", "0" * 64, "a" * 64, [], {}, [[]], {"": ""}, [0] * 300, "x" * 5000,
)  # fmt: skip
Check = Callable[[bytes], None]
KEY = SigningKey.from_seed(bytes(range(32)))


@dataclass(frozen=True)
class Target:
    """Valid inputs, what to do with one, and where JSON lies in it: whole, or length-prefixed in frames."""

    seeds: list[bytes]
    check: Check
    json_at: str = ""


def exact(parse: Callable[[bytes], Any], format_value: Callable[[Any], bytes]) -> Check:
    """Check that what parses has one encoding."""

    def check(data: bytes) -> None:
        if format_value(parse(data)) != data:
            raise ValueError("expected the one encoding of a value, got another that parses")

    return check


def stable(parse: Callable[[bytes], Any], format_value: Callable[[Any], bytes]) -> Check:
    """Check that formatting loses nothing, where a manifest may leave out what has a default."""

    def check(data: bytes) -> None:
        value = parse(data)
        if parse(format_value(value)) != value:
            raise ValueError("expected formatting to keep a value, got another")

    return check


# --- targets ------------------------------------------------------------------------------------------------


def frame(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(2, "big") + header + body


def sealed(data: bytes, key: SigningKey, **places: str) -> bytes:
    """Sign a fuzzed header and body as their owner would; unsignable ones go out as they are."""
    size = int.from_bytes(data[:2], "big")
    encoded, body = data[2 : 2 + size], data[2 + size :]
    try:
        header = protocol.parse_header(encoded)
        about: dict[str, Any] = {"body_bytes": len(body), "body_sha256": sha256_hex(body), **places}
        return protocol.seal(key, replace(header, **about), body)
    except FedRadError:
        return b"FRM1" + len(encoded).to_bytes(4, "big") + encoded + bytes(64) + body


def envelope() -> Target:
    def check(data: bytes) -> None:
        expected = protocol.Expected(study="ab" * 32, recipient="alpha")
        opened = protocol.open_message(
            data, keys={protocol.SERVER: KEY.public}, expected=expected, max_body_bytes=1 << 16
        )
        if bytes(protocol.seal(KEY, opened.header, opened.body)) != data:
            raise ValueError("expected the one encoding of a message")

    return Target([request()], check)


def request(body: bytes | None = None) -> bytes:
    return bytes(protocol.seal_request(
        KEY, study="ab" * 32, round=3, attempt=1, stage=protocol.Stage.CONTRIBUTE, sender=protocol.SERVER,
        recipient="alpha", nonce="0" * 32, previous="cd" * 32,
        body=protocol.pack_body({"cohort": ["alpha"], "deadline_unix_s": 1.5}, b"part", b"")
        if body is None else body,
    ))  # fmt: skip


def body() -> Target:
    fields = {"adapter_sha256": str, "cohort": list, "deadline_unix_s": float, "records": list}

    def check(data: bytes) -> None:
        meta, parts = protocol.unpack_body(data, fields=fields, parts=2)
        if protocol.pack_body(meta, *parts) != data:
            raise ValueError("expected the one encoding of a body")

    meta = {"adapter_sha256": "a", "cohort": ["a"], "deadline_unix_s": 1.5, "records": [{}]}
    return Target([protocol.pack_body(meta, b"ab", b"c"), protocol.pack_body(meta, b"", b"")], check, "body")


def reply() -> Target:
    """A site's signed answers, to the server."""
    asked = protocol.open_message(
        request(), keys={protocol.SERVER: KEY.public},
        expected=protocol.Expected(study="ab" * 32, recipient="alpha"), max_body_bytes=1 << 20,
    )  # fmt: skip
    study = example_study()

    def check(data: bytes) -> None:
        message = protocol.open_message(
            sealed(data, KEY), keys={"alpha": KEY.public}, max_body_bytes=1 << 16,
            expected=protocol.Expected(
                study="ab" * 32, recipient=protocol.SERVER, sender="alpha", answers=asked.sha256
            ),
        )  # fmt: skip
        if message.header.kind is protocol.Kind.REFUSAL:
            protocol.unpack_body(message.body, fields={"error": str, "message": str})
            return
        for parse in (parse_hello, lambda m: whole_contribution(m, study)):
            with contextlib.suppress(FedRadError):
                parse(message)

    def answer(body: bytes, refusal: bool = False) -> bytes:
        answered = bytes(protocol.seal_reply(KEY, asked, nonce="1" * 32, body=body, refusal=refusal))
        size = int.from_bytes(answered[4:8], "big")
        return frame(answered[8 : 8 + size], body)

    hello = {"version": 1, "seen_round": -1, "seen_record": "ab" * 32}
    contribution = protocol.pack_body({"adapter_sha256": "a", "form": "f32"}, b"", b"", bytes(16))
    refusal = protocol.pack_body({"error": "WrongRound", "message": "expected"})
    return Target([answer(protocol.pack_body(hello)), answer(contribution), answer(refusal, True)], check)


def whole_contribution(message: protocol.Message, study: Any) -> None:
    *_, blob = parse_contribution(message, site="alpha", form="f32", adapter_sha256="a")
    parse_floats(blob, study=study, site="alpha")
    parse_units(blob, study=study, site="alpha")


def relay() -> Target:
    """Flower records as a hostile node may make them: JSON with bytes as latin-1 after a colon."""

    def check(data: bytes) -> None:
        value = json.loads(data.decode("latin-1")) if data[:1] == b"{" else None
        if not isinstance(value, dict) or not all(isinstance(fields, dict) for fields in value.values()):
            return
        records = {name: {k: flower_value(v) for k, v in fields.items()} for name, fields in value.items()}
        stage, joined = join_envelope({name: dict(fields) for name, fields in records.items()})
        for record in records.values():
            record.pop("salt", None)
        if split_envelope(stage, joined) != records:
            raise ValueError("expected the one split of an envelope")

    one = {"fedrad": {"stage": "keys", "envelope": ":abc"}}
    odd = {"fedrad": {"stage": "keys", "envelope": ":abc"}, "fedrad.1": {"stage": "keys", "envelope": ":d"}}
    return Target([canonical_json(one), canonical_json(odd)], lenient(check), "whole")


def flower_value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(":"):
        return value[1:].encode("latin-1", errors="replace")
    return value


def lenient(check: Check) -> Check:
    """Ignore inputs that are not even the JSON or UTF-8 that carries this target's values."""

    def checked(data: bytes) -> None:
        try:
            json.loads(data.decode("latin-1"))
        except (ValueError, RecursionError):
            return
        check(data)

    return checked


def frames() -> Target:
    """A stream of frames whose first bytes are length-prefixed pieces of the input."""

    def check(data: bytes) -> None:
        pieces, at = [], 0
        while at < len(data):
            size = data[at]
            pieces.append(SimpleNamespace(data=data[at + 1 : at + 1 + size]))
            at += 1 + size
        joined = service._join(iter(pieces), limit=limit)
        if joined != b"".join(piece.data for piece in pieces):
            raise ValueError("expected the pieces in their order")

    def limit(start: bytes) -> int:
        header = protocol.read_header(start, max_body_bytes=1 << 62)
        if header.body_bytes > 1 << 16:
            raise BodyTooLarge("expected less")
        return protocol.MAX_OVERHEAD_BYTES + header.body_bytes

    whole = request()
    cut = [whole[start : start + 255] for start in range(0, len(whole), 255)]
    return Target([b"".join(bytes([len(piece)]) + piece for piece in cut)], check)


def record() -> Target:
    from tests.fuzz.samples import round_record

    value = canonical_json(signed_to_json(sign_record(KEY, round_record())))

    def check(data: bytes) -> None:
        parsed = parse_canonical(data, max_bytes=1 << 20)
        if canonical_json(signed_to_json(signed_from_json(parsed))) != data:
            raise ValueError("expected the one encoding of a record")

    def either(data: bytes) -> None:
        try:
            check(data)
        except FedRadError:
            exact(parse_record, format_record)(data)

    return Target([value, format_record(round_record())], either, "whole")


def text_of(data: bytes) -> str:
    """Decode as the callers do; what is no UTF-8 never reaches the parser."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NotCanonical("expected UTF-8") from error


def example_study() -> Any:
    from tests.common.ledger.consortium import study

    return study()


def ledger_targets() -> dict[str, Target]:
    from tests.fuzz.samples import ledger_samples

    s = ledger_samples()
    text = exact(
        lambda d: checkpoint.parse_checkpoint(text_of(d)),
        lambda c: checkpoint.format_checkpoint(c).encode(),
    )
    vkey = exact(
        lambda d: note.parse_verifier_key(text_of(d)),
        lambda k: note.format_verifier_key(k).encode(),
    )
    trust = example_study()

    def proven(data: bytes) -> None:
        exact(checkpoint.parse_ledger_proof, checkpoint.format_ledger_proof)(data)
        release_proof.verify_statement(s.leaves[-1], data, [release_proof.trust_of(trust)])

    return {
        "note": Target(s.notes, exact(note.parse_note, note.format_note)),
        "checkpoint": Target(s.texts, text),
        "cosign": Target(s.requests, exact(witness.parse_cosign_request, witness.format_cosign_request)),
        "proof": Target(s.proofs, proven),
        "line": Target(s.lines, exact(note.parse_signature_line, note.format_signature_line)),
        "verifier-key": Target(s.keys, vkey),
        "entry": Target(s.leaves, stable(entries.parse_entry, entries.format_entry), "whole"),
        "trust": Target(
            [release_proof.format_trust(release_proof.trust_of(trust))],
            stable(release_proof.parse_trust, release_proof.format_trust), "whole",
        ),
        "bundle": Target([s.bundle], exact(bundle.parse_bundle, bundle.pack)),
    }  # fmt: skip


def vector() -> Target:
    tensors = example_study().adapter.tensors
    return Target(
        [bytes(16), b"\x00\x00\x80\x3f" * 4],
        exact(lambda d: vector_from_bytes(d, tensors), lambda v: v.tobytes()),
    )


class NoModels:
    """A pool that holds no model: where the agent would touch it, every check has passed."""

    def use(self, study: Any, base: Path) -> Any:
        raise BaseInvalid("reached the model")


def agent() -> Target:
    """Requests that the operator signed, to an agent before each stage of a real study."""
    from common.protocol import Stage
    from tests.simulator import Clock, build, record

    folder = Path(
        tempfile.mkdtemp(prefix="fedrad-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    )
    tempfile.tempdir = str(folder)
    tape = record(build(folder / "world", mode="consortium", rounds=2, seed=None), "alpha", folder / "tape")
    places = sorted(tape.requests, key=lambda place: (place[1], list(Stage).index(place[0])))
    agents: dict[int, tuple[SiteAgent, str]] = {}

    def fresh(number: int) -> SiteAgent:
        home = folder / f"agent-{number}"
        if number in agents:
            agents[number][0].close()
        shutil.rmtree(home, ignore_errors=True)
        stage, round = places[number]
        made = tape.agent_before(stage, round, home, models=NoModels(), clock=Clock())
        agents[number] = (made, state_of(made))
        return made

    def check(data: bytes) -> None:
        number = (data[0] if data else 0) % len(places)
        stage = list(Stage)[data[1] % 6] if data[1:2] and data[1] < 128 else places[number][0]
        site = agents[number][0] if number in agents else fresh(number)
        whole = sealed(data[2:], tape.world.operator)
        try:
            answered = site.handle(stage, whole)
            protocol.read_header(answered, max_body_bytes=1 << 20)
        finally:
            if state_of(site) != agents[number][1]:
                fresh(number)

    seeds = []
    for number, place in enumerate(places):
        size = int.from_bytes(tape.requests[place][4:8], "big")
        header, content = tape.requests[place][8 : 8 + size], tape.requests[place][72 + size :]
        seeds.append(bytes([number, 255]) + frame(header, content))
    return Target(seeds, check, "agent")


def state_of(site: SiteAgent) -> str:
    root = site.home.directory
    found = sorted(p for part in ("state", "budget.jsonl") for p in [root / part, *(root / part).rglob("*")])
    return hashlib.sha256(
        repr([(p, p.stat().st_mtime_ns) for p in found if p.is_file()]).encode()
    ).hexdigest()


def target_of(name: str) -> Target:
    plain: dict[str, Callable[[], Target]] = {
        "envelope": envelope, "body": body, "reply": reply, "relay": relay, "frames": frames,
        "record": record, "vector": vector, "agent": agent,
        "canonical": lambda: Target(
            [b'{"a":[1,2.5,"x"]}'],
            exact(lambda d: parse_canonical(d, max_bytes=1 << 16), canonical_json), "whole",
        ),
        "study": lambda: Target(
            [format_study(example_study())], stable(parse_study, format_study), "whole"
        ),
    }  # fmt: skip
    return plain[name]() if name in plain else ledger_targets()[name]


# --- mutation -----------------------------------------------------------------------------------------------


def mutate_tree(value: Any, draw: random.Random) -> Any:
    """Change one place of a JSON value: replace, remove, repeat, rename or nest."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(sorted(value))
        kind = draw.random()
        if kind < 0.7:
            return {**value, name: mutate_tree(value[name], draw)}
        if kind < 0.8:
            return {key: item for key, item in value.items() if key != name}
        return {**value, draw.choice(("", "x", name + "x", "é")): value[name]}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.7:
            return [*value[:at], mutate_tree(value[at], draw), *value[at + 1 :]]
        times = 0 if kind < 0.8 else draw.choice((2, 3, 70))
        return [*value[:at], *[value[at]] * times, *value[at + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.6:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(("", "0", "f", "-", ".", "/", "é", "\n")) + value[at + 1 :]
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.6:
        return draw.choice((value + 1, value - 1, -value, value * 2, float(value), 0))
    return draw.choice(ODD)


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        value = mutate_tree(value, draw)
    return canonical_json(value)


def mutate_body(data: bytes, draw: random.Random) -> bytes:
    """Change a body's JSON, or its parts with their sizes kept true."""
    size = int.from_bytes(data[:4], "big")
    meta, blob = json.loads(data[4 : 4 + size]), data[4 + size :]
    if draw.random() < 0.6 or not blob:
        encoded = mutate_json(canonical_json(meta), draw)
    else:
        at = draw.randrange(len(meta["parts"]))
        start = sum(meta["parts"][:at])
        part = blob[start : start + meta["parts"][at]]
        new = bytes(atheris.Mutate(part, min(1 << 18, 2 * len(part) + 64)))
        blob = blob[:start] + new + blob[start + len(part) :]
        meta["parts"][at] = len(new)
        encoded = canonical_json(meta)
    return len(encoded).to_bytes(4, "big") + encoded + blob


def mutate_framed(data: bytes, draw: random.Random) -> bytes:
    size = int.from_bytes(data[:2], "big")
    header, content = data[2 : 2 + size], data[2 + size :]
    if draw.random() < 0.4:
        header = mutate_json(header, draw)
    if draw.random() < 0.7:
        content = mutate_body(content, draw)
    return frame(header, content)


def mutator(target: Target) -> Callable[[bytes, int, int], bytes]:
    mutate: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "whole": mutate_json, "body": mutate_body,
        "agent": lambda d, r: bytes([d[0], r.choice((255, 255, r.randrange(128)))]) + mutate_framed(d[2:], r),
        "": mutate_framed,
    }  # fmt: skip

    def changed(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < (0.75 if target.json_at else 0.3):
            try:
                made = mutate[target.json_at](data, draw)
                if len(made) <= most:
                    return made
            except (ValueError, KeyError, IndexError, TypeError, RecursionError, OverflowError, FedRadError):
                pass
        return bytes(atheris.Mutate(data, most))

    return changed


# --- running ------------------------------------------------------------------------------------------------


def fuzz(name: str, options: list[str]) -> None:
    target = target_of(name)

    def one_input(data: bytes) -> None:
        with contextlib.suppress(FedRadError):
            target.check(data)

    for seed in target.seeds:
        one_input(seed)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds):
            (Path(folder) / f"valid-{number}").write_bytes(seed)
        most = max(65536, 2 * max(map(len, target.seeds)))
        limits = [f"-max_len={most}", "-len_control=0", "-timeout=20", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *options, *limits, folder], one_input, custom_mutator=mutator(target))
        atheris.Fuzz()


def fuzz_all(seconds: float, log: Path) -> int:
    """Run every target for its part of the time in a process of its own; returns how many failed."""
    programs = [("fuzz_peer", name) for name in (*TARGETS, "agent", "agent", "agent")]
    programs += [("fuzz_secagg", "secagg")] * 2
    failed, inputs, started = 0, 0, time.time()
    with log.open("a") as lines:
        for number, (module, name) in enumerate(programs):
            left = seconds - (time.time() - started)
            share = max(10, int(left / (len(programs) - number)))
            arguments = [name] if module == "fuzz_peer" else []
            command = [sys.executable, "-m", f"tests.fuzz.{module}", *arguments, f"-max_total_time={share}"]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            found = re.search(r"Done (\d+) (?:runs )?in (\d+)", done.stderr)
            runs = int(found.group(1)) if found else 0
            inputs += runs
            failed += done.returncode != 0
            print(f"{name}: {runs} inputs in {share} s, exit {done.returncode}", file=lines, flush=True)
            if done.returncode:
                print(done.stderr[-4000:], file=lines, flush=True)
        minutes = (time.time() - started) / 60
        print(f"all: {inputs} inputs in {minutes:.0f} min, {failed} targets failed", file=lines, flush=True)
    return failed


def main() -> int:
    if sys.argv[1:2] == ["--all"]:
        options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
        return min(1, fuzz_all(float(options["--seconds"]), Path(options["--log"])))
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print(f"expected --all or a target of {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    fuzz(sys.argv[1], sys.argv[2:])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
