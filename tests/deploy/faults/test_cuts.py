"""A site's connection cut in the middle of a round, for a second, a minute and more than three."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from tests.deploy.faults.consortium import FaultyConsortium, faulty
from tests.deploy.site.test_gateway import ConnectProxy, connect_proxy

VICTIM = "alpha"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"),
]


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyConsortium, ConnectProxy]]:
    with connect_proxy() as proxy:
        arguments = {VICTIM: ("--proxy", f"http://127.0.0.1:{proxy.port}")}
        with faulty(tmp_path_factory.mktemp("cuts"), arguments=arguments) as made:
            yield made, proxy


@pytest.fixture(scope="module")
def undisturbed(proxied: tuple[FaultyConsortium, ConnectProxy]) -> str:
    consortium, _ = proxied
    study = consortium.submit("undisturbed")
    consortium.finish(study)
    return consortium.adapter(study)


@pytest.mark.parametrize("away_s", [1, 60, 200])
def test_a_cut_connection_changes_nothing(
    proxied: tuple[FaultyConsortium, ConnectProxy], undisturbed: str, away_s: int
) -> None:
    consortium, proxy = proxied
    study = consortium.submit(f"cut-{away_s}")
    consortium.at(study, "contribute", VICTIM)
    assert not consortium.over(study)
    proxy.down = True
    proxy.cut()
    time.sleep(away_s)
    assert not consortium.over(study), "the study ended without the site that was cut off"
    proxy.down = False
    consortium.finish(study)
    assert consortium.verify_outcome(study, adapter=undisturbed) == ""
