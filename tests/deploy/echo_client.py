"""A ClientApp that answers with what it got, its node's configuration and what it has imported."""

from __future__ import annotations

import sys
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.protocol import Envelope
from common.relay import join_envelope, split_envelope

app = ClientApp()


def unsigned(body: bytes) -> Envelope:
    """Frame bytes that nobody signed: the relay reads no further than where the frame ends."""
    return Envelope(b"FRM1" + bytes(4 + 64), body)


@app.query("relay")
def relay(message: Message, context: Context) -> Message:
    stage, joined = join_envelope(message.content)
    envelope = bytes(joined.body)
    if stage == "fail":
        raise ValueError("asked to fail")
    if stage == "sleep":
        time.sleep(60)
    if stage == "who":
        envelope = f"{context.node_config['site']} {context.node_config['agent']}".encode()
    if stage == "turn":
        name = str(context.node_config["site"]).encode()
        envelope = name + envelope[::-1][len(name) :]
    if stage == "heavy":
        envelope = ",".join(name for name in ("torch", "transformers") if name in sys.modules).encode()
    records = {key: ConfigRecord(fields) for key, fields in split_envelope(stage, unsigned(envelope)).items()}
    return Message(RecordDict(records), reply_to=message)
