"""What holds for every test."""

from __future__ import annotations

import logging
import signal

import pytest
from hypothesis import settings

settings.register_profile("fedrad", deadline=None)  # a busy machine is no failure
settings.load_profile("fedrad")


def pytest_configure() -> None:
    """A suite that a shell runs in the background ignores Ctrl-C; the programs that tests start must not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _loggers_of_our_own() -> None:
    """Some libraries (alembic, within Flower) disable every logger that exists; ours are on for each test."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("fedrad"):
            logging.getLogger(name).disabled = False
