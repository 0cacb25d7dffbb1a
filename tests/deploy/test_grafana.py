"""Every metric that dashboard and alerts ask for is one that the exporters give, with those labels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.core import Metric

from client.budget import Budget, BudgetLimits
from client.home import create_home
from client.metrics import SiteCollector
from common.privacy.study_plan import plan_of
from server.metrics import StudiesCollector
from tests.server.study_folder import eventful, log

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
NAME = re.compile(r"\bfedrad_[a-z_]+\b")
SELECTOR = re.compile(r"(fedrad_[a-z_]+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of samples that both exporters give, with their labels, from a study and a site with events."""
    server, site = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("site")
    study = eventful(server)
    log(server, "round", round=8, attempt=1, missing={}, seconds=1.0, stage_seconds={"contribute": 0.5})
    home = create_home(site, site="north", operator_key="0" * 64, data=site, bases={})
    plan = plan_of(study)
    with Budget.open(home.budget_path, BudgetLimits(epsilon=home.epsilon, delta=home.delta)) as budget:
        budget.commit(study.sha256, plan)
        budget.charge(
            study.sha256, round=0, attempt=1, request_sha256="0" * 64, data_sha256="0" * 64,
            seed=os.urandom(32), sampling_rate=plan.sampling_rate, noise_multiplier=plan.site_noise,
            local_steps=plan.local_steps,
        )  # fmt: skip
    found: dict[str, set[str]] = {}
    for family in (*StudiesCollector(server).collect(), *SiteCollector(site).collect()):
        for name in names_of(family):
            found.setdefault(name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def names_of(family: Metric) -> Iterator[str]:
    """Names that a family can give, with or without samples."""
    ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    yield from (family.name + end for end in ends.get(family.type, ("",)))


def expressions() -> Iterator[str]:
    dashboard = json.loads((FOLDER / "fedrad.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_every_metric_that_is_asked_for_is_given(given: dict[str, set[str]]) -> None:
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(asked) > 20
    assert asked <= set(given)


def test_every_metric_that_is_given_is_shown(given: dict[str, set[str]]) -> None:
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert set(given) - asked == set()


def test_every_label_that_is_selected_is_one_of_the_metric(given: dict[str, set[str]]) -> None:
    selected = [found for expression in expressions() for found in SELECTOR.findall(expression)]
    assert selected
    for name, labels in selected:
        for label in re.findall(r"(\w+)\s*(?:=|!=|=~|!~)", labels):
            assert not given[name] or label in given[name], (name, label)


def test_parentheses_and_braces_are_closed() -> None:
    for expression in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression


def test_panels_have_their_own_place_and_number() -> None:
    panels = json.loads((FOLDER / "fedrad.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_what_happened() -> None:
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
