"""How memory and CPU time of secure aggregation grow with sites and size, at a site and at the server.

`python -m tests.benchmarks.secagg_growth [--figure PNG] [--quick]` prints one JSON object. Memory is the
high-water mark of a process of its own above what it held before the first vector, as a multiple of the
vector's bytes; the vector itself counts. At the site: mask, pack, sign, spool; in the relay: join the frames,
split into Flower's parts; at the server: parts in, join, verify, add, site after site, then unmask. What
Flower holds meanwhile is in tests/deploy/test_cut_upload.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from client.secagg import SiteRound
from common.protocol import (
    SERVER,
    Expected,
    Message,
    Stage,
    cut_envelope,
    open_message,
    pack_body,
    seal_reply,
    unpack_body,
)
from common.relay import PART_BYTES, join_envelope, split_envelope
from common.secagg.messages import Opening, Upload, format_upload, parse_upload
from server.secagg import ServerRound
from tests.benchmarks.secagg import measure, repeat_upload
from tests.common.ledger.consortium import key_of
from tests.common.secagg.consortium import ADAPTER, Consortium, consortium
from tests.deploy.cut_study import cut_study, request

SITES = (2, 5, 10, 50)
VALUES = (5_000_000, 40_000_000)
FRAME_BYTES = 1 << 20


def resident_bytes(field: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"expected {field} in /proc/self/status")


def start_measuring() -> int:
    """Forget the high-water mark and return what this process holds now, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def multiple(before: int, values: int) -> float:
    return round((resident_bytes("VmHWM") - before) / (4 * values), 3)


def asked() -> Message:
    return open_message(
        request(), keys={SERVER: key_of("operator").public}, max_body_bytes=1 << 20,
        expected=Expected(study=cut_study().sha256, recipient="north", stage=Stage.CONTRIBUTE),
    )  # fmt: skip


def opened(world: Consortium) -> tuple[dict[str, SiteRound], ServerRound, dict[str, Opening]]:
    """Take a round to where the vectors are masked."""
    sites, server = {name: world.site(name) for name in world.sites}, world.server()
    for site in sites.values():
        server.accept_keys(site.advertise())
    key_set = server.close_keys()
    for site in sites.values():
        server.accept_shares(site.deal(key_set))
    openings = server.close_shares(adapter=ADAPTER)
    for name, site in sites.items():
        site.open(openings[name], adapter=ADAPTER)
    return sites, server, openings


def site_memory(values: int, count: int) -> dict[str, float]:
    world = consortium(count, length=values)
    machine, message = opened(world)[0][world.sites[0]], asked()
    with tempfile.TemporaryFile() as spool:
        before = start_measuring()
        units = np.random.default_rng(1).integers(0, 2**32, values, dtype=np.uint32)
        upload = machine.mask(units)
        body = pack_body({"form": "masked"}, format_upload(upload), units.data)
        del units
        reply = seal_reply(key_of("north"), message, nonce="1" * 32, body=body)
        del body
        spool.writelines((reply.frame, reply.body))
        at_site = multiple(before, values)
        del reply
        spool.seek(0)
        before = start_measuring()
        joined = bytearray()
        while frame := spool.read(FRAME_BYTES):
            joined += frame
        parts = split_envelope("contribute", cut_envelope(joined))
        in_relay = multiple(before, values)
    if sum(len(part["envelope"]) for part in parts.values()) != len(joined):
        raise ValueError("expected the envelope in parts")
    return {"site": at_site, "relay": in_relay}


def server_memory(values: int, count: int) -> dict[str, float]:
    world = consortium(count, length=values)
    sites, server, _ = opened(world)
    message = asked()
    with tempfile.TemporaryDirectory() as folder:
        masked = Path(folder) / "masked"
        upload = in_a_process(lambda: mask_into(sites[world.sites[0]], masked, values))
        before = start_measuring()
        total = np.zeros(values, np.uint32)
        for name in world.sites:
            repeated = repeat_upload(sites[name], upload, world.signers[name])
            in_a_process(lambda upload=repeated: seal_into(Path(folder) / "reply", masked, message, upload))  # type: ignore[misc]
            receive(Path(folder) / "reply", server, name, total)
        survivors = server.close_uploads()
        for name in world.sites:
            server.accept_reveal(sites[name].reveal(survivors))
        out = np.empty_like(total)
        server.unmask(total, out)
    return {"server": multiple(before, values)}


def in_a_process(step: Any) -> Any:
    """Run a step that returns an upload in a fork, so that its memory is not this process's."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, format_upload(step()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        encoded = pipe.read()
    os.waitpid(child, 0)
    return parse_upload(encoded)


def mask_into(machine: SiteRound, path: Path, values: int) -> Upload:
    units = np.random.default_rng(1).integers(0, 2**32, values, dtype=np.uint32)
    upload = machine.mask(units)
    units.tofile(path)
    return upload


def seal_into(path: Path, masked: Path, message: Message, upload: Upload) -> Upload:
    body = pack_body({"form": "masked"}, format_upload(upload), masked.read_bytes())
    path.write_bytes(bytes(seal_reply(key_of("north"), message, nonce="1" * 32, body=body)))
    return upload


def receive(path: Path, server: ServerRound, name: str, total: Any) -> None:
    """Take one reply in as the server does: parts, envelope, signature, digests, sum."""
    records: dict[str, Any] = {}
    with path.open("rb") as file:
        start = file.read(8)
        part = start + file.read(64 + int.from_bytes(start[4:], "big"))
        while part:
            number = len(records)
            records[f"fedrad.{number}" if number else "fedrad"] = {"stage": "contribute", "envelope": part}
            part = file.read(PART_BYTES)
    del part
    _, data = join_envelope(records)
    reply = open_message(
        data, keys={"north": key_of("north").public}, max_body_bytes=1 << 31,
        expected=Expected(study=cut_study().sha256, recipient=SERVER),
    )  # fmt: skip
    _, (upload, blob) = unpack_body(reply.body, fields={"form": str}, parts=2)
    server.announce(parse_upload(bytes(upload)))
    server.start_adding(name)
    server.add(np.frombuffer(blob, "<u4"), total)


def child(role: str, values: int, count: int) -> dict[str, float]:
    """Measure one role in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.secagg_growth", "--role", role, str(values), str(count)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    value: dict[str, float] = json.loads(done.stdout)
    return value


def growth(*, quick: bool) -> dict[str, Any]:
    """Return rows of memory (multiples of the vector) and CPU seconds by sites and values."""
    rows = []
    for values in VALUES[:1] if quick else VALUES:
        for count in SITES[:3] if quick else SITES:
            print(f"  {count} sites, {4 * values / 1e6:.0f} MB", file=sys.stderr, flush=True)
            memory = child("site", values, count) | child("server", values, count)
            site, server = measure(
                lambda line: None,
                count=count,
                dropped=int(count > 3),
                values=values,
                masking=min(count - 1, 2),
            )
            rows.append({
                "sites": count, "mb": 4 * values / 1e6, **{f"{k}_memory_x": v for k, v in memory.items()},
                "site_cpu_s": round(site, 3), "server_cpu_s": round(server, 3),
            })  # fmt: skip
    return {"rows": rows}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory and CPU time over the number of sites."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for style, mb in zip(("--", "-"), sorted({row["mb"] for row in rows}), strict=False):
        some = [row for row in rows if row["mb"] == mb]
        sites = [row["sites"] for row in some]
        for role, colour in (("site", "#1f6f8b"), ("relay", "#9a7b4f"), ("server", "#b3412f")):
            left.plot(
                sites, [row[f"{role}_memory_x"] for row in some], style, marker="o", ms=4, color=colour,
                label=f"{role}, {mb:.0f} MB",
            )  # fmt: skip
        for role, colour in (("site", "#1f6f8b"), ("server", "#b3412f")):
            right.plot(
                sites, [row[f"{role}_cpu_s"] for row in some], style, marker="o", ms=4, color=colour,
                label=f"{role}, {mb:.0f} MB",
            )  # fmt: skip
    left.axhline(3.0, color="#888888", lw=1, ls=":")
    left.text(2.1, 3.05, "bound", color="#666666", fontsize=8)
    left.set(ylim=(0, 3.4), ylabel="peak memory, multiples of the vector", xlabel="sites", xscale="log")
    right.set(ylabel="CPU seconds per round", xlabel="sites", xscale="log", yscale="log")
    for axis in (left, right):
        axis.set_xticks(SITES, [str(count) for count in SITES])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Growth of secure aggregation over sites and size.")
    parser.add_argument("--role", nargs=3, metavar=("ROLE", "VALUES", "SITES"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--quick", action="store_true", help="20 MB and at most 10 sites")
    arguments = parser.parse_args()
    if arguments.role:
        role, values, count = arguments.role
        measured = site_memory if role == "site" else server_memory
        print(json.dumps(measured(int(values), int(count))))
        return
    result = growth(quick=arguments.quick)
    if arguments.figure:
        draw(result["rows"], arguments.figure)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
