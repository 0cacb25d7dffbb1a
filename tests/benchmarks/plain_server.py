"""Plain Flower, the peer: FedAvg from Flower's own strategy module, with the time of each exchange.

`study-dir/plan` holds the number of nodes, of rounds, and of bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

_ARRAYS = 20


class TimedFedAvg(FedAvg):
    """FedAvg that prints the seconds from handing out a round's messages to having all replies."""

    _sent = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent = time.monotonic()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        print(f"large exchange took {time.monotonic() - self._sent:.3f} s", flush=True)
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    plan = (Path(str(context.run_config["study-dir"])) / "plan").read_text()
    nodes, rounds, size = map(int, plan.split())
    draw = np.random.default_rng(0)
    arrays = [draw.standard_normal(size // 4 // _ARRAYS, dtype=np.float32) for _ in range(_ARRAYS)]
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=rounds)
