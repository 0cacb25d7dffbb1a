"""Every kind of process killed with -9 at every stage: the study ends as the undisturbed one did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.deploy.faults.consortium import FaultyConsortium, faulty

ROLES = ("superlink", "superexec", "serverapp", "supernode", "clientapp", "agent")
STAGES = ("contribute", "unmask", "hello", "keys", "shares", "witness")
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


@pytest.mark.parametrize(("stage", "role"), [(stage, role) for stage in STAGES for role in ROLES])
def test_a_killed_process_changes_nothing(
    consortium: FaultyConsortium, undisturbed: str, role: str, stage: str
) -> None:
    study = consortium.submit(f"{role}-{stage}")
    consortium.at(study, stage, VICTIM)
    assert consortium.kill(role, VICTIM), f"expected a {role} to kill at {stage}"
    consortium.finish(study)
    assert consortium.verify_outcome(study, adapter=undisturbed) == ""
