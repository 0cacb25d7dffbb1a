"""`fedrad-server up` and `fedrad-site up` as real processes, through a real nginx."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.enrolment import read_enrolled
from client.home import approve_study, list_studies
from deploy.local.flower import CARRIER_MEMORY
from deploy.site.status import read_status, words
from server.checkpoint import read_records
from server.submission import find_submitted
from tests.deploy.lab import ROOT, RealConsortium, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@pytest.fixture()
def consortium(tmp_path: Path) -> Iterator[RealConsortium]:
    with running(tmp_path, enrolled=("north", "south", "west")) as made:
        yield made


def command(*arguments: str) -> None:
    """Run a command of `fedrad-server` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy.server.cli", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def verify_carriers_give_memory_back(environments: dict[str, dict[str, str]]) -> None:
    """What carries vectors gives their memory back at once; the agent, which computes, does not."""
    carriers = (
        "deploy.server.superlink",
        "flower-superexec",
        "flwr-serverapp",
        "client.supernode",
        "executor",
    )
    for name in (*carriers, "client.cli agent", "deploy.site.cli link"):
        found = [one for command, one in environments.items() if name in command]
        assert found, (name, sorted(environments))
        for one in found:
            assert (CARRIER_MEMORY.items() <= one.items()) == (name in carriers), name


def test_a_study_runs_when_all_approve_and_reaches_only_its_sites(consortium: RealConsortium) -> None:
    consortium.start_server()
    for site in ("north", "south", "west"):
        consortium.start_site(site)
    consortium.wait(lambda: consortium.online("north", "south", "west"), "three sites online")
    consortium.submit("chest", ("north", "south"), rounds=3)
    consortium.approve("north")
    consortium.wait(
        lambda: list(consortium.status()["studies"].get("chest", {}).get("missing", {})) == ["south"],
        "north's approval at the server",
    )
    assert consortium.study_state("chest") == "waiting"
    consortium.approve("south")
    consortium.wait(lambda: consortium.rounds("chest") >= 1, "a round")
    verify_carriers_give_memory_back(consortium.environments())
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end")
    assert consortium.rounds("chest") == 3
    assert len(read_records(consortium.directory / "srv" / "studies" / "chest")) == 3
    quiet = (consortium.directory / "west" / "logs" / "supernode.log").read_text()
    assert "Receiving" not in quiet and "SuperNode ID" in quiet
    told = words(read_status(consortium.home("north"), now=time.time()), now=time.time())
    assert "connected to localhost" in told and "3 of 3 rounds are done" in told
    assert consortium.status()["running"] and consortium.status()["ready"]
    for name in list(consortium.processes):
        consortium.stop(name)
    assert not consortium.left_over()
    ended = consortium.status()
    assert (ended["running"], ended["ready"], ended["programs"]) == (False, False, {})
    assert consortium.study_state("chest") == "finished" and not consortium.online("north")
    gone = words(read_status(consortium.home("north"), now=time.time()), now=time.time())
    assert "not running" in gone


def kill_server_app(consortium: RealConsortium) -> None:
    killed = consortium.pids("flwr-serverapp")
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)


def test_a_revoked_site_is_out_at_the_next_round_and_the_others_go_on(consortium: RealConsortium) -> None:
    """Also over the death of the ServerApp, which starts again without it."""
    consortium.start_server()
    for site in ("north", "south", "west"):
        consortium.start_site(site)
    consortium.submit("chest", ("north", "south", "west"), rounds=10, deadline_s=30)
    for site in ("north", "south", "west"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.rounds("chest") >= 2, "two rounds")
    consortium.revoke("west")
    consortium.wait(lambda: "west" not in consortium.study_nodes("chest"), "the registry in force")
    at = consortium.rounds("chest")
    consortium.wait(lambda: consortium.rounds("chest") > at, "a round without it")
    kill_server_app(consortium)
    consortium.wait(lambda: consortium.study_state("chest") == "retrying", "the ServerApp's end")
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end", timeout_s=400)
    assert consortium.status()["studies"]["chest"]["missing"] == {"west": "revoked"}
    cohorts = [event["cohort"] for event in consortium.events("chest") if event["event"] == "round"]
    assert len(cohorts) == 10 and cohorts[0] == ["north", "south", "west"]
    assert at < 9, "the revocation came too late to be seen"
    assert all(cohort == ["north", "south"] for cohort in cohorts[at + 1 :]), (at, cohorts)
    consortium.wait(
        lambda: "SiteRevoked" in read_status(consortium.home("west"), now=time.time())["error"],
        "the site to know",
    )


def test_kill_9_of_the_server_costs_no_round_and_leaves_no_process(consortium: RealConsortium) -> None:
    consortium.start_server()
    for site in ("north", "south"):
        consortium.start_site(site)
    consortium.submit("chest", ("north", "south"), rounds=5)
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.rounds("chest") >= 2, "two rounds")
    consortium.kill("srv")
    token = (consortium.directory / "srv" / "state" / "supervisor.token").read_text()
    from deploy.local.guardian import marked_processes

    end = time.monotonic() + 15
    while marked_processes(token) and time.monotonic() < end:
        time.sleep(0.1)
    assert not marked_processes(token)
    consortium.start_server()
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end")
    numbers = [event["round"] for event in consortium.events("chest") if event["event"] == "round"]
    assert numbers == [0, 1, 2, 3, 4]


def test_a_server_restored_elsewhere_goes_on_and_gets_the_approvals_it_lost(
    consortium: RealConsortium, tmp_path: Path
) -> None:
    """The copy is made in the middle of a study; its ServerApp stands still, so that no round is lost."""
    consortium.start_server()
    for site in ("north", "south"):
        consortium.start_site(site)
    consortium.submit("chest", ("north", "south"), rounds=6)
    for site in ("north", "south"):
        consortium.approve(site)
    second = consortium.submit("second", ("north", "south"), rounds=2).study.sha256
    consortium.wait(
        lambda: all(second in list_studies(consortium.home(site)) for site in ("north", "south")),
        "the second study at both sites",
    )
    consortium.wait(lambda: consortium.rounds("chest") >= 2, "two rounds")
    for pid in consortium.pids("flwr-serverapp"):
        os.kill(pid, signal.SIGSTOP)
    assert 2 <= consortium.rounds("chest") < 6
    passphrase, copy = tmp_path / "passphrase", tmp_path / "copy.fedrad"
    passphrase.write_text("correct horse battery staple\n")
    command(*("backup", str(consortium.server_directory), str(copy), "--passphrase-file", str(passphrase)))
    approve_study(consortium.home("north"), second)
    consortium.wait(
        lambda: list(consortium.status()["studies"]["second"]["missing"]) == ["south"],
        "north's approval at the server",
    )
    consortium.kill("srv")
    rounds = consortium.rounds("chest")

    consortium.server_name = "elsewhere"
    command(*("restore", str(copy), str(consortium.server_directory), "--passphrase-file", str(passphrase)))
    assert "north" in find_submitted(consortium.server, second).missing
    assert consortium.rounds("chest") == rounds
    consortium.start_server()
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end", timeout_s=400)
    assert [e["round"] for e in consortium.events("chest") if e["event"] == "round"] == list(range(6))
    consortium.wait(
        lambda: list(consortium.status()["studies"]["second"]["missing"]) == ["south"],
        "north's approval again",
    )
    approve_study(consortium.home("south"), second)
    consortium.wait(lambda: consortium.study_state("second") == "finished", "the second study's end")


def test_dead_programs_are_started_again_on_both_sides(consortium: RealConsortium) -> None:
    consortium.start_server()
    for site in ("north", "south"):
        consortium.start_site(site)
    consortium.wait(lambda: consortium.online("north", "south"), "two sites online")

    def pids(directory: str) -> dict[str, int]:
        lines = (consortium.directory / directory / "logs" / "up.jsonl").read_text().splitlines()
        started = [json.loads(line) for line in lines if "started" in line]
        return {line["reason"]: line["values"][-1] for line in started}

    for directory, names in (
        ("srv", ("superlink", "superexec", "proxy")),
        ("north", ("agent", "link", "supernode", "superexec")),
    ):
        for name in names:
            os.kill(pids(directory)[name], signal.SIGKILL)
    consortium.submit("chest", ("north", "south"), rounds=2)
    for site in ("north", "south"):
        consortium.approve(site)
    consortium.wait(lambda: consortium.study_state("chest") == "finished", "the study's end", timeout_s=400)


def test_a_certificate_is_renewed_before_its_end_and_everything_goes_on(consortium: RealConsortium) -> None:
    policy = consortium.directory / "srv" / "policy.toml"
    policy.write_text(policy.read_text().replace("certificate_days = 7.0", "certificate_days = 0.0007"))
    consortium.enrol("north")  # the same keys: a certificate of a minute
    first = read_enrolled(consortium.home("north"))
    consortium.start_server()
    consortium.start_site("north")
    consortium.wait(lambda: consortium.online("north"), "the site online")
    consortium.wait(
        lambda: read_enrolled(consortium.home("north")).not_after > first.not_after, "a renewed certificate"
    )
    consortium.wait(lambda: time.time() > first.not_after.timestamp() + 35, "the first certificate's end")
    status = read_status(consortium.home("north"), now=time.time())
    assert status["connected"] and status["relaying"], status
    assert consortium.online("north")
