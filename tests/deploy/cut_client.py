"""A ClientApp in place of relay and agent: it answers with the same 48 MB however often it is asked.

The node's `agent` names a folder: the pid of each call is written there, and with a file `wait` in it, the
first call waits to be killed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.protocol import SERVER, Expected, open_message, seal_reply
from common.relay import RECORD, join_envelope, split_envelope
from tests.common.ledger.consortium import key_of
from tests.deploy.cut_study import SITE, cut_study, reply_body

app = ClientApp()


@app.query("relay")
def relay(message: Message, context: Context) -> Message:
    if message.content[RECORD]["stage"] == "whoami":
        return Message(RecordDict({RECORD: ConfigRecord({"site": SITE})}), reply_to=message)
    stage, envelope = join_envelope(message.content)  # type: ignore[arg-type]
    folder = Path(str(context.node_config["agent"]).removeprefix("unix://"))
    calls = len(list(folder.glob("call-*")))
    (folder / f"call-{calls}").write_text(str(os.getpid()))
    if (folder / "wait").exists() and calls == 0:
        time.sleep(600)
    asked = open_message(
        envelope, keys={SERVER: key_of("operator").public}, max_body_bytes=1 << 20,
        expected=Expected(study=cut_study().sha256, recipient=SITE),
    )  # fmt: skip
    answer = seal_reply(key_of(SITE), asked, nonce="1" * 32, body=reply_body())
    records = {name: ConfigRecord(record) for name, record in split_envelope(stage, answer).items()}
    return Message(RecordDict(records), reply_to=message)
