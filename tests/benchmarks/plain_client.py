"""Plain Flower, the peer: a ClientApp that trains nothing and sends changed arrays back."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    noise = np.random.default_rng(abs(hash(str(context.node_config["site"]))) % 2**32)
    arrays = [
        array + noise.standard_normal(1, dtype=np.float32)
        for array in message.content["arrays"].to_numpy_ndarrays()
    ]
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
