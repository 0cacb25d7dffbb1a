"""Every kind of process killed with -9 at every stage of a study: it ends as the undisturbed one did."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from tests.deploy.faults.consortium import FaultyConsortium, faulty

ROLES = ("superlink", "superexec", "serverapp", "supernode", "clientapp", "agent")
STAGES = ("hello", "keys", "shares", "contribute", "unmask", "witness")
VICTIM = "alpha"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyConsortium]:
    with faulty(tmp_path_factory.mktemp("kills")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(consortium: FaultyConsortium) -> str:
    study = consortium.submit("undisturbed")
    consortium.finish(study)
    adapter = consortium.adapter(study)
    assert consortium.verify_outcome(study, adapter=adapter) == ""
    return adapter


@pytest.mark.parametrize("role", ROLES)
def test_a_process_killed_at_every_stage_changes_nothing(
    consortium: FaultyConsortium, undisturbed: str, role: str
) -> None:
    study = consortium.submit(f"{role}-killed")
    started = time.monotonic()
    for stage in STAGES:
        consortium.at(study, stage, VICTIM)
        assert not consortium.over(study), f"the study was over before {stage}"
        pid = consortium.kill(role, VICTIM)
        assert pid, f"expected a {role} to kill at {stage}"
        print(f"{time.monotonic() - started:.0f} s: {role} {pid} killed at {stage}", flush=True)
    consortium.finish(study)
    print(f"{time.monotonic() - started:.0f} s: over", flush=True)
    assert consortium.verify_outcome(study, adapter=undisturbed) == ""
