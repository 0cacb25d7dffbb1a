"""The loop: an image in, two reports out, once; retries, refusals, the dead, and what a restart finds."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.pacs.config import Retry
from client.pacs.jobs import JobQueue, Stage
from client.pacs.loop import PacsLoop, Written
from common.errors import EngineStopped
from tests.client.pacs.nodes import VERSION, archive, chest, config, drafter, send


def until(condition: Callable[[], object], *, within_s: float = 120.0) -> None:
    """Wait for a condition that another thread makes true."""
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends, "expected the condition to come true"
        time.sleep(0.01)


def stages(folder: Path) -> dict[str, int]:
    jobs = JobQueue(folder).listing()
    return {stage.value: sum(job.stage is stage for job in jobs) for stage in Stage if jobs}


def test_image_becomes_a_preliminary_report_in_its_own_study(tmp_path: Path) -> None:
    with archive() as kept:
        loop = PacsLoop(config(tmp_path / "p", archive_port=kept.port, fhir=tmp_path / "fhir"), drafter)
        loop.start()
        assert loop.receiver is not None
        image = chest(1)
        assert send(loop.receiver.port, image) == [0]
        until(lambda: list((tmp_path / "p" / "done").glob("*.json")))
        loop.stop()
    (report,) = kept.got
    assert report.StudyInstanceUID == image.StudyInstanceUID
    assert report.SeriesInstanceUID != image.SeriesInstanceUID
    assert (report.CompletionFlag, report.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    assert report.PreliminaryFlag == "PRELIMINARY"
    (resource,) = (tmp_path / "fhir").iterdir()
    value = json.loads(resource.read_bytes())
    assert value["status"] == "preliminary" and "effusion" in value["conclusion"]
    assert not any((tmp_path / "p" / "open").iterdir())
    assert not any(path.is_file() for path in (tmp_path / "p" / "inbox").rglob("*"))


def test_image_that_is_sent_again_is_not_drafted_again(tmp_path: Path) -> None:
    drafted: list[bytes] = []

    def counting(data: bytes, indication: str) -> Written:
        drafted.append(data)
        return drafter(data, indication)

    with archive() as kept:
        loop = PacsLoop(config(tmp_path, archive_port=kept.port), counting)
        loop.start()
        assert loop.receiver is not None
        for _ in range(3):
            assert send(loop.receiver.port, chest(1)) == [0]
            until(lambda: stages(tmp_path).get("done") == 1)
        until(lambda: not any(path.is_file() for path in (tmp_path / "inbox").rglob("*")))
        loop.stop()
    assert len(drafted) == len(kept.got) == 1


def test_destination_that_is_away_gets_its_reports_later(tmp_path: Path) -> None:
    with archive() as gone:
        port = gone.port
    loop = PacsLoop(config(tmp_path, archive_port=port), drafter)
    loop.start()
    assert loop.receiver is not None
    send(loop.receiver.port, chest(1), chest(2))
    until(lambda: sum(d.attempts for job in loop.queue.open_jobs() for d in job.deliveries.values()) >= 2)
    with archive(port=port) as kept:
        until(lambda: stages(tmp_path).get("done") == 2)
        loop.stop()
    assert len({report.SOPInstanceUID for report in kept.got}) == len(kept.got) == 2


def test_full_archive_is_tried_again(tmp_path: Path) -> None:
    with archive(answers=(0xA700, 0xA701)) as kept:
        loop = PacsLoop(config(tmp_path, archive_port=kept.port), drafter)
        loop.start()
        assert loop.receiver is not None
        send(loop.receiver.port, chest(1))
        until(lambda: stages(tmp_path).get("done") == 1)
        loop.stop()
        (job,) = loop.queue.listing()
    assert len(kept.got) == 1 and job.deliveries["sr"].attempts == 2


def test_report_that_is_refused_for_good_is_put_aside_and_can_be_revived(tmp_path: Path) -> None:
    with archive(answers=(0xA900,)) as kept:
        loop = PacsLoop(config(tmp_path, archive_port=kept.port, fhir=tmp_path / "fhir"), drafter)
        loop.start()
        assert loop.receiver is not None
        send(loop.receiver.port, chest(1))
        until(lambda: list((tmp_path / "dead").glob("*/job.json")))
        (job,) = loop.queue.listing()
        assert "A900" in job.reason and job.deliveries["fhir"].sent_s is not None
        written = next((tmp_path / "fhir").iterdir()).stat().st_mtime_ns
        loop.queue.revive(job.id)
        loop.wake()
        until(lambda: stages(tmp_path).get("done") == 1)
        loop.stop()
    assert len(kept.got) == 1
    assert next((tmp_path / "fhir").iterdir()).stat().st_mtime_ns == written


def test_attempts_end(tmp_path: Path) -> None:
    with archive() as gone:
        port = gone.port
    settings = config(tmp_path, archive_port=port, retry=Retry(first_s=0.01, most_s=0.02, attempts=3))
    loop = PacsLoop(settings, drafter)
    loop.start()
    assert loop.receiver is not None
    send(loop.receiver.port, chest(1))
    until(lambda: stages(tmp_path).get("dead") == 1)
    loop.stop()
    (job,) = loop.queue.listing()
    assert job.deliveries["sr"].attempts == 3 and "3 attempts" in job.reason


def test_refused_image_gets_no_report(tmp_path: Path) -> None:
    def refusing(data: bytes, indication: str) -> Written:
        return Written("0" * 32, VERSION, (), "image-out-of-domain")

    with archive() as kept:
        loop = PacsLoop(config(tmp_path, archive_port=kept.port, fhir=tmp_path / "fhir"), refusing)
        loop.start()
        assert loop.receiver is not None
        send(loop.receiver.port, chest(1))
        until(lambda: stages(tmp_path).get("refused") == 1)
        loop.stop()
    assert not kept.got and not (tmp_path / "fhir").exists()
    assert loop.queue.listing()[0].reason == "image-out-of-domain"


def test_engine_that_is_away_is_asked_again(tmp_path: Path) -> None:
    failures = [EngineStopped("away"), TimeoutError()]

    def sometimes(data: bytes, indication: str) -> Written:
        if failures:
            raise failures.pop(0)
        return drafter(data, indication)

    with archive() as kept:
        loop = PacsLoop(config(tmp_path, archive_port=kept.port), sometimes)
        loop.start()
        assert loop.receiver is not None
        send(loop.receiver.port, chest(1))
        until(lambda: stages(tmp_path).get("done") == 1)
        loop.stop()
    assert len(kept.got) == 1 and not failures


def test_defect_in_the_drafter_costs_only_its_own_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(data: bytes, indication: str) -> Written:
        if b"XR1" in data:
            raise RuntimeError("a defect that names Brandt")
        return drafter(data, indication)

    with archive() as kept:
        loop = PacsLoop(config(tmp_path, archive_port=kept.port), broken)
        loop.start()
        assert loop.receiver is not None
        send(loop.receiver.port, chest(1), chest(2))
        until(lambda: stages(tmp_path).get("dead") == 1 and stages(tmp_path).get("done") == 1)
        loop.stop()
    assert len(kept.got) == 1
    dead = [job for job in loop.queue.listing() if job.stage is Stage.DEAD]
    assert dead[0].reason == "defect: RuntimeError"


def test_what_was_received_before_a_stop_is_delivered_after_the_start(tmp_path: Path) -> None:
    def never(data: bytes, indication: str) -> Written:
        raise EngineStopped("going down")

    loop = PacsLoop(config(tmp_path, fhir=tmp_path / "fhir"), never)
    loop.start()
    assert loop.receiver is not None
    send(loop.receiver.port, chest(1), chest(2))
    until(lambda: len(list(loop.queue.open_jobs())) == 2)
    loop.stop()
    again = PacsLoop(config(tmp_path, fhir=tmp_path / "fhir"), drafter)
    again.start()
    until(lambda: stages(tmp_path).get("done") == 2)
    again.stop()
    assert len(list((tmp_path / "fhir").iterdir())) == 2


def test_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, fhir=tmp_path / "fhir")
    loop = PacsLoop(settings, drafter)
    path = settings.listen.inbox / "ab" / ("ab" * 20 + ".dcm")
    path.parent.mkdir(parents=True)
    path.write_bytes(io.BytesIO(b"no image" * 40).getvalue())
    loop.start()
    until(lambda: stages(tmp_path).get("refused") == 1)
    loop.stop()


def test_foreign_file_and_damaged_job_do_not_hold_up_the_others(tmp_path: Path) -> None:
    settings = config(tmp_path, fhir=tmp_path / "fhir")
    loop = PacsLoop(settings, drafter)
    (settings.listen.inbox / "ab").mkdir(parents=True)
    (settings.listen.inbox / "ab" / "notes.dcm").write_bytes(b"foreign")
    damaged = loop.queue.folder("cd" * 20)
    damaged.mkdir()
    (damaged / "image.dcm").write_bytes(b"image")
    (damaged / "job.json").write_bytes(b"{")
    loop.start()
    assert loop.receiver is not None
    send(loop.receiver.port, chest(1))
    until(lambda: stages(tmp_path).get("done") == 1)
    loop.stop()
    assert (settings.listen.inbox / "ab" / "notes.dcm").exists() and damaged.exists()
