"""The queue: states, what a kill leaves between any two steps, and that nothing is done twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from client.pacs.config import Retry
from client.pacs.jobs import NEVER_S, Delivery, Job, JobQueue, Stage, mark_failed, mark_sent
from common.errors import JobUnknown

ID = "ab" * 20


def received(folder: Path, id: str = ID) -> Path:
    path = folder / "inbox" / id[:2] / f"{id}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")
    return path


def drafted(queue: JobQueue, job: Job) -> Job:
    job = replace(job, stage=Stage.DRAFTED, deliveries={"sr": Delivery("sr.dcm"), "fhir": Delivery("r.json")})
    (queue.folder(job.id) / "sr.dcm").write_bytes(b"report")
    queue.write(job)
    return job


def test_received_file_becomes_a_job_and_leaves_the_inbox(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    path = received(tmp_path)
    job = queue.take(path, now_s=5)
    assert job == Job(ID, 5) and not path.exists()
    assert list(queue.open_jobs()) == [job]
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "q").iterdir())


def test_same_image_again_is_no_job_in_any_state(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    job = queue.take(received(tmp_path), now_s=5)
    assert job and queue.take(received(tmp_path), now_s=6) is None
    queue.bury(job, reason="why")
    assert queue.take(received(tmp_path), now_s=7) is None
    queue.close(replace(queue.revive(ID), stage=Stage.DONE))
    assert queue.take(received(tmp_path), now_s=8) is None
    assert not received(tmp_path).with_name("other").exists()
    assert [one.stage for one in queue.listing()] == [Stage.DONE]


def test_kill_between_job_and_image_takes_the_image_again(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    queue.folder(ID).mkdir()
    queue.write(Job(ID, 1))
    assert list(queue.open_jobs()) == []
    job = queue.take(received(tmp_path), now_s=5)
    assert job and [one.id for one in queue.open_jobs()] == [ID]


def test_kill_between_record_and_deletion_is_finished_by_the_next_start(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    job = queue.take(received(tmp_path), now_s=5)
    assert job
    copy = tmp_path / "copy"
    shutil.copytree(queue.folder(ID), copy)
    queue.close(replace(job, stage=Stage.DONE))
    shutil.copytree(copy, queue.folder(ID))
    JobQueue(tmp_path / "q").recover()
    assert list(queue.open_jobs()) == [] and [j.stage for j in queue.listing()] == [Stage.DONE]


def test_kill_between_reason_and_burial_is_finished_by_the_next_start(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    job = queue.take(received(tmp_path), now_s=5)
    assert job
    queue.write(replace(job, stage=Stage.DEAD, reason="why"))
    JobQueue(tmp_path / "q").recover()
    assert not queue.folder(ID).exists() and queue.listing()[0].reason == "why"


def test_job_is_done_when_everything_is_sent(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    taken = queue.take(received(tmp_path), now_s=5)
    assert taken
    job = mark_sent(drafted(queue, taken), "sr", now_s=7)
    assert job.stage is Stage.DRAFTED and job.next_s == 0
    job = mark_failed(job, "fhir", due_s=99, reason="away")
    assert job.next_s == 99 and job.deliveries["fhir"].attempts == 1
    job = mark_sent(job, "fhir", now_s=100)
    assert job.stage is Stage.DONE and job.next_s == NEVER_S
    queue.close(job)
    assert queue.listing() == [job]
    assert not queue.folder(ID).exists()


def test_revived_job_repeats_only_what_was_not_sent(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    taken = queue.take(received(tmp_path), now_s=5)
    assert taken
    job = mark_sent(drafted(queue, taken), "fhir", now_s=7)
    queue.bury(mark_failed(job, "sr", due_s=NEVER_S, reason="refused"), reason="refused")
    assert [one.stage for one in queue.listing()] == [Stage.DEAD]
    again = queue.revive(ID)
    assert again.stage is Stage.DRAFTED and again.next_s == 0
    assert again.deliveries["fhir"].sent_s == 7 and again.deliveries["sr"] == Delivery("sr.dcm")
    assert (queue.folder(ID) / "sr.dcm").read_bytes() == b"report"


@pytest.mark.parametrize("id", ["0" * 40, "../x", ""])
def test_unknown_job_is_not_revived(tmp_path: Path, id: str) -> None:
    with pytest.raises(JobUnknown):
        JobQueue(tmp_path / "q").revive(id)


def test_foreign_file_in_the_inbox_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobUnknown):
        JobQueue(tmp_path / "q").take(tmp_path / "report.dcm", now_s=1)


def test_old_records_are_deleted(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "q")
    for number, id in enumerate(("ab" * 20, "cd" * 20)):
        job = queue.take(received(tmp_path, id), now_s=100.0 * number)
        assert job
        queue.close(replace(job, stage=Stage.REFUSED))
    assert queue.purge(before_s=50) == 1
    assert [job.id for job in queue.listing()] == ["cd" * 20]


def test_delay_doubles_up_to_its_limit() -> None:
    retry = Retry(first_s=5, most_s=60, attempts=9)
    assert [retry.delay_s(n) for n in (1, 2, 3, 4, 5, 500)] == [5, 10, 20, 40, 60, 60]
