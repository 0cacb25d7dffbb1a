"""A clock that is off by an hour: named at the site, no loss for the others, forgotten once it is right."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from client.agent import SiteAgent
from client.home import open_home
from deploy.site.status import read_status, words
from server.checkpoint import read_records
from tests.deploy.faults.consortium import SITES, faulty
from tests.deploy.site.test_hard_times import WRONG_CLOCK
from tests.simulator import POOL, build


def test_an_agent_an_hour_ahead_refuses_by_name_and_the_round_goes_on_without_it(tmp_path: Path) -> None:
    world = build(tmp_path, mode="consortium", rounds=1)
    home = open_home(world.out / "sites" / "beta")
    world._agents["beta"] = SiteAgent(home, models=POOL, clock=lambda: world.clock() + 3600)
    world.run()
    world.close()
    [signed] = read_records(world.server)
    assert sorted(signed.record.contributions) == ["alpha", "delta", "gamma"]
    events = [json.loads(line) for line in (world.server / "log.jsonl").read_text().splitlines()]
    [reason] = [event["missing"]["beta"] for event in events if event["event"] == "round"]
    assert "DeadlinePassed" in reason and "clock" in reason


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
@pytest.mark.parametrize("offset_s", [3600, -3600])
def test_a_site_an_hour_off_is_told_so_and_joins_when_its_clock_is_right(
    tmp_path: Path, offset_s: int
) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WRONG_CLOCK.replace("{offset_s}", str(offset_s)))
    wrong = {"PYTHONPATH": str(hook)}
    others = tuple(site for site in SITES if site != "alpha")
    with faulty(tmp_path, environment={"alpha": wrong}, online=others) as consortium:
        lab = consortium.lab
        home = lab.home("alpha")
        lab.wait(lambda: "clock" in words(read_status(home, now=time.time()), now=time.time()).lower(),
                 "the site to name its clock", timeout_s=600)  # fmt: skip
        study = consortium.submit("skewed")
        time.sleep(20)
        assert not (consortium.folder(study) / "rounds").exists(), "a round without the site"
        lab.stop("alpha")
        lab.start_site("alpha")
        consortium.finish(study)
        after = consortium.submit("right")
        consortium.finish(after)
        assert consortium.verify_outcome(study, adapter=consortium.adapter(after)) == ""
