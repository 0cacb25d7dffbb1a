"""One drafting server of a talkative release, shared by the tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.client.serving.hosting import Hosted


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    from tests.client.serving.hosting import hosted

    with hosted(tmp_path_factory.mktemp("serving"), max_body_bytes=200_000) as running:
        yield running
