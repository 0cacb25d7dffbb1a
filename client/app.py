"""The Flower ClientApp: a thin relay of signed bytes between the server and the site agent.

It has no data, no keys and no torch; it understands neither what it carries nor what comes back. What it can
do at worst is what anybody on the wire can: withhold.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

RECORD = "fedrad"
RELAY_TIMEOUT_S = 6 * 3600.0

app = ClientApp()


@app.query("relay")
def relay(message: Message, context: Context) -> Message:
    """Pass one envelope to the agent at node_config `agent` and return its answer."""
    from client.service import call_agent
    from common.protocol import Stage

    record = message.content[RECORD]
    stage = str(record["stage"])
    if stage == "whoami":
        answer = ConfigRecord({"site": str(context.node_config["site"])})
    else:
        reply = call_agent(
            str(context.node_config["agent"]),
            Stage(stage),
            bytes(record["envelope"]),  # type: ignore[arg-type]
            timeout_s=RELAY_TIMEOUT_S,
        )
        answer = ConfigRecord({"stage": stage, "envelope": reply})
    return Message(RecordDict({RECORD: answer}), reply_to=message)
