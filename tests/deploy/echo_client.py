"""A ClientApp that answers with what it got, its node's configuration and what it has imported."""

from __future__ import annotations

import sys
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.relay import join_envelope, split_envelope

app = ClientApp()


@app.query("relay")
def relay(message: Message, context: Context) -> Message:
    stage, envelope = join_envelope(message.content)
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
    records = {key: ConfigRecord(fields) for key, fields in split_envelope(stage, envelope).items()}
    return Message(RecordDict(records), reply_to=message)
