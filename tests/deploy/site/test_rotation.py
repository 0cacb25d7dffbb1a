"""New keys at a site that runs: who reads its keys once is started again with them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.enrolment import install_bundle, request_rotation
from common.enrolment import fingerprint_of
from server.enrolment import rotate
from tests.deploy.lab import running


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
def test_a_running_site_serves_a_study_of_its_new_keys(tmp_path: Path) -> None:
    """All four keys change while `up` runs; nobody starts anything again."""
    with running(tmp_path, enrolled=("north",)) as consortium:
        consortium.start_server()
        consortium.start_site("north")
        consortium.wait(lambda: consortium.online("north"), "north")
        now, home, server = datetime.now(UTC), consortium.home("north"), consortium.server
        before = home.message_key().public
        request = request_rotation(home, software="fedrad 0.1.0", now=now, message_keys=True)
        signed = rotate(
            server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=now
        )
        install_bundle(home, signed)
        assert home.message_key().public != before
        consortium.submit("chest", ("north",), rounds=2)
        consortium.approve("north")
        consortium.wait(lambda: consortium.study_state("chest") == "finished", "the end", timeout_s=400)
        assert consortium.rounds("chest") == 2
