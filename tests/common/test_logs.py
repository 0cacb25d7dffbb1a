from __future__ import annotations

import ast
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import BudgetExceeded, PairInvalid
from common.logs import JsonFormatter, start_json_log

ROOT = Path(__file__).parents[2]
PLANTED = ("Erika Mustermann", "1953-04-07", "MRN0047119", "00123456", "/data/north/p17.png", "JohnSmith")


@pytest.fixture()
def lines() -> Iterator[tuple[logging.Logger, Any]]:
    logger = logging.Logger("fedrad.test")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    yield logger, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_refusal_is_named_with_its_place_and_without_its_text(lines: Any) -> None:
    logger, read = lines
    error = BudgetExceeded("this round would bring Erika Mustermann to epsilon 3")
    logger.warning("refused %s of round %d: %s: %s", "contribute", 3, error.code, error)
    (line,) = read()
    assert line["event"] == "refused %s of round %d: %s: %s"
    assert line["values"] == ["contribute", 3, "BudgetExceeded", "BudgetExceeded"]
    assert "Erika" not in json.dumps(line)


@pytest.mark.parametrize("planted", PLANTED)
def test_nothing_that_is_passed_in_free_form_reaches_the_line(lines: Any, planted: str) -> None:
    logger, read = lines
    logger.info("read %s", planted)
    logger.info(planted)
    logger.info("about %(who)s", {"who": planted})
    logger.info(
        "went on", extra={"site": planted, "round": planted, "reason": planted + " 1", "note": planted}
    )
    try:
        raise PairInvalid(f"{planted}: expected a view")
    except PairInvalid as error:
        logger.exception("this site's data: %s: %s", error.code, error)
    written = json.dumps(read())
    assert len(read()) == 5
    assert planted not in written


def test_named_fields_of_the_right_form_are_kept(lines: Any) -> None:
    logger, read = lines
    logger.info(
        "served", extra={"site": "north-2", "stage": "unmask", "round": 7, "seconds": 1.5, "bytes": 9}
    )
    assert {name: read()[0][name] for name in ("site", "stage", "round", "seconds", "bytes")} == {
        "site": "north-2", "stage": "unmask", "round": 7, "seconds": 1.5, "bytes": 9,
    }  # fmt: skip


def test_an_exception_becomes_the_names_of_its_types(lines: Any) -> None:
    logger, read = lines
    try:
        try:
            raise ValueError("Erika")
        except ValueError as error:
            raise PairInvalid("Erika") from error
    except PairInvalid:
        logger.exception("stopped")
    assert read()[0]["error"] == ["PairInvalid", "ValueError"]


def test_the_log_file_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "agent.jsonl"
    handler = start_json_log(path, logger="fedrad.test.file")
    logging.getLogger("fedrad.test.file").info("agent of site %s listens", "north")
    handler.close()
    logging.getLogger("fedrad.test.file").removeHandler(handler)
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["event"] == "agent of site %s listens"


def test_every_log_call_of_the_programs_has_its_message_in_the_source() -> None:
    """Else the formatter could not tell words of ours from values."""
    found = []
    for package in ("client", "common", "server"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                    owner = node.func.value
                    named = isinstance(owner, ast.Name) and owner.id in ("log", "logger", "_log", "LOG")
                    if named and node.func.attr in ("debug", "info", "warning", "error", "exception"):
                        found.append(f"{path.name}:{node.lineno}")
                        assert isinstance(node.args[0], ast.Constant), found[-1]
    assert found
