from __future__ import annotations

import http.client
import re
import shutil
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import ListenAddressInvalid
from common.metrics_page import MetricsPage, parse_listen
from server.metrics import registry_of, stage_seconds
from tests.server.study_folder import SITES, eventful, write_folder


def samples(directory: Path) -> dict[tuple[str, tuple[str, ...]], float]:
    text = generate_latest(registry_of(directory)).decode()
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_says_what_the_files_say(tmp_path: Path) -> None:
    eventful(tmp_path)
    found = samples(tmp_path)
    assert found["fedrad_study_rounds_total", ("chest",)] == 9
    assert found["fedrad_study_attempts_failed_total", ("chest",)] == 1
    assert found["fedrad_round_seconds_count", ("chest",)] == 9
    assert found["fedrad_round_seconds_sum", ("chest",)] == sum(3.0 + round for round in range(9))
    assert found["fedrad_round_seconds_bucket", ("5.0", "chest")] == 3
    assert found["fedrad_site_missing", ("east", "chest")] == 1
    assert found["fedrad_site_absences_total", ("BudgetExceeded", "east", "chest")] == 1
    assert found["fedrad_site_absences_total", ("not-connected", "west", "chest")] == 2
    assert found["fedrad_study_state", ("stopped", "chest")] == 1
    assert found["fedrad_bytes_total", ("down", "contribute", "chest")] == 900_000
    assert 0 < found["fedrad_release_epsilon", ("chest",)] < found["fedrad_release_epsilon_limit", ("chest",)]


def test_labels_stay_few_and_nothing_counts_patients(tmp_path: Path) -> None:
    eventful(tmp_path)
    text = generate_latest(registry_of(tmp_path)).decode()
    labels = set(re.findall(r'[{,](\w+)="', text))
    assert labels <= {"study", "site", "state", "stage", "direction", "reason", "le"}
    assert "patient" not in text.lower()
    assert "2800" not in text
    assert text.count("\n") < 200 + 40 * len(SITES)


def test_two_studies_of_one_name_do_not_make_one_series_twice(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", rounds=13)
    write_folder(tmp_path / "b", rounds=14)
    planned = {key[1][0]: value for key, value in samples(tmp_path).items() if "planned" in key[0]}
    assert sorted(planned.values()) == [13, 14]
    assert all(name.startswith("chest-") for name in planned)


def test_a_damaged_study_is_counted_and_the_others_are_shown(tmp_path: Path) -> None:
    eventful(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    (tmp_path / "bad" / "operator.sig").write_text("00" * 64)
    found = samples(tmp_path)
    assert found["fedrad_studies_unreadable", ()] == 1
    assert found["fedrad_study_rounds_total", ("chest",)] == 9


def test_an_empty_folder_has_no_study_and_is_no_error(tmp_path: Path) -> None:
    assert samples(tmp_path) == {("fedrad_studies_unreadable", ()): 0}


def test_stage_seconds_are_summed_where_the_log_has_them() -> None:
    events = [
        {"event": "round", "stage_seconds": {"contribute": 2.0, "unmask": 0.5}},
        {"event": "round", "stage_seconds": {"contribute": 3.0}},
        {"event": "round"},
        {"event": "started", "stage_seconds": {"contribute": 100.0}},
    ]
    assert stage_seconds(events) == {"contribute": 5.0, "unmask": 0.5}


def test_the_page_serves_metrics_and_health_and_nothing_else(tmp_path: Path) -> None:
    page = MetricsPage(registry_of(tmp_path), "127.0.0.1", 0)
    try:
        answers = {}
        for method, path in (("GET", "/metrics"), ("HEAD", "/healthz"), ("GET", "/x"), ("POST", "/metrics")):
            connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
            connection.request(method, path)
            response = connection.getresponse()
            answers[method, path] = (response.status, response.read())
            connection.close()
    finally:
        page.stop()
    assert answers["GET", "/metrics"][0] == 200
    assert b"fedrad_studies_unreadable 0.0" in answers["GET", "/metrics"][1]
    assert answers["HEAD", "/healthz"] == (200, b"")
    assert answers["GET", "/x"][0] == 404
    assert answers["POST", "/metrics"][0] == 501


@pytest.mark.parametrize("text", ["9464", "127.0.0.1", "127.0.0.1:x", ":9464", "127.0.0.1:70000"])
def test_a_wrong_listen_address_is_refused(text: str) -> None:
    with pytest.raises(ListenAddressInvalid):
        parse_listen(text)


def test_a_taken_port_is_refused_by_name(tmp_path: Path) -> None:
    page = MetricsPage(registry_of(tmp_path), "127.0.0.1", 0)
    try:
        with pytest.raises(ListenAddressInvalid, match="free address"):
            MetricsPage(registry_of(tmp_path), "127.0.0.1", page.port)
    finally:
        page.stop()
