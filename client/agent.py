"""The site agent: the only holder of a hospital's data, keys, base model, budget and policy.

It answers signed requests of the server with signed replies, one method per protocol stage. Before it reads
a pair it checks the operator's signature and this site's approval of the study, the request's signature and
place, cohort, deadline, turn, history, adapter and keys, and charges its budget; whatever fails ends in a
named, signed refusal. Guarantees: for one round, attempt and stage it serves one request only, durably
(client/state.py, client/budget.py, client/masking.py). It does not trust the process that relays the bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client import policy
from client.budget import Budget, BudgetLimits
from client.contribution import local_update, noised_sum, plain_sum, round_randomness
from client.data.store import read_pairs
from client.evaluate.federated import charge_evaluation, evaluation_account
from client.home import SiteHome, read_approval, read_approved_study, verify_data
from client.masking import MaskedRounds
from client.models import ModelPool
from client.state import Seen, SiteState
from client.statements import statements
from client.training import TrainingData, prepare_training
from client.witness import SiteWitness
from common.compatibility import Speaks, agree, format_speaks, parse_speaks, running_release
from common.config import Mode, Study
from common.deflate import inflate
from common.errors import (
    AdapterInvalid,
    BaseHashMismatch,
    BaseInvalid,
    BodyTooLarge,
    BudgetMismatch,
    DataInsufficient,
    EnvelopeMalformed,
    FedRadError,
    LedgerInvalid,
    StudyNotApproved,
    WrongStage,
)
from common.evaluation_counts import evaluation_plan_of
from common.identity import SigningKey
from common.ledger.statements import commit, format_participation, sign_contribution
from common.model.lora import Vector, vector_size, vector_to_bytes
from common.privacy.sampling import Csprng
from common.privacy.study_plan import plan_of, verify_plan
from common.protocol import (
    MAX_OVERHEAD_BYTES,
    SERVER,
    Bytes,
    Envelope,
    Expected,
    Header,
    Message,
    Stage,
    open_message,
    pack_body,
    read_header,
    seal_reply,
    unpack_body,
)
from common.records import SignedRecord, signed_from_json
from common.secagg.messages import (
    format_keys,
    format_reveal,
    format_shares,
    format_upload,
    parse_key_set,
    parse_opening,
    parse_survivor_set,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

log = logging.getLogger("fedrad.agent")
MAX_RECORDS = 100_000
_MAX_SHOWN_BYTES = 16 << 20


@dataclass(frozen=True)
class Progress:
    """That a stage began (0) or ended (100): any more would count patients to whoever is at the socket."""

    study: str
    round: int
    stage: str
    percent: int


@dataclass
class _Running:
    """A study in memory: its durable state and, once needed, its training data."""

    study: Study
    state: SiteState
    masked: MaskedRounds
    witness: SiteWitness
    data: TrainingData | None = None
    data_sha256: str = ""


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
        release: Speaks | None = None,
    ) -> None:
        self.home = home
        self._release = release or running_release()
        self._key: SigningKey = home.message_key()
        self._witness_key: SigningKey = home.witness_key()
        self._models = models or ModelPool()
        self._clock = clock
        self._random = random_bytes
        self._report = report
        self._running: dict[str, _Running] = {}
        self._budget: Budget | None = None
        self._one_at_a_time = threading.Lock()

    def handle(self, stage: Stage, data: Bytes | Envelope) -> Envelope:
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

    def message_limit(self, start: bytes) -> int:
        """Say how long a message that starts so may be, in bytes; raises BodyTooLarge, else as `handle`."""
        try:
            header = read_header(start, max_body_bytes=1 << 62, spoken=self._release.versions)
            study = read_approved_study(self.home, header.study)
            most = _max_request_bytes(study)
            if header.body_bytes > most:
                raise BodyTooLarge(f"expected a body of at most {most} bytes, got {header.body_bytes}")
            return MAX_OVERHEAD_BYTES + header.body_bytes
        except FedRadError as error:
            log.warning("refused a message at its first bytes: %s: %s", error.code, error)
            raise

    def _authenticate(self, stage: Stage, data: Bytes | Envelope) -> tuple[Message, _Running]:
        try:
            sha256 = read_header(data, max_body_bytes=1 << 62, spoken=self._release.versions).study
            running = self._open_study(sha256)
            message = open_message(
                data,
                keys={SERVER: running.study.cohort.operator_key},
                expected=Expected(study=sha256, recipient=self.home.site, sender=SERVER, stage=stage),
                max_body_bytes=_max_request_bytes(running.study),
                spoken=self._release.versions,
            )
        except FedRadError as error:
            log.warning("refused a %s message: %s: %s", stage.value, error.code, error)
            raise
        if message.header.kind.value != "request":
            raise WrongStage(f"expected a request, got a {message.header.kind.value}")
        return message, running

    def _open_study(self, sha256: str) -> _Running:
        study = read_approved_study(self.home, sha256)  # every time: an approval can be withdrawn
        pinned = study.site(self.home.site)
        if pinned.message_key != self._key.public:
            raise StudyNotApproved(
                f"cohort.site {self.home.site}: expected this site's message key, got another"
            )
        if pinned.witness_key not in ("", self._witness_key.public):
            raise StudyNotApproved(
                f"cohort.site {self.home.site}: expected this site's witness key, got another"
            )
        if sha256 not in self._running:
            directory = self.home.state_directory(sha256)
            masked = MaskedRounds(
                directory / "masking", study=study, site=self.home.site, key=self._key,
                random_bytes=self._random,
            )  # fmt: skip
            witness = SiteWitness(
                self.home.directory / "witness", study=study, site=self.home.site, key=self._witness_key,
                clock=self._clock,
            )  # fmt: skip
            self._running[sha256] = _Running(study, SiteState(directory, study=sha256), masked, witness)
        return self._running[sha256]

    def _serve(self, message: Message, running: _Running) -> Envelope:
        stage = message.header.stage
        if stage is Stage.HELLO:
            return self._reply(message, self._hello(message, running))
        if stage is Stage.WITNESS:
            return self._reply(message, self._witness(message, running))
        spooled = running.state.spooled(message.header, message.sha256)
        if spooled is not None:
            return spooled
        serve = {
            Stage.KEYS: self._keys,
            Stage.SHARES: self._shares,
            Stage.CONTRIBUTE: self._contribute,
            Stage.UNMASK: self._unmask,
        }[stage]
        if stage in (Stage.KEYS, Stage.SHARES, Stage.UNMASK) and not running.study.masked:
            raise WrongStage(f"privacy.masking: expected no stage {stage.value} in this study, got one")
        reply = self._reply(message, serve(message, running))
        self._tell(running.study, message.header.round, stage, 100)
        running.state.spool(message.header, reply)
        return reply

    def _reply(self, message: Message, body: bytes) -> Envelope:
        return seal_reply(self._key, message, nonce=self._nonce(), body=body)

    def _nonce(self) -> str:
        return self._random(16).hex()

    # --- stages -------------------------------------------------------------------------------------------

    def _hello(self, message: Message, running: _Running) -> bytes:
        """Say how far this site's history goes; before it trains, load model and data, commit the budget."""
        meta, _ = unpack_body(message.body, fields={"train": bool, "speaks": dict})
        agree(parse_speaks(meta["speaks"]), self._release)
        seen = running.state.seen()
        own: list[bytes] = []
        if meta["train"]:
            if running.study.privacy.mode is not Mode.PLAIN and seen.round + 1 < running.study.rounds:
                verify_plan(running.study)
                self._open_budget().commit(running.study.sha256, plan_of(running.study))
                if running.study.federated_evaluation is not None:
                    evaluation = evaluation_plan_of(running.study)
                    evaluation.verify_accounting()
                    self._open_budget().commit(evaluation_account(running.study.sha256), evaluation)
            data = self._training_data(running)
            own = running.state.stated_once(
                lambda: statements(
                    self.home, running.study, patients=len(data.patients), studies=len(data.examples),
                    data_sha256=running.data_sha256,
                )
            )  # fmt: skip
        about = {
            "speaks": format_speaks(self._release), "seen_round": seen.round,
            "seen_record": seen.record_sha256, "seen_size": running.witness.seen_size,
        }  # fmt: skip
        return pack_body(about, read_approval(self.home, running.study), b"\n".join(own))

    def _keys(self, message: Message, running: _Running) -> bytes:
        """Advertise ephemeral keys for a round (the long form, or joining the next round)."""
        unpack_body(message.body, fields={})
        policy.verify_turn(running.study, message.header, running.state.seen(), last_attempt=0)
        running.state.begin(message.header, message.sha256, self._random(32))
        machine = running.masked.machine(message.header.round, message.header.attempt)
        return pack_body({}, format_keys(machine.advertise()))

    def _shares(self, message: Message, running: _Running) -> bytes:
        """Deal shares of this site's secrets to the round's key set."""
        _, (key_set,) = unpack_body(message.body, fields={}, parts=1)
        header = message.header
        policy.verify_turn(running.study, header, running.state.seen(), last_attempt=0)
        running.state.begin(header, message.sha256, self._random(32))
        return pack_body({}, self._deal(running, header.round, header.attempt, bytes(key_set)))

    def _contribute(self, message: Message, running: _Running) -> bytes:
        """Check everything, charge the budget, then draw patients and return their protected sum."""
        meta, (opening, shown, blob) = unpack_body(
            message.body,
            fields={"adapter_sha256": str, "cohort": list, "deadline_unix_s": float},
            parts=3,
        )
        study, state, header = running.study, running.state, message.header
        records, ledger = _shown(shown, parts=3 if study.masked else 1)
        seen = state.seen()
        policy.verify_turn(study, header, seen, last_attempt=state.last_attempt(header.round))
        policy.verify_deadline(meta["deadline_unix_s"], now_unix_s=self._clock())
        policy.verify_cohort(study, meta["cohort"], site=self.home.site)
        vector = policy.verify_adapter(study, blob, adapter_sha256=meta["adapter_sha256"])
        newest = policy.verify_history(study, header, records, seen, adapter_sha256=meta["adapter_sha256"])
        policy.verify_step(study, vector, round=header.round, kept=state.kept_adapter())
        if study.masked:
            machine = running.masked.machine(header.round, header.attempt)
            parsed = parse_opening(bytes(opening))
            policy.verify_roster(meta["cohort"], parsed.roster)
            machine.open(parsed, adapter=meta["adapter_sha256"])
            running.masked.store(header.round, header.attempt)
            cosignature = self._cosign(running, ledger, newest)
        else:
            if newest != seen:
                raise LedgerInvalid("expected records that this site has seen in the log, got a newer one")
            running.witness.verify_quorum(ledger[0])
            cosignature = b""
        state.see(newest)
        running.masked.forget_before(newest.round)
        seed = state.begin(header, message.sha256, self._random(32))
        seed = self._charge(running, message, seed)
        state.keep_adapter(header.round, bytes(blob))
        self._tell(study, header.round, Stage.CONTRIBUTE, 0)
        csprng = round_randomness(study, site=self.home.site, round=header.round, seed=seed)
        upload = keys = b""
        sent: bytes | memoryview
        if study.privacy.mode is not Mode.CONSORTIUM:
            form = "f32"
            sent = vector_to_bytes(self._float_contribution(running, header.round, vector, csprng))
        else:
            form = "masked" if study.masked else "u32"
            evaluates = header.round == study.rounds
            work = self._evaluation if evaluates else self._noised_sum
            units = work(running, header.round, vector, csprng)
            if study.masked:
                upload = format_upload(running.masked.mask(header.round, header.attempt, units))
                keys = self._next_keys(running, header.round)
            sent = units.astype("<u4", copy=False).data
        statement, commitment_key = self._state(running, header, meta["adapter_sha256"], seed, sent)
        about = {"adapter_sha256": meta["adapter_sha256"], "form": form}
        return pack_body(about, upload, keys, cosignature, statement, commitment_key, sent)

    def _cosign(self, running: _Running, offer: list[bytes], newest: Seen) -> bytes:
        """Check the ledger's newest checkpoint and entry against this site's history, then cosign."""
        record = newest.record_sha256 if newest.round >= 0 else ""
        return running.witness.cosign(*offer, record_sha256=record)

    def _state(
        self, running: _Running, header: Header, adapter_sha256: str, seed: bytes, sent: bytes | memoryview
    ) -> tuple[bytes, bytes]:
        """State what this site did: a commitment to what it sends, its noise, ε spent with this round."""
        study, spent, sigma = running.study, 0.0, 0.0
        if study.privacy.mode is not Mode.PLAIN:
            evaluates = header.round == study.rounds
            account = evaluation_account(study.sha256) if evaluates else study.sha256
            spent = self._open_budget().spent(account)
            sigma = (evaluation_plan_of(study) if evaluates else plan_of(study)).site_share_sigma_units
        commitment_key = hashlib.sha256(b"fedrad commitment key\0" + seed).digest()
        statement = sign_contribution(
            study, self._key, site=self.home.site, number=header.round, attempt=header.attempt,
            adapter_in=adapter_sha256, commitment=commit(commitment_key, sent), sigma_units=sigma,
            epsilon=spent,
        )  # fmt: skip
        return format_participation(statement), commitment_key

    def _unmask(self, message: Message, running: _Running) -> bytes:
        """Reveal for one survivor set, once a quorum has witnessed; deal shares for the next round."""
        _, (survivors, key_set, witnessed) = unpack_body(message.body, fields={}, parts=3)
        header = message.header
        policy.verify_turn(running.study, header, running.state.seen(), last_attempt=0)
        policy.verify_previous(header, running.state.seen())
        running.witness.verify_quorum(inflate(witnessed, max_bytes=_MAX_SHOWN_BYTES))
        machine = running.masked.machine(header.round, header.attempt)
        reveal = machine.reveal(parse_survivor_set(bytes(survivors)))
        running.state.begin(header, message.sha256, self._random(32))
        running.masked.store(header.round, header.attempt)
        shares = b""
        if key_set:
            shares = self._deal(running, header.round + 1, 1, bytes(key_set))
        return pack_body({}, format_reveal(reveal), shares)

    def _witness(self, message: Message, running: _Running) -> bytes:
        """Verify the newest records and cosign the ledger over them; after the last, give back the budget."""
        _, (shown,) = unpack_body(message.body, fields={}, parts=1)
        study, state = running.study, running.state
        records, offer = _shown(shown, parts=3)
        newest = policy.extend_history(study, records, state.seen())
        cosignature = self._cosign(running, offer, newest)
        state.see(newest)
        if newest.round == study.rounds - 1:
            running.masked.forget_before(study.sums + 1)
            if study.privacy.mode is not Mode.PLAIN:
                self._open_budget().end(study.sha256)
            if study.federated_evaluation is not None:
                with contextlib.suppress(BudgetMismatch):  # it took no part in the evaluation
                    self._open_budget().end(evaluation_account(study.sha256))
        return pack_body({"seen_round": newest.round, "seen_record": newest.record_sha256}, cosignature)

    def _deal(self, running: _Running, round: int, attempt: int, key_set: bytes) -> bytes:
        shares = running.masked.machine(round, attempt).deal(parse_key_set(key_set))
        running.masked.store(round, attempt)
        return format_shares(shares)

    def _next_keys(self, running: _Running, round: int) -> bytes:
        if round + 1 >= running.study.rounds:
            return b""
        return format_keys(running.masked.machine(round + 1, 1).advertise())

    # --- work ---------------------------------------------------------------------------------------------

    def _training_data(self, running: _Running) -> TrainingData:
        """Load the site's pairs, again when they changed; what is wrong with them stays in its own log."""
        try:
            return self._load_training_data(running)
        except (BaseInvalid, BaseHashMismatch, AdapterInvalid):
            raise
        except FedRadError as error:
            log.warning("this site's data: %s: %s", error.code, error)
            raise DataInsufficient(
                "expected data that can serve the study, got none; the site's own log says why"
            ) from error

    def _load_training_data(self, running: _Running) -> TrainingData:
        study = running.study
        verify_data(self.home)
        sha256 = hashlib.sha256((self.home.data / "pairs.jsonl").read_bytes()).hexdigest()
        if running.data is not None and running.data_sha256 == sha256:
            return running.data
        with self._models.use(study, self.home.base_directory(study.base.name)) as adapted:
            data = prepare_training(
                adapted,
                study,
                read_pairs(self.home.data),
                data=self.home.data,
                cache=self.home.cache,
                progress=lambda what, done, total: None,
            )
        if study.privacy.mode is not Mode.PLAIN and len(data.patients) > study.training.patients:
            raise DataInsufficient(
                f"training.patients: expected the nominal number ({study.training.patients}) to cover this "
                "site's own patients, got more; δ would not hold"
            )
        running.data, running.data_sha256 = data, sha256
        return data

    def _open_budget(self) -> Budget:
        if self._budget is not None and not self._budget.usable:
            self.close()
        if self._budget is None:
            limits = BudgetLimits(epsilon=self.home.epsilon, delta=self.home.delta)
            self._budget = Budget.open(self.home.budget_path, limits)
        return self._budget

    def close(self) -> None:
        """Release the budget's lock."""
        if self._budget is not None:
            self._budget.close()
            self._budget = None

    def _charge(self, running: _Running, message: Message, seed: bytes) -> bytes:
        """Charge the round before any data is touched; returns the seed to use. Nothing in mode plain."""
        study = running.study
        if study.privacy.mode is Mode.PLAIN:
            return seed
        self._training_data(running)
        if message.header.round == study.rounds:
            return charge_evaluation(
                self._open_budget(), study.sha256, evaluation_plan_of(study), number=message.header.round,
                attempt=message.header.attempt, request_sha256=message.sha256,
                data_sha256=running.data_sha256, seed=seed,
            ).seed  # fmt: skip
        plan = plan_of(study)
        charge = self._open_budget().charge(
            study.sha256,
            round=message.header.round,
            attempt=message.header.attempt,
            request_sha256=message.sha256,
            data_sha256=running.data_sha256,
            seed=seed,
            sampling_rate=plan.sampling_rate,
            noise_multiplier=plan.site_noise,
            local_steps=plan.local_steps,
        )
        return charge.seed

    def _float_contribution(self, running: _Running, round: int, vector: Vector, csprng: Csprng) -> Vector:
        study, data = running.study, self._training_data(running)
        with self._models.use(study, self.home.base_directory(study.base.name)) as adapted:
            adapted.write_vector(vector)
            if study.privacy.mode is Mode.LOCAL:
                return local_update(adapted, study, data, csprng, vector, round=round, progress=_untold)
            return plain_sum(adapted, study, data, csprng, round=round, progress=_untold)

    def _noised_sum(
        self, running: _Running, round: int, vector: Vector, csprng: Csprng
    ) -> npt.NDArray[np.uint32]:
        study, data = running.study, self._training_data(running)
        with self._models.use(study, self.home.base_directory(study.base.name)) as adapted:
            adapted.write_vector(vector)
            return noised_sum(adapted, study, data, csprng, round=round, progress=_untold)

    def _evaluation(
        self, running: _Running, round: int, vector: Vector, csprng: Csprng
    ) -> npt.NDArray[np.uint32]:
        from client.evaluate.contribution import evaluation_units

        study, section = running.study, running.study.federated_evaluation
        if section is None:
            raise WrongStage("federated_evaluation: expected no such round in this study, got one")
        with self._models.use(study, self.home.base_directory(study.base.name)) as adapted:
            adapted.write_vector(vector)
            return evaluation_units(
                adapted, study, read_pairs(self.home.data), evaluation_plan_of(study), csprng,
                split=section.split, data=self.home.data,
            )  # fmt: skip

    def _tell(self, study: Study, round: int, stage: Stage, percent: int) -> None:
        self._report(Progress(study.study.id, round, stage.value, percent))


def _untold(done: int, total: int) -> None:
    """Nobody is told how many patients are done."""


def _shown(packed: memoryview, *, parts: int) -> tuple[list[SignedRecord], list[bytes]]:
    """Unpack the records and the parts of the ledger that a request shows; nothing is verified yet."""
    body = inflate(packed, max_bytes=_MAX_SHOWN_BYTES)
    meta, ledger = unpack_body(body, fields={"records": list}, parts=parts)
    if len(meta["records"]) > MAX_RECORDS:
        raise EnvelopeMalformed(f"records: expected at most {MAX_RECORDS}, got {len(meta['records'])}")
    return [signed_from_json(value) for value in meta["records"]], [bytes(part) for part in ledger]


def _max_request_bytes(study: Study) -> int:
    return 4 * vector_size(study.adapter.tensors) + (8 << 20)
