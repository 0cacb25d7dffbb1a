"""The audit bundle of a real local run: verified without the code that made it, tampered with at random."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.canonical import canonical_json
from common.errors import FedRadError
from common.ledger.audit import verify_bundle
from common.ledger.bundle import Bundle, make_bundle, pack, parse_bundle
from common.ledger.findings import Status
from tests.deploy.conftest import ROOT

pytestmark = pytest.mark.slow
PASSED = (
    "log-history", "witness-quorum", "enrolment", "approvals", "round-chain", "contribution-signatures",
    "mechanism", "site-epsilon", "release-epsilon", "budgets", "code", "releases", "site-records",
    "aggregate", "completeness",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """A four-site private study of three rounds, run by `fedrad-local` and exported by `fedrad-server`."""
    from server.studies import study_template

    folder = tmp_path_factory.mktemp("audited")
    text = study_template(
        id="audited", base="tiny", sites=("north", "east", "south", "west"), rounds=3, patients=400
    )
    (folder / "study.toml").write_text(text.replace("sampling_rate = 0.12", "sampling_rate = 0.3"))
    commands = (
        ["deploy.local.cli", "run", "study.toml", "--data", str(small_data), "--out", "out", "--no-compare"],
        ["server.cli", "audit", "export", "--run", "out", "--out", "study.bundle"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder / "study.bundle"


def test_a_fresh_environment_with_the_audit_extra_alone_verifies_the_bundle_without_network(
    exported: Path, tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[audit]"], check=True, timeout=600)
    absent = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode != 0
    offline = ["unshare", "--user", "--map-root-user", "--net"]
    done = subprocess.run(
        [*offline, str(python.parent / "fedrad-audit"), "verify", str(exported), "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    findings = json.loads(done.stdout)["findings"]
    statuses = {finding["control"]: finding["status"] for finding in findings}
    assert "fail" not in statuses.values()
    for control in PASSED:
        assert statuses[control] == "pass", control


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        yield path
        return
    for key, item in items:
        yield from fields_of(item, (*path, key))


def tampered(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value[:-1] + ("0" if value[-1] != "0" else "1") if value else "a"


def test_each_of_200_random_changes_of_one_field_of_the_bundle_is_caught(exported: Path) -> None:
    """In entries, signed records and release files alike."""
    bundle = parse_bundle(exported.read_bytes())
    draw, missed = random.Random(11), []
    places = []
    for member in ("entries.jsonl", "records.jsonl"):
        for number, line in enumerate(bundle.members[member].splitlines()):
            places += [(member, number, path) for path in fields_of(json.loads(line))]
    for member, number, path in draw.sample(places, 200):
        if not caught(bundle, change_of(bundle, member, number, path)):
            missed.append((member, number, path))
    assert missed == []


def change_of(bundle: Bundle, member: str, number: int, path: tuple[Any, ...]) -> dict[str, bytes]:
    lines = bundle.members[member].splitlines()
    value = json.loads(lines[number])
    target = value
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = tampered(target[path[-1]])
    lines[number] = canonical_json(value)
    return {member: b"".join(line + b"\n" for line in lines)}


def caught(bundle: Bundle, changed: dict[str, bytes]) -> bool:
    members = {name: data for name, data in bundle.members.items() if name != "bundle.json"} | changed
    try:
        packed = pack(make_bundle(log=bundle.log, exported_s=0, software="x", members=members))
        report = verify_bundle(parse_bundle(packed))
    except FedRadError:
        return True
    return any(finding.status is Status.FAIL for finding in report.findings)


def test_every_member_of_a_release_is_held_by_the_ledger(exported: Path) -> None:
    bundle = parse_bundle(exported.read_bytes())
    members = [name for name in bundle.members if name.startswith("releases/")]
    assert len(members) >= 7
    for name in members:
        data = bundle.members[name]
        middle = len(data) // 2
        assert caught(bundle, {name: data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}), name


def test_the_report_of_a_real_run_is_made_in_each_format(exported: Path, tmp_path: Path) -> None:
    run: Callable[..., Any] = subprocess.run
    for form, start in (("html", b"<!doctype html>"), ("pdf", b"%PDF-"), ("json", b"{")):
        out = tmp_path / f"report.{form}"
        done = run(
            [sys.executable, "-m", "common.ledger.cli", "report", exported, "--format", form, "--out", out],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert out.read_bytes()[:20].lower().startswith(start.lower())
    shutil.rmtree(tmp_path)
