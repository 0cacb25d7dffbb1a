"""The durable queue of the PACS loop: one folder per image, moved from state to state by single renames.

    open/<id>/job.json       what is known and what is still to do
    open/<id>/image.dcm      as it was received
    open/<id>/sr.dcm  report.json    the deliveries' bytes, made once, sent as often as needed
    done/<id>.json           delivered or refused; the rest is deleted
    dead/<id>/               given up, with the reason; waits for `fedrad-site pacs retry`

`id` is the start of the SHA-256 of the image's SOP Instance UID. Guarantees: after a kill at any point the
next start goes on; the same image is one job; a delivery's bytes and identifiers never change once made, so a
repeated delivery is the same object at the other side; a delivery marked sent is never made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.errors import JobUnknown
from common.files import sync_directory, write_atomic

NEVER_S = float("inf")
_ID = re.compile(r"[0-9a-f]{40}")


class Stage(StrEnum):
    """How far a job is."""

    RECEIVED = "received"
    DRAFTED = "drafted"
    DONE = "done"
    REFUSED = "refused"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One thing to deliver: `file` in the job's folder; `due_s` is when it is tried next."""

    file: str
    sent_s: float | None = None
    attempts: int = 0
    due_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One received image on its way; `deliveries` by name (`sr`, `fhir`) once it is drafted."""

    id: str
    received_s: float
    stage: Stage = Stage.RECEIVED
    reason: str = ""
    attempts: int = 0
    due_s: float = 0.0
    draft: str = ""
    deliveries: dict[str, Delivery] = field(default_factory=dict)

    @property
    def next_s(self) -> float:
        """When there is something to do; NEVER_S where there is not."""
        if self.stage is Stage.RECEIVED:
            return self.due_s
        waiting = [one.due_s for one in self.deliveries.values() if one.sent_s is None]
        return min(waiting, default=0.0) if self.stage is Stage.DRAFTED else NEVER_S


class JobQueue:
    """The queue of one folder; one process works on it, `fedrad-site pacs` may read and revive beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("open", "done", "dead"):
            (directory / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)

    def take(self, received: Path, *, now_s: float) -> Job | None:
        """Make a job of a received file, which is moved; None where the image is known already."""
        id = received.stem
        if not _ID.fullmatch(id):
            raise JobUnknown("expected a file as the receiver names it, got another")
        folder = self.folder(id)
        if (folder / "image.dcm").exists() or self._closed(id):
            received.unlink(missing_ok=True)
            return None
        folder.mkdir(exist_ok=True, mode=0o700)
        job = Job(id, now_s)
        self.write(job)
        os.replace(received, folder / "image.dcm")
        sync_directory(folder)
        sync_directory(self.directory / "open")
        return job

    def folder(self, id: str) -> Path:
        return self.directory / "open" / id

    def open_jobs(self) -> Iterator[Job]:
        """Yield every open job whose image is here, oldest first; what cannot be read is left alone."""
        jobs = []
        for path in (self.directory / "open").iterdir():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if (path / "image.dcm").is_file():
                    jobs.append(_parse((path / "job.json").read_bytes()))
        return iter(sorted(jobs, key=lambda job: (job.received_s, job.id)))

    def listing(self) -> list[Job]:
        """Every job: open, dead and the records of done ones."""
        closed = [_parse(path.read_bytes()) for path in (self.directory / "done").glob("*.json")]
        dead = [_parse(path.read_bytes()) for path in (self.directory / "dead").glob("*/job.json")]
        ended = {job.id for job in closed}
        waiting = [job for job in self.open_jobs() if job.id not in ended]
        return sorted([*waiting, *dead, *closed], key=lambda job: (job.received_s, job.id))

    def write(self, job: Job) -> None:
        """Store an open job durably."""
        write_atomic(self.folder(job.id) / "job.json", _format(job), mode=0o600)

    def close(self, job: Job) -> None:
        """End a job that is done or refused: its record stays, image and reports go."""
        write_atomic(self.directory / "done" / f"{job.id}.json", _format(job), mode=0o600)
        shutil.rmtree(self.folder(job.id))

    def bury(self, job: Job, *, reason: str) -> None:
        """Put a job aside that cannot be delivered, with everything it has."""
        self.write(replace(job, stage=Stage.DEAD, reason=reason))
        os.replace(self.folder(job.id), self.directory / "dead" / job.id)
        sync_directory(self.directory / "dead")

    def revive(self, id: str) -> Job:
        """Open a dead job again: what was not sent is due at once; raises JobUnknown."""
        path = self.directory / "dead" / id
        if not _ID.fullmatch(id) or not (path / "job.json").is_file():
            raise JobUnknown("expected the id of a dead job; `fedrad-site pacs list` shows them")
        job = _parse((path / "job.json").read_bytes())
        again = {
            name: one if one.sent_s is not None else Delivery(one.file)
            for name, one in job.deliveries.items()
        }
        stage = Stage.DRAFTED if again else Stage.RECEIVED
        job = replace(job, stage=stage, reason="", attempts=0, due_s=0.0, deliveries=again)
        write_atomic(path / "job.json", _format(job), mode=0o600)
        os.replace(path, self.folder(id))
        sync_directory(self.directory / "open")
        return job

    def recover(self) -> None:
        """Finish what a kill left half done; call once at the start."""
        for path in (self.directory / "open").iterdir():
            if (self.directory / "done" / f"{path.name}.json").is_file():
                shutil.rmtree(path)
        for job in self.open_jobs():
            if job.stage is Stage.DEAD:
                os.replace(self.folder(job.id), self.directory / "dead" / job.id)

    def purge(self, *, before_s: float) -> int:
        """Delete the records of jobs received before `before_s`; returns how many."""
        old = [
            path
            for path in (self.directory / "done").glob("*.json")
            if _parse(path.read_bytes()).received_s < before_s
        ]
        for path in old:
            path.unlink()
        return len(old)

    def _closed(self, id: str) -> bool:
        return (self.directory / "done" / f"{id}.json").exists() or (self.directory / "dead" / id).exists()


def mark_sent(job: Job, name: str, *, now_s: float) -> Job:
    """Record a delivery; a job whose deliveries are all sent is done."""
    sent = replace(job.deliveries[name], sent_s=now_s, reason="")
    deliveries = {**job.deliveries, name: sent}
    complete = all(one.sent_s is not None for one in deliveries.values())
    return replace(job, deliveries=deliveries, stage=Stage.DONE if complete else job.stage)


def mark_failed(job: Job, name: str, *, due_s: float, reason: str) -> Job:
    """Record a failed attempt and when the next is due."""
    one = job.deliveries[name]
    failed = replace(one, attempts=one.attempts + 1, due_s=due_s, reason=reason[:300])
    return replace(job, deliveries={**job.deliveries, name: failed})


def _format(job: Job) -> bytes:
    return json.dumps(asdict(job), sort_keys=True).encode()


def _parse(data: bytes) -> Job:
    value: dict[str, Any] = json.loads(data)
    deliveries = {name: Delivery(**one) for name, one in value.pop("deliveries").items()}
    return Job(**{**value, "stage": Stage(value["stage"]), "deliveries": deliveries})
