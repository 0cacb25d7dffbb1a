"""kill -9 at any moment: what was acknowledged is delivered, as one object each."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.pacs.jobs import JobQueue, Stage
from tests.client.pacs.nodes import Archive, archive, chest, send

IMAGES, KILLS = 24, 12


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, port: int, kept: Archive) -> subprocess.Popen[str]:
    module = "tests.client.pacs.kill_loop"
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder), str(port), str(kept.port)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_every_acknowledged_image_is_delivered_as_one_report_after_kills(tmp_path: Path) -> None:
    chooser, port, waiting = random.Random(7), free_port(), list(range(IMAGES))
    acknowledged: set[int] = set()
    with archive() as kept:
        for _ in range(KILLS):
            process = start(tmp_path, port, kept)
            for number in waiting[:4]:
                if send(port, chest(number)) == [0]:
                    acknowledged.add(number)
            waiting = [number for number in waiting if number not in acknowledged]
            time.sleep(chooser.uniform(0, 0.25))
            process.kill()
            process.communicate()
        process = start(tmp_path, port, kept)
        for number in waiting:
            assert send(port, chest(number)) == [0]
        ends = time.monotonic() + 120
        while len(list((tmp_path / "p" / "done").glob("*.json"))) < IMAGES:
            assert time.monotonic() < ends
            time.sleep(0.1)
        process.kill()
        process.communicate()
        by_image: dict[str, set[str]] = {}
        for report in kept.got:
            by_image.setdefault(report.StudyInstanceUID, set()).add(report.SOPInstanceUID)
    jobs = JobQueue(tmp_path / "p").listing()
    assert [job.stage for job in jobs] == [Stage.DONE] * IMAGES
    assert set(by_image) == {chest(number).StudyInstanceUID for number in range(IMAGES)}
    assert all(len(reports) == 1 for reports in by_image.values())
    assert len(kept.got) <= IMAGES + 4 * KILLS  # repeated only where a kill fell between sending and noting
    assert len(list((tmp_path / "fhir").glob("*.json"))) == IMAGES
