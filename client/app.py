"""The Flower ClientApp: a thin relay of signed bytes between the server and the site agent.

It has no data, no keys and no torch; it understands neither what it carries nor what comes back. What it can
do at worst is what anybody on the wire can: withhold.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

RELAY_TIMEOUT_S = 6 * 3600.0

app = ClientApp()


@app.query("relay")
def relay(message: Message, context: Context) -> Message:
    """Pass one envelope to the agent at node_config `agent` and return its answer."""
    from client.service import call_agent
    from common.protocol import Stage
    from common.relay import RECORD, join_envelope, split_envelope

    if message.content[RECORD]["stage"] == "whoami":
        site = ConfigRecord({"site": str(context.node_config["site"])})
        return Message(RecordDict({RECORD: site}), reply_to=message)
    stage, envelope = join_envelope(message.content)  # type: ignore[arg-type]
    reply = call_agent(str(context.node_config["agent"]), Stage(stage), envelope, timeout_s=RELAY_TIMEOUT_S)
    records = {name: ConfigRecord(record) for name, record in split_envelope(stage, reply).items()}
    return Message(RecordDict(records), reply_to=message)
