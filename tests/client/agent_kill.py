"""Serve one request in forked agents and kill them at random moments; prints what was seen as JSON.

`python -m tests.client.agent_kill HOME REQUEST WORK KILLS`: HOME is a site's directory before the request.
A program of its own, because torch's autograd does not survive a fork once it has run: here the model is
loaded once, and only the forked agents compute.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from client.agent import SiteAgent
from client.home import open_home, read_approved_study
from client.models import ModelPool
from common.files import write_atomic
from common.protocol import Stage, read_header
from tests.simulator import Clock

POOL = ModelPool()


def serve(home: Path, request: bytes, sent: Path) -> int:
    """Fork an agent that answers the request into `sent`; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        agent = SiteAgent(open_home(home), models=POOL, clock=Clock())
        write_atomic(sent, bytes(agent.handle(Stage.CONTRIBUTE, request)))
    finally:
        os._exit(0)


def charges(home: Path) -> int:
    return (home / "budget.jsonl").read_text().count('"kind":"charge"')


def main() -> None:
    source, request_path, work, kills = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        int(sys.argv[4]),
    )
    request = request_path.read_bytes()
    study = read_approved_study(open_home(source), read_header(request, max_body_bytes=1 << 40).study)
    with POOL.use(study, open_home(source).base_directory(study.base.name)):
        pass
    whole = work / "whole"
    shutil.copytree(source, whole)
    started = time.monotonic()
    os.waitpid(serve(whole, request, work / "whole.sent"), 0)
    whole_s = time.monotonic() - started
    chance, seen = random.Random(7), []
    for number in range(kills):
        home, sent, again = work / f"{number}", work / f"{number}.sent", work / f"{number}.again"
        shutil.copytree(source, home)
        pid = serve(home, request, sent)
        time.sleep(chance.uniform(0.0, 1.1 * whole_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        trial = {"sent": sent.exists(), "charged": charges(home)}
        os.waitpid(serve(home, request, again), 0)
        trial |= {"again": again.exists(), "charged_in_the_end": charges(home)}
        trial["same"] = trial["sent"] and again.read_bytes() == sent.read_bytes()
        seen.append(trial)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
