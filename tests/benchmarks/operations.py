"""What watching and backing up cost, in CPU-seconds of a process: `python -m tests.benchmarks.operations`."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure() -> dict[str, float]:
    """A study of 1,000 rounds looked at, and a directory of 400 MB backed up and restored."""
    from prometheus_client import generate_latest

    from server.backup import restore_backup, write_backup
    from server.metrics import registry_of
    from server.operator_page.page import study_page
    from server.status import read_view
    from tests.server.study_folder import serve_round, write_folder

    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = time.process_time()
        value = work()
        found[name] = round(time.process_time() - before, 3)
        return value

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "study"
        study = write_folder(directory, mode="plain", rounds=1000)
        for round_number in range(1000):
            missing = {"west": "not connected"} if round_number % 9 == 0 else {}
            serve_round(directory, study, round_number, missing=missing)
        view = timed("status_1000_rounds_s", lambda: read_view(directory))
        timed("page_1000_rounds_s", lambda: study_page(view, now_s=0.0, refresh_s=0))
        timed("scrape_1000_rounds_s", lambda: generate_latest(registry_of(directory)))
        for number in range(20):
            (directory / f"adapter-{number}.safetensors").write_bytes(os.urandom(20 << 20))
        file = Path(folder) / "backup.fedrad"
        secret = b"correct horse battery staple"
        timed("backup_400mb_s", lambda: write_backup(directory, file, passphrase=secret, now_unix_s=0))
        timed("restore_400mb_s", lambda: restore_backup(file, Path(folder) / "new", passphrase=secret))
    found["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
