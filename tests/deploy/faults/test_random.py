"""A hundred random faults in one run of four sites; the seed is printed and can be given: FEDRAD_FAULT_SEED.

Faults: kill -9 of every kind of process at the server and at random sites (supervisors included in what
restarts them), a torn last line left in a budget ledger or the study's logs with the kill of their writer, a
process that stands still for seconds, a site's connections cut for a few seconds. Studies follow one another
until all faults have been dealt; each is held to `verify_outcome`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.config import Study
from tests.deploy.faults.consortium import FaultyConsortium, faulty
from tests.deploy.site.test_gateway import ConnectProxy, connect_proxy

SITES = ("alpha", "beta", "gamma", "delta")
FAULTS = int(os.environ.get("FEDRAD_FAULTS", "100"))
ROUNDS = 6
KILLS = (
    "superlink",
    "superexec",
    "serverapp",
    "proxy",
    "supernode",
    "executor",
    "clientapp",
    "agent",
    "link",
)
OTHERS = ("torn-budget", "torn-log", "torn-ledger", "stall", "cut")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),  # at about eight seconds a fault
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@dataclass
class Dealer:
    """Deals faults to a running consortium; `dealt` counts those that hit something."""

    consortium: FaultyConsortium
    proxies: dict[str, ConnectProxy]
    draw: random.Random
    dealt: Counter[str] = field(default_factory=Counter)

    def deal(self, study: Study) -> None:
        kind, site = self.draw.choice((*KILLS, *OTHERS)), self.draw.choice(SITES)
        if self._do(kind, site, study):
            self.dealt[kind] += 1
            print(f"fault {self.dealt.total()}: {kind} {site}", flush=True)

    def _do(self, kind: str, site: str, study: Study) -> bool:
        if kind in KILLS:
            return self.consortium.kill(kind, site, wait_s=0.0) > 0
        if kind == "cut":
            return self._cut(site, self.draw.uniform(0.5, 5.0))
        if kind == "stall":
            return self._stall(self.draw.choice(("superlink", "serverapp", "agent", "supernode")), site)
        if kind == "torn-budget":
            return self._tear("agent", site, self.consortium.lab.directory / site / "budget.jsonl")
        name = {"torn-log": "log.jsonl", "torn-ledger": "ledger/entries.jsonl"}[kind]
        return self._tear("serverapp", site, self.consortium.folder(study) / name)

    def _tear(self, role: str, site: str, path: Path) -> bool:
        """Kill a file's writer, then leave half of its last line once more at its end, before it is back."""
        pid = self.consortium.kill(role, site, wait_s=0.0) if path.is_file() else 0
        if not pid:
            return False
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        last = (path.read_bytes().splitlines() or [b""])[-1]
        with path.open("ab") as handle:
            handle.write(last[: len(last) // 2])
        return True

    def _stall(self, role: str, site: str) -> bool:
        for pid in self.consortium.pids(role, site)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.draw.uniform(0.5, 5.0))
                os.kill(pid, signal.SIGCONT)
                return True
        return False

    def _cut(self, site: str, away_s: float) -> bool:
        proxy = self.proxies[site]
        proxy.down = True
        proxy.cut()
        time.sleep(away_s)
        proxy.down = False
        return True


def test_a_hundred_random_faults_change_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("FEDRAD_FAULT_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"FEDRAD_FAULT_SEED={seed}", flush=True)
    with contextlib.ExitStack() as stack:
        proxies = {site: stack.enter_context(connect_proxy()) for site in SITES}
        through = {site: ("--proxy", f"http://127.0.0.1:{proxy.port}") for site, proxy in proxies.items()}
        consortium = stack.enter_context(faulty(tmp_path, sites=SITES, arguments=through))
        quiet = consortium.submit("undisturbed", rounds=ROUNDS)
        consortium.finish(quiet)
        adapter = consortium.adapter(quiet)
        dealer = Dealer(consortium, proxies, random.Random(seed))
        ends: Counter[str] = Counter()
        number = 0
        while dealer.dealt.total() < FAULTS:
            number += 1
            study = consortium.submit(f"disturbed-{number}", rounds=ROUNDS, spare_rounds=200)
            while dealer.dealt.total() < FAULTS and not consortium.over(study):
                time.sleep(dealer.draw.expovariate(1 / 6.0))
                dealer.deal(study)
            consortium.finish(study, timeout_s=3600)
            ends[consortium.verify_outcome(study, adapter=adapter).partition(":")[0] or "same adapter"] += 1
        print(f"{number} studies, ends {dict(ends)}, faults {dict(dealer.dealt)}", flush=True)
        assert ends["same adapter"] > 0
