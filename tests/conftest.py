"""What holds for every test."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _loggers_of_our_own() -> None:
    """Some libraries (alembic, within Flower) disable every logger that exists; ours are on for each test."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("fedrad"):
            logging.getLogger(name).disabled = False
