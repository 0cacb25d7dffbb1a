"""The site agent: the only holder of a hospital's data, keys, base model, state and policy.

It answers signed requests of the server with signed replies, one method per protocol stage. Before it reads
a pair it checks the operator's signature and this site's approval of the study, the request's signature and
place, cohort, deadline, turn, history and adapter; whatever fails ends in a named, signed refusal.
Guarantees: for one round, attempt and stage it serves one request only, durably (client/state.py). It does
not trust the process that relays the bytes, nor Flower.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from client import policy
from client.data.store import read_pairs
from client.home import SiteHome, read_approved_study, verify_data
from client.models import ModelPool
from client.state import SiteState
from client.training import Draw, TrainingData, gradient_sum, prepare_training
from common.canonical import sha256_hex
from common.config import Mode, Study
from common.errors import EnvelopeMalformed, FedRadError, StudyNotApproved, WrongStage
from common.identity import SigningKey
from common.model.lora import Vector, vector_size, vector_to_bytes
from common.privacy.sampling import Csprng, poisson_sample, studies_of
from common.protocol import (
    SERVER,
    VERSION,
    Expected,
    Message,
    Stage,
    open_message,
    pack_body,
    read_header,
    seal_reply,
    unpack_body,
)
from common.records import SignedRecord, signed_from_json
from common.schedule import active_groups

log = logging.getLogger("fedrad.agent")
MAX_RECORDS = 100_000


@dataclass(frozen=True)
class Progress:
    """How far the agent is; percent in steps of ten, because its reader may be anybody at the socket."""

    study: str
    round: int
    stage: str
    percent: int


@dataclass
class _Running:
    """A study in memory: its durable state and, once needed, its training data."""

    study: Study
    state: SiteState
    data: TrainingData | None = None


class SiteAgent:
    """One hospital's agent; `handle` is its whole surface towards the network."""

    def __init__(
        self,
        home: SiteHome,
        *,
        models: ModelPool | None = None,
        clock: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.home = home
        self._key: SigningKey = home.message_key()
        self._models = models or ModelPool()
        self._clock = clock
        self._random = random_bytes
        self._report = report
        self._running: dict[str, _Running] = {}
        self._one_at_a_time = threading.Lock()

    def handle(self, stage: Stage, data: bytes) -> bytes:
        """Answer one signed request with a signed reply or a signed refusal.

        Raises a FedRadError only where there is nobody to answer to: an unknown or unapproved study, or a
        message that its sender did not sign for this place.
        """
        with self._one_at_a_time:
            message, running = self._authenticate(stage, data)
            try:
                return self._serve(message, running)
            except FedRadError as error:
                header = message.header
                log.warning(
                    "refused %s of round %d attempt %d of study %s: %s: %s",
                    stage.value, header.round, header.attempt, header.study[:12], error.code, error,
                )  # fmt: skip
                body = pack_body({"error": error.code, "message": str(error)})
                return seal_reply(self._key, message, nonce=self._nonce(), body=body, refusal=True)

    def _authenticate(self, stage: Stage, data: bytes) -> tuple[Message, _Running]:
        try:
            sha256 = read_header(data, max_body_bytes=1 << 62).study
            running = self._open_study(sha256)
            message = open_message(
                data,
                keys={SERVER: running.study.cohort.operator_key},
                expected=Expected(study=sha256, recipient=self.home.site, sender=SERVER, stage=stage),
                max_body_bytes=_max_request_bytes(running.study),
            )
        except FedRadError as error:
            log.warning("refused a %s message: %s: %s", stage.value, error.code, error)
            raise
        if message.header.kind.value != "request":
            raise WrongStage(f"expected a request, got a {message.header.kind.value}")
        return message, running

    def _open_study(self, sha256: str) -> _Running:
        study = read_approved_study(self.home, sha256)  # every time: an approval can be withdrawn
        if study.site(self.home.site).message_key != self._key.public:
            raise StudyNotApproved(
                f"cohort.site {self.home.site}: expected this site's message key, got another"
            )
        if sha256 not in self._running:
            state = SiteState(self.home.state_directory(sha256), study=sha256)
            self._running[sha256] = _Running(study, state)
        return self._running[sha256]

    def _serve(self, message: Message, running: _Running) -> bytes:
        stage = message.header.stage
        if stage is Stage.HELLO:
            return self._reply(message, self._hello(message, running))
        spooled = running.state.spooled(message.header, message.sha256)
        if spooled is not None:
            return spooled
        if stage is Stage.CONTRIBUTE:
            body = self._contribute(message, running)
        elif stage is Stage.FINISH:
            body = self._finish(message, running)
        else:
            raise WrongStage(
                f"privacy.mode {running.study.privacy.mode.value}: expected no stage {stage.value}, got one"
            )
        reply = self._reply(message, body)
        if stage is not Stage.FINISH:
            running.state.spool(message.header, reply)
        return reply

    def _reply(self, message: Message, body: bytes) -> bytes:
        return seal_reply(self._key, message, nonce=self._nonce(), body=body)

    def _nonce(self) -> str:
        return self._random(16).hex()

    # --- stages -------------------------------------------------------------------------------------------

    def _hello(self, message: Message, running: _Running) -> bytes:
        """Say who is here and how far its verified history goes; load model and data before round one."""
        unpack_body(message.body, fields={})
        self._training_data(running)
        seen = running.state.seen()
        return pack_body({"version": VERSION, "seen_round": seen.round, "seen_record": seen.record_sha256})

    def _contribute(self, message: Message, running: _Running) -> bytes:
        """Check everything, then draw patients and return their gradient sum."""
        meta, blob = unpack_body(
            message.body,
            fields={"adapter_sha256": str, "cohort": list, "deadline_unix_s": float, "records": list},
        )
        study, state, header = running.study, running.state, message.header
        seen = state.seen()
        policy.verify_turn(study, header, seen, last_attempt=state.last_attempt(header.round))
        policy.verify_deadline(meta["deadline_unix_s"], now_unix_s=self._clock(), study=study)
        policy.verify_cohort(study, meta["cohort"], site=self.home.site)
        vector = policy.verify_adapter(study, blob, adapter_sha256=meta["adapter_sha256"])
        newest = policy.verify_history(
            study, header, _records(meta["records"]), seen, adapter_sha256=meta["adapter_sha256"]
        )
        state.see(newest)
        seed = state.begin(header, message.sha256, self._random(32))
        total = self._gradient_sum(running, header.round, vector, seed)
        return pack_body({"adapter_sha256": meta["adapter_sha256"], "form": "f32"}, vector_to_bytes(total))

    def _finish(self, message: Message, running: _Running) -> bytes:
        """Verify the last records and remember how the study ended."""
        meta, _ = unpack_body(message.body, fields={"records": list})
        newest = policy.extend_history(running.study, _records(meta["records"]), running.state.seen())
        running.state.see(newest)
        return pack_body({"seen_round": newest.round, "seen_record": newest.record_sha256})

    # --- work ---------------------------------------------------------------------------------------------

    def _training_data(self, running: _Running) -> TrainingData:
        if running.data is None:
            verify_data(self.home)
            base = self.home.base_directory(running.study.base.name)
            with self._models.use(running.study, base) as adapted:
                running.data = prepare_training(
                    adapted,
                    running.study,
                    read_pairs(self.home.data),
                    data=self.home.data,
                    cache=self.home.cache,
                    progress=lambda what, done, total: self._tell(running.study, 0, what, done, total),
                )
        return running.data

    def _gradient_sum(self, running: _Running, round: int, vector: Vector, seed: bytes) -> Any:
        study, data = running.study, self._training_data(running)
        draw = draw_patients(study, data, site=self.home.site, round=round, seed=seed)
        base = self.home.base_directory(study.base.name)
        with self._models.use(study, base) as adapted:
            adapted.write_vector(vector)
            total = gradient_sum(
                adapted,
                data,
                draw,
                groups=active_groups(study, round),
                clip_norm=None if study.privacy.mode is Mode.PLAIN else study.privacy.clip_norm,
                microbatch_patients=study.training.microbatch_patients,
                progress=lambda done, total: self._tell(study, round, "contribute", done, total),
            )
        return total.astype(np.float32)

    def _tell(self, study: Study, round: int, what: str, done: int, total: int) -> None:
        percent = 10 * (10 * done // max(1, total))
        self._report(Progress(study.study.id, round, what, percent))


def draw_patients(study: Study, data: TrainingData, *, site: str, round: int, seed: bytes) -> Draw:
    """Draw a round's patients (Poisson) and at most K studies of each, from the round's seed.

    With a `[testing]` seed the draw depends on seed, site and round only, so that runs can be compared.
    """
    if study.testing is not None:
        seed = bytes.fromhex(sha256_hex(f"fedrad test draw|{study.testing.seed}|{site}|{round}".encode()))
    csprng = Csprng(seed, seeded_for_test=study.testing is not None)
    draw = []
    for patient in poisson_sample(csprng, data.patients, study.training.sampling_rate):
        rows = [str(row) for row in data.studies[patient]]
        chosen = studies_of(csprng, rows, study.training.studies_per_patient)
        draw.append((patient, tuple(int(row) for row in chosen)))
    return draw


def _records(values: Sequence[Any]) -> list[SignedRecord]:
    if len(values) > MAX_RECORDS:
        raise EnvelopeMalformed(f"records: expected at most {MAX_RECORDS}, got {len(values)}")
    return [signed_from_json(value) for value in values]


def _max_request_bytes(study: Study) -> int:
    return 4 * vector_size(study.adapter.tensors) + (8 << 20)
