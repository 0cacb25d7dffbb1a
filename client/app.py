"""The Flower ClientApp: a thin relay of signed bytes between the server and the site agent.

It has no data, no keys and no torch; it understands neither what it carries nor what comes back. What it can
do at worst is what anybody on the wire can: withhold.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from common.protocol import Envelope, Stage

RELAY_TIMEOUT_S = 6 * 3600.0

Call = Callable[[Context, "Stage", "Envelope"], "Envelope"]


def relaying(call: Call) -> ClientApp:
    """Return a ClientApp that passes one envelope after another to `call` and its answer back."""
    app = ClientApp()

    @app.query("relay")
    def relay(message: Message, context: Context) -> Message:
        from common.protocol import Stage
        from common.relay import RECORD, join_envelope, split_envelope

        if message.content[RECORD]["stage"] == "whoami":
            salt = secrets.token_hex(8)  # or another site could name this object first (common/relay.py)
            site = ConfigRecord({"site": str(context.node_config["site"]), "salt": salt})
            return Message(RecordDict({RECORD: site}), reply_to=message)
        stage, envelope = join_envelope(message.content)  # type: ignore[arg-type]
        reply = call(context, Stage(stage), envelope)
        records = {name: ConfigRecord(record) for name, record in split_envelope(stage, reply).items()}
        return Message(RecordDict(records), reply_to=message)

    return app


def _through_socket(context: Context, stage: Stage, envelope: Envelope) -> Envelope:
    from client.service import call_agent

    return call_agent(str(context.node_config["agent"]), stage, envelope, timeout_s=RELAY_TIMEOUT_S)


app = relaying(_through_socket)
