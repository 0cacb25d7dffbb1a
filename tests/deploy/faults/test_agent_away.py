"""An agent that is being started again while the server asks: asked once more, not counted as missing."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from client.app import app as client_app
from client.service import AgentService
from common.protocol import SERVER, Message, Stage, pack_body, seal_request
from deploy.local.inprocess import run_inprocess
from server.cohort import Cohort, Outcome
from tests.benchmarks.exchange_study import Plan, serve_agents
from tests.common.ledger.consortium import key_of


def ask_all(cohort: Cohort, plan: Plan, round: int, *, within_s: float) -> Outcome:
    def accept(site: str, reply: Message) -> None:
        assert len(reply.body) > plan.size

    requests = {
        site: seal_request(
            key_of("operator"), study=plan.study.sha256, round=round, attempt=1, stage=Stage.CONTRIBUTE,
            sender=SERVER, recipient=site, nonce="0" * 32, previous="0" * 64, body=pack_body({}),
        )
        for site in plan.names
    }  # fmt: skip
    return cohort.exchange(requests, accept=accept, until_unix_s=time.time() + within_s)


def outcomes(*, absent_s: float, within_s: float, asked: int) -> list[Outcome]:
    """Ask two sites; both answer the first time, then the agents are gone for a while."""
    plan, app, seen = Plan(2, 1000, 0), ServerApp(), []
    with tempfile.TemporaryDirectory(prefix="fedrad-") as name:
        services = serve_agents(plan, Path(name))

        def stop_and_start() -> None:
            time.sleep(absent_s)
            services.extend(serve_agents(plan, Path(name)))

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            cohort = Cohort(grid, plan.study)
            cohort.present(wait_s=5.0, at_least=2)
            seen.append(ask_all(cohort, plan, 0, within_s=within_s))
            stop(services)
            threading.Thread(target=stop_and_start, daemon=True).start()
            for number in range(asked):
                cohort.present(wait_s=5.0, at_least=2)
                seen.append(ask_all(cohort, plan, 1 + number, within_s=within_s))

        nodes = {
            100 + number: {"site": site, "agent": f"unix://{name}/{site}.sock"}
            for number, site in enumerate(plan.names)
        }
        try:
            run_inprocess(app, client_app, node_configs=nodes, run_config={})
        finally:
            stop(services)
    return seen


def stop(services: list[AgentService]) -> None:
    while services:
        services.pop().stop(None)


def test_an_agent_that_is_back_within_the_deadline_is_not_missing() -> None:
    before, after = outcomes(absent_s=3.0, within_s=60.0, asked=1)
    assert before.answered == after.answered == ("site0", "site1")


def test_an_agent_that_stays_away_is_missing_by_name_and_waited_for_only_once() -> None:
    started = time.monotonic()
    _, first, second = outcomes(absent_s=3600.0, within_s=8.0, asked=2)
    assert time.monotonic() - started < 30.0
    for outcome in (first, second):
        assert outcome.answered == ()
        assert all("AgentUnavailable" in reason for reason in outcome.missing.values())
