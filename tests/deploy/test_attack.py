"""Attacks on a study that really ran, and on one that has not finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataInsufficient
from deploy.local.attack import audit_run
from deploy.local.consortium import set_up
from deploy.local.engines import Engine
from deploy.local.run import run_study_locally


class Silent:
    def step(self, name: str, done: int, total: int) -> None: ...

    def say(self, line: str) -> None: ...


def test_a_study_that_has_not_finished_is_refused(
    small_data: Path, small_study: Callable[..., Path], tmp_path: Path
) -> None:
    set_up(small_study(), data=small_data, out=tmp_path / "out", base=None)
    with pytest.raises(DataInsufficient, match="finished study of 4 rounds"):
        audit_run(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["consortium", "plain"])
def test_a_finished_study_is_attacked_and_its_canaries_are_as_hidden_as_claimed(
    mode: str, small_data: Path, small_study: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_study_locally(
        small_study(mode, rounds=2),
        data=small_data,
        out=out,
        engine=Engine.INPROCESS,
        base=None,
        compare=False,
        display=Silent(),
    )
    result = audit_run(out, canaries=400)
    assert json.loads((out / "privacy-audit.json").read_text()) == result
    membership = result["membership"]
    assert membership["members"] > membership["others"] > 0
    assert membership["auc_low"] < membership["auc"] < membership["auc_high"]
    assert (result["claimed"] is None) == (mode == "plain")
    assert [audit["view"] for audit in result["canaries"]] == (
        ["site", "release"] if mode == "consortium" else []
    )
    for audit in result["canaries"]:
        assert audit["consistent"]
        assert audit["epsilon_lower"] < audit["epsilon_claimed"] == result["claimed"][audit["view"]]
