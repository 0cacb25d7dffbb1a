"""A ServerApp that asks every node for each stage in `stages` and writes the answers as files.

`study-dir/STAGE-SITE` holds the reply envelope, `STAGE-SITE.error` the reason when the node failed.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.relay import join_envelope, split_envelope
from tests.deploy.echo_client import unsigned

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    study = Path(str(context.run_config["study-dir"]))
    config = (study / "stages").read_text().split()
    sites = {node: "" for node in sorted(grid.get_node_ids())}
    sites = {node: reply.decode().split()[0] for node, reply in ask(grid, list(sites), "who", b"").items()}
    for round_number, stage in enumerate(config):
        name, _, size = stage.partition(":")
        if name == "raise":
            raise RuntimeError("the ServerApp was asked to fail")
        started = time.monotonic()
        for node, envelope in ask(grid, list(sites), name, payload(round_number, int(size or 40))).items():
            (study / f"{name}-{sites[node]}").write_bytes(envelope)
        print(f"exchange {stage} took {time.monotonic() - started:.3f} s", flush=True)


def ask(grid: Grid, nodes: list[int], stage: str, envelope: bytes) -> dict[int, bytes]:
    """Send one stage to all nodes and return the reply envelopes, errors as text."""
    records = {key: ConfigRecord(fields) for key, fields in split_envelope(stage, unsigned(envelope)).items()}
    messages = [Message(RecordDict(dict(records)), node, "query.relay") for node in nodes]
    waiting = set(grid.push_messages(messages))
    replies: dict[int, bytes] = {}
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            node = reply.metadata.src_node_id
            if reply.has_error():
                replies[node] = f"error {reply.error.code}: {reply.error.reason}".encode()
            else:
                replies[node] = bytes(join_envelope(reply.content)[1].body)
        time.sleep(0.1 if waiting else 0.0)
    return replies


def payload(round_number: int, size: int) -> bytes:
    """Pseudo-random bytes: Flower stores objects by content, so equal chunks would travel once."""
    block = hashlib.shake_256(str(round_number).encode())
    return block.digest(size)
