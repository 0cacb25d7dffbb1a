"""A ServerApp that asks one site once, by the project's own exchange, and writes down what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.canonical import sha256_hex
from common.protocol import Message
from server.cohort import Cohort
from tests.deploy.cut_study import SITE, cut_study, request

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    cohort, started = Cohort(grid, cut_study()), time.time()
    cohort.present(wait_s=60.0, at_least=1)
    got: list[str] = []

    def accept(site: str, reply: Message) -> None:
        got.append(sha256_hex(reply.body))

    print("asking", flush=True)
    outcome = cohort.exchange({SITE: request()}, accept=accept, until_unix_s=time.time() + 300.0)
    value = {
        "got": got, "missing": outcome.missing, "messages": cohort.traffic.messages,
        "seconds": time.time() - started,
    }  # fmt: skip
    (Path(str(context.run_config["study-dir"])) / "outcome.json").write_text(json.dumps(value))
