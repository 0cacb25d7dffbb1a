from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from client.budget import Budget, BudgetLimits
from client.home import SiteHome, create_home, receive_study
from client.metrics import LOG_NAME, SERVED, AgentLog, registry_of
from common.config import Study
from common.errors import BudgetExceeded, RoundAlreadyServed
from common.identity import load_key
from common.logs import start_json_log
from common.privacy.study_plan import plan_of
from tests.server.study_folder import write_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    directory = tmp_path_factory.mktemp("server")
    return directory, write_folder(directory)


@pytest.fixture()
def home(tmp_path: Path, offered: tuple[Path, Study]) -> SiteHome:
    """A site that received a study, committed its budget and was charged for three rounds."""
    server, study = offered
    operator = load_key(server / "keys" / "message.key").public
    home = create_home(
        tmp_path / "home", site="north", operator_key=operator, data=tmp_path / "data", bases={}, epsilon=20.0
    )
    signature = bytes.fromhex((server / "operator.sig").read_text())
    receive_study(home, (server / "study.json").read_bytes(), signature)
    plan = plan_of(study)
    with Budget.open(home.budget_path, BudgetLimits(epsilon=20.0, delta=home.delta)) as budget:
        budget.commit(study.sha256, plan)
        for round in range(3):
            budget.charge(
                study.sha256, round=round, attempt=1, request_sha256=f"{round:064x}", data_sha256="0" * 64,
                seed=os.urandom(32), sampling_rate=plan.sampling_rate, noise_multiplier=plan.site_noise,
                local_steps=plan.local_steps,
            )  # fmt: skip
    return home


def samples(home: SiteHome) -> dict[tuple[str, tuple[str, ...]], float]:
    text = generate_latest(registry_of(home.directory)).decode()
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_says_what_the_ledger_says(home: SiteHome, offered: tuple[Path, Study]) -> None:
    found, study = samples(home), offered[1].sha256[:12]
    assert found["fedrad_site_readable", ()] == 1
    assert found["fedrad_site_charges_total", (study,)] == 3
    spent = found["fedrad_site_study_epsilon_spent", (study,)]
    assert 0 < spent < found["fedrad_site_study_epsilon_committed", (study,)]
    assert found["fedrad_site_epsilon_allowed", ()] == 20.0
    assert found["fedrad_site_study_approved", (study,)] == 0


def test_refusals_are_counted_by_the_errors_name(home: SiteHome) -> None:
    handler = start_json_log(home.directory / LOG_NAME, logger="fedrad.test.metrics")
    log = logging.getLogger("fedrad.test.metrics")
    for error in (BudgetExceeded("Erika"), BudgetExceeded("Erika"), RoundAlreadyServed("x")):
        log.warning(
            "refused %s of round %d attempt %d of study %s: %s: %s", "contribute", 3, 1, "0a" * 6, error.code,
            error,
        )  # fmt: skip
    log.info("served %s", "contribute")
    handler.close()
    log.removeHandler(handler)
    with (home.directory / LOG_NAME).open("a") as file:
        file.write('{"event": "refused %s", "val')
    read = AgentLog(home.directory / LOG_NAME)
    read.read()
    assert read.refusals == {"BudgetExceeded": 2, "RoundAlreadyServed": 1}
    assert samples(home)["fedrad_site_refusals_total", ("BudgetExceeded",)] == 2


def line(stage: str, seconds: object) -> str:
    return json.dumps({"event": SERVED, "study": "ab" * 32, "stage": stage, "seconds": seconds}) + "\n"


def test_seconds_per_stage_go_on_over_a_torn_line_and_a_log_that_begins_anew(home: SiteHome) -> None:
    path, registry = home.directory / LOG_NAME, registry_of(home.directory)
    path.parent.mkdir()
    torn = line("contribute", 5.0)
    path.write_text(line("hello", 0.5) + line("contribute", 2.0) + line("keys", "x") + torn[:30])
    assert stage_seconds(registry) == {"hello": (0.5, 1), "contribute": (2.0, 1)}
    with path.open("a") as handle:
        handle.write(torn[30:])
    assert stage_seconds(registry) == {"hello": (0.5, 1), "contribute": (7.0, 2)}
    path.rename(path.with_suffix(".jsonl.1"))
    path.write_text(line("hello", 0.25))
    assert stage_seconds(registry) == {"hello": (0.75, 2), "contribute": (7.0, 2)}


def stage_seconds(registry: CollectorRegistry) -> dict[str, tuple[float, float]]:
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if "stage" in sample.labels:
                assert sample.labels["study"] == "ab" * 6
                found.setdefault(sample.labels["stage"], {})[sample.name] = sample.value
    return {
        stage: (value["fedrad_site_stage_seconds_total"], value["fedrad_site_stage_answers_total"])
        for stage, value in found.items()
    }


def test_bytes_are_those_that_the_link_has_carried(home: SiteHome) -> None:
    assert ("fedrad_site_bytes_total", ("up",)) not in samples(home)
    path = home.directory / "run" / "link.json"
    path.parent.mkdir()
    path.write_text('{"bytes_up": 7')
    assert samples(home)["fedrad_site_readable", ()] == 1
    path.write_text('{"bytes_up": 70, "bytes_down": 900}')
    found = samples(home)
    assert (found["fedrad_site_bytes_total", ("up",)], found["fedrad_site_bytes_total", ("down",)]) == (
        70,
        900,
    )


def test_labels_stay_few_and_nothing_counts_patients(home: SiteHome) -> None:
    text = generate_latest(registry_of(home.directory)).decode()
    assert set(re.findall(r'[{,](\w+)="', text)) <= {"study", "reason", "stage", "direction"}
    assert "patient" not in text.lower()


def test_a_damaged_ledger_makes_the_site_unreadable_and_no_wrong_figure(home: SiteHome) -> None:
    data = home.budget_path.read_bytes()
    home.budget_path.write_bytes(data[:200] + b"X" + data[201:])
    found = samples(home)
    assert found == {("fedrad_site_readable", ()): 0}


def test_reading_locks_nothing(home: SiteHome) -> None:
    limits = BudgetLimits(epsilon=20.0, delta=home.delta)
    with Budget.open(home.budget_path, limits):
        assert samples(home)["fedrad_site_readable", ()] == 1


def test_the_command_serves_them_until_told_to_stop(home: SiteHome) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "client.cli", "metrics", "--home", str(home.directory), "--listen",
         "127.0.0.1:0"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        address = process.stderr.readline().strip()
        with urllib.request.urlopen(address, timeout=120) as answer:  # noqa: S310  our own address
            assert b"fedrad_site_epsilon_spent" in answer.read()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        process.stderr.close()


def test_scrapes_at_the_same_time_count_each_line_once(tmp_path: Path) -> None:
    line = json.dumps({"event": SERVED, "study": "a" * 12, "stage": "keys", "seconds": 1.0}) + "\n"
    (tmp_path / "agent.jsonl").write_text(line * 5000)
    log = AgentLog(tmp_path / "agent.jsonl")
    scrapes = [threading.Thread(target=log.read) for _ in range(4)]
    for scrape in scrapes:
        scrape.start()
    for scrape in scrapes:
        scrape.join()
    assert log.answers == {("a" * 12, "keys"): 5000}
