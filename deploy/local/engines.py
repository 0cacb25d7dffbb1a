"""The two ways to run a local consortium: one process, or Flower's own processes on loopback."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

from deploy.local.consortium import LocalConsortium


class Engine(StrEnum):
    INPROCESS = "inprocess"
    FLOWER = "flower"


Say = Callable[[str], None]


def run_engine(consortium: LocalConsortium, engine: Engine, *, say: Say) -> None:
    """Run the study's remaining rounds on an engine; raises what the ServerApp raised."""
    if engine is Engine.INPROCESS:
        _run_inprocess(consortium)
    else:
        with _socket_directory() as sockets:
            _run_flower(consortium, sockets, say)


def _run_inprocess(consortium: LocalConsortium) -> None:
    from client.agent import SiteAgent
    from client.models import ModelPool
    from deploy.local.inprocess import calling, run_inprocess
    from server.app import app as server_app

    models = ModelPool()
    agents = {site: SiteAgent(home, models=models) for site, home in consortium.homes.items()}
    try:
        run_inprocess(
            server_app,
            calling(agents),
            node_configs={number: {"site": site} for number, site in enumerate(sorted(agents), start=1)},
            run_config={"study-dir": str(consortium.server.absolute())},
        )
    finally:
        for agent in agents.values():
            agent.close()


def _run_flower(consortium: LocalConsortium, sockets: Path, say: Say) -> None:
    from deploy.local.flower import flower_engine

    addresses = {site: f"unix://{sockets / site}.sock" for site in consortium.homes}
    with flower_engine(consortium.out / "flower", sites=addresses, progress=say) as engine:
        for site, home in consortium.homes.items():
            engine.processes.start(
                f"agent-{site}",
                [sys.executable, "-m", "client.cli", "agent", "--home", str(home.directory.absolute()),
                 "--socket", str(sockets / f"{site}.sock")],
                environment=_agent_environment(),
            )  # fmt: skip
        say("waiting for the site agents")
        engine.processes.wait_until(
            lambda: all((sockets / f"{site}.sock").exists() for site in consortium.homes),
            what="the site agents to listen",
            timeout_s=120.0,
        )
        engine.run({"study-dir": str(consortium.server.absolute())}, on_log=say)


def _agent_environment() -> dict[str, str]:
    import os

    import client

    root = str(Path(client.__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def _socket_directory() -> Iterator[Path]:
    """A private short-named directory: Unix socket paths are limited to about 100 characters."""
    directory = Path(tempfile.mkdtemp(prefix="fedrad-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
