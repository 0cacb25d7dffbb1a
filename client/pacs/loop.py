"""Receiver → draft → SR and FHIR → deliveries, over the durable queue.

One thread looks after the queue; a few workers draft and deliver. Guarantees: an image that was acknowledged
to the PACS is on disk; each image is drafted until a draft or a refusal exists, and each delivery is made
until the other side has it, refuses it for good, or the attempts are used up; what is given up stays, with
its reason. Logs name jobs, never patients. It sends nothing final: see structured_report.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from client.data.receive import Receiver, start_receiver
from client.pacs.config import PacsConfig
from client.pacs.diagnostic_report import diagnostic_report
from client.pacs.jobs import NEVER_S, Delivery, Job, JobQueue, Stage, mark_failed, mark_sent
from client.pacs.sending import post_report, store_report
from client.pacs.structured_report import ReportText, derived_uid, read_evidence, structured_report
from common.errors import DeliveryFailed, DeliveryRefused, FedRadError, ImageUnreadable, JobUnknown
from common.files import write_atomic

if TYPE_CHECKING:
    from client.serving.engine import ModelVersion

LOG = logging.getLogger("fedrad.pacs")
WORKERS = 4
POLL_S = 5.0
_PURGE_EVERY_S = 3600.0


@dataclass(frozen=True, slots=True)
class Written:
    """What a drafter made of an image; `refused` is the guard's code, or why there is nothing to send."""

    draft: str
    model: ModelVersion
    sentences: tuple[str, ...]
    refused: str = ""


Drafter = Callable[[bytes, str], Written]
"""From an image's bytes and its indication to a draft; called from worker threads, raises FedRadError."""


class PacsLoop:
    """A running loop; `start` begins, `stop` ends after what is in hand."""

    def __init__(
        self, config: PacsConfig, drafter: Drafter, *, wall_s: Callable[[], float] = time.time
    ) -> None:
        self.config, self._drafter, self._wall_s = config, drafter, wall_s
        self.queue = JobQueue(config.directory)
        self.receiver: Receiver | None = None
        self._wake, self._ended = threading.Event(), threading.Event()
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="pacs")
        self._thread = threading.Thread(target=self._run, name="pacs-queue", daemon=True)

    def start(self) -> None:
        """Go on with what is there and begin to listen; raises ReceiverRefused."""
        self.queue.recover()
        self.receiver = start_receiver(self.config.listen, stored=self.wake)
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Stop listening, finish what is in hand, leave the rest to the next start."""
        if self.receiver:
            self.receiver.close()
        self._ended.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        purged_s = float("-inf")
        while not self._ended.is_set():
            self._wake.clear()
            try:
                now = self._wall_s()
                if now - purged_s > _PURGE_EVERY_S:
                    self.queue.purge(before_s=now - self.config.keep_days * 86_400)
                    purged_s = now
                wait_s = self._dispatch(now)
            except OSError as error:  # a full or absent disk must not end the loop
                LOG.error("queue: %s", error.strerror)
                wait_s = POLL_S
            self._wake.wait(min(POLL_S, max(0.01, wait_s)))

    def _dispatch(self, now_s: float) -> float:
        """Take in what was received and hand out what is due; returns seconds until something is due."""
        for path in sorted(self.config.listen.inbox.glob("*/*.dcm")):
            try:
                self.queue.take(path, now_s=now_s)
            except JobUnknown:
                LOG.warning("inbox: a file that the receiver did not write stays where it is")
        wait_s = POLL_S
        for job in self.queue.open_jobs():
            with self._lock:
                if job.id in self._busy:
                    continue
                if job.next_s > now_s:
                    wait_s = min(wait_s, job.next_s - now_s)
                    continue
                self._busy.add(job.id)
            self._pool.submit(self._work, job)
        return wait_s

    def _work(self, job: Job) -> None:
        try:
            if job.stage is Stage.RECEIVED:
                drafted = self._draft(job)
                if drafted is None:
                    return
                job = drafted
            self._deliver(job)
        except OSError as error:
            LOG.error("job %s: %s", job.id[:12], error.strerror)
        except Exception as error:
            LOG.exception("job %s: %s", job.id[:12], type(error).__name__)
            self.queue.bury(job, reason=f"defect: {type(error).__name__}")
        finally:
            with self._lock:
                self._busy.discard(job.id)
            self._wake.set()

    def _draft(self, job: Job) -> Job | None:
        """Draft an image and make its deliveries; None where it ended, or waits for another attempt."""
        data = (self.queue.folder(job.id) / "image.dcm").read_bytes()
        try:
            evidence = read_evidence(data)
            from client.serving.worklist import indication_of

            indication = indication_of(evidence)
            written = self._drafter(data, indication)
        except ImageUnreadable:
            self.queue.close(replace(job, stage=Stage.REFUSED, reason="image-unreadable"))
            return None
        except (FedRadError, TimeoutError) as error:
            reason = error.code if isinstance(error, FedRadError) else "timeout"
            self._again(replace(job, attempts=job.attempts + 1), reason=f"draft: {reason}")
            return None
        if written.refused:
            LOG.info("job %s: refused, %s", job.id[:12], written.refused)
            self.queue.close(replace(job, stage=Stage.REFUSED, reason=written.refused, draft=written.draft))
            return None
        return self._build(job, evidence, written, indication)

    def _build(self, job: Job, evidence: Any, written: Written, indication: str) -> Job:
        """Write the deliveries' bytes, then the job that names them."""
        text = ReportText(written.draft, written.sentences, indication)
        folder, deliveries = self.queue.folder(job.id), {}
        if self.config.destination is not None:
            report = structured_report(evidence, text, written.model, institution=self.config.institution)
            write_atomic(folder / "sr.dcm", report, mode=0o600)
            deliveries["sr"] = Delivery("sr.dcm")
        if self.config.fhir is not None:
            issued = datetime.fromtimestamp(self._wall_s(), UTC).isoformat(timespec="seconds")
            uid = derived_uid("report", str(evidence.SOPInstanceUID), written.draft)
            resource = diagnostic_report(
                evidence, text, written.model, issued=issued, report_uid=uid if "sr" in deliveries else ""
            )
            write_atomic(folder / "report.json", resource, mode=0o600)
            deliveries["fhir"] = Delivery("report.json")
        drafted = replace(job, stage=Stage.DRAFTED, draft=written.draft, deliveries=deliveries, due_s=0.0)
        self.queue.write(drafted)
        return drafted

    def _deliver(self, job: Job) -> None:
        """Make every delivery that is due; end the job when all are made or one cannot be."""
        for name, delivery in sorted(job.deliveries.items()):
            if delivery.sent_s is not None or delivery.due_s > self._wall_s():
                continue
            try:
                self._send(job, name, (self.queue.folder(job.id) / delivery.file).read_bytes())
                job = mark_sent(job, name, now_s=self._wall_s())
            except DeliveryFailed as error:
                attempts = delivery.attempts + 1
                more = attempts < self.config.retry.attempts
                due_s = self._wall_s() + self.config.retry.delay_s(attempts) if more else NEVER_S
                job = mark_failed(job, name, due_s=due_s, reason=f"{error} ({attempts} attempts)")
                LOG.warning("job %s: %s, attempt %d failed", job.id[:12], name, attempts)
            except DeliveryRefused as error:
                job = mark_failed(job, name, due_s=NEVER_S, reason=str(error))
            self.queue.write(job)
        if job.stage is Stage.DONE:
            self.queue.close(job)
            LOG.info("job %s: delivered", job.id[:12])
        elif job.next_s == NEVER_S:
            unsent = {name: one.reason for name, one in job.deliveries.items() if one.sent_s is None}
            self.queue.bury(job, reason="; ".join(f"{name}: {why}" for name, why in sorted(unsent.items())))
            LOG.error("job %s: given up", job.id[:12])

    def _send(self, job: Job, name: str, data: bytes) -> None:
        if name == "sr":
            if self.config.destination is None:
                raise DeliveryRefused("expected a destination in the configuration, got none")
            store_report(data, self.config.destination, calling=self.config.listen.ae_title)
        else:
            if self.config.fhir is None:
                raise DeliveryRefused("expected [fhir] in the configuration, got none")
            post_report(data, self.config.fhir, name=job.id[:32])

    def _again(self, job: Job, *, reason: str) -> None:
        if job.attempts >= self.config.retry.attempts:
            self.queue.bury(job, reason=f"{reason} ({job.attempts} attempts)")
            return
        due_s = self._wall_s() + self.config.retry.delay_s(job.attempts)
        self.queue.write(replace(job, due_s=due_s, reason=reason))
        LOG.warning("job %s: %s, attempt %d", job.id[:12], reason, job.attempts)
