"""The ServerApp of the exchange benchmark; `study-dir/plan` says what to exchange."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.cohort import Cohort
from tests.benchmarks.exchange_study import Plan, run_exchanges

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    plan = Plan.parse((Path(str(context.run_config["study-dir"])) / "plan").read_text())
    run_exchanges(
        Cohort(grid, plan.study),
        plan,
        lambda kind, seconds: print(f"{kind} exchange took {seconds:.3f} s", flush=True),
    )
