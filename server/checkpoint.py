"""The server's durable state of a study: everything after each round, and what it was about to ask.

    study.json  operator.sig           the signed manifest
    keys/message.key                   the operator's key (0600)
    rounds/000012/                     state after round 12: adapter, optimizer, state.json
    records.jsonl                      every signed round record, in order
    pending.json                       the requests of the attempt in progress
    culprits.json                      sites whose dealings spoilt an attempt, with the reason
    log.jsonl                          what happened, for people and tests

Guarantees: a round directory appears whole (staged, fsynced, renamed); a torn last line of a log is cut off
on open; a request's random parts are durable before it is sent, so that a restarted server asks the very
same question. One process at a time holds the directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from common.canonical import canonical_json
from common.config import Study, parse_study, verify_resolved
from common.errors import CheckpointInvalid, RunDirectoryBusy
from common.files import append_durable, cut_torn_line, sync_directory, write_atomic
from common.identity import Purpose, verify_signature
from common.model.lora import Vector, read_adapter, vector_sha256, write_adapter
from common.records import SignedRecord, signed_from_json, signed_to_json
from server.optimizer import OptimizerState, initial_state

_KEEP = 2


@dataclass(frozen=True)
class StudyState:
    """After `round` (-1 before the first): adapter, optimizer, and the newest record's hash.

    `accepted_round` is the round whose adapter passed the acceptance test last (-1: the first adapter), and
    `accepted_loss` its loss on the public set, None while no test was made.
    """

    round: int
    adapter: Vector
    optimizer: OptimizerState
    record_sha256: str
    accepted_round: int = -1
    accepted_loss: float | None = None


@dataclass(frozen=True)
class Pending:
    """The attempt in progress: all that its requests hold beyond the state, so they can be made again.

    `histories` maps a site to the last round whose record it has verified, `sizes` to the size of the log it
    has seen and `versions` to the protocol version agreed with it, as known when the attempt began;
    `witnessed` holds the cosignatures shown, once a quorum's; `grace_s` is how long after the deadline the
    requests still count.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]
    deadline_unix_s: float
    nonce: str
    histories: dict[str, int]
    sizes: dict[str, int] = field(default_factory=dict)
    witnessed: str = ""
    versions: dict[str, int] = field(default_factory=dict)
    grace_s: float = 0.0


class StudyDirectory:
    """An opened study directory, locked for this process until `close`."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self._clock = clock
        if not directory.is_dir():
            raise CheckpointInvalid(f"{directory}: expected a study directory, got none")
        self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunDirectoryBusy(f"{directory}: expected no other server on this study, got one") from error
        try:
            cut_torn_line(directory / "log.jsonl")
            self.study = read_signed_study(directory)
            self._records = self._read_records()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        self._lock.close()

    @property
    def key_path(self) -> Path:
        return self.directory / "keys" / "message.key"

    @property
    def records(self) -> list[SignedRecord]:
        return self._records

    def load_state(self, initial: Vector) -> StudyState:
        """Read the newest whole round; raises CheckpointInvalid where it does not match its record."""
        rounds = self._rounds()
        if not rounds:
            return StudyState(-1, initial, initial_state(self.study), self.study.sha256)
        try:
            return self._read_state(rounds[-1])
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise CheckpointInvalid(
                f"{rounds[-1]}: expected a whole round, got {type(error).__name__}"
            ) from error

    def _read_state(self, path: Path) -> StudyState:
        state = json.loads((path / "state.json").read_text())
        adapter = read_adapter(path, self.study.adapter.tensors)
        if vector_sha256(adapter) != state["adapter_sha256"]:
            raise CheckpointInvalid(f"{path}: expected adapter {state['adapter_sha256'][:16]}…, got another")
        optimizer = _read_optimizer(path, state)
        if len(self._records) == state["round"]:
            self._append_record(signed_from_json(state["record"]))
        if len(self._records) != state["round"] + 1:
            raise CheckpointInvalid(
                f"{path}: expected {state['round'] + 1} records, got {len(self._records)}"
            )
        if self._records[-1].record.sha256 != state["record_sha256"]:
            raise CheckpointInvalid(f"{path}: expected record {state['record_sha256'][:16]}…, got another")
        return StudyState(
            state["round"], adapter, optimizer, state["record_sha256"], state["accepted_round"],
            state["accepted_loss"],
        )  # fmt: skip

    def accepted(self, state: StudyState, initial: Vector) -> tuple[Vector, OptimizerState]:
        """Read the adapter that passed the acceptance test last, with the optimizer's state at that time."""
        if state.accepted_round < 0:
            return initial, initial_state(self.study)
        path = self.directory / "rounds" / f"{state.accepted_round:06d}"
        value = json.loads((path / "state.json").read_text())
        return read_adapter(path, self.study.adapter.tensors), _read_optimizer(path, value)

    def save_round(self, state: StudyState, signed: SignedRecord, entries: Sequence[bytes] = ()) -> None:
        """Make a round durable: its state first, then its record; `load_state` mends a crash between.

        `entries` are the round's ledger entries: who opens the directory logs those that are not yet.
        """
        staging = self.directory / "rounds" / f".{state.round:06d}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_adapter(staging, state.adapter, self.study.adapter.tensors, self.study.adapter)
        with (staging / "optimizer.npz").open("wb") as handle:
            np.savez(handle, first=state.optimizer.first, second=state.optimizer.second)
            handle.flush()
            os.fsync(handle.fileno())
        value = {
            "round": state.round,
            "adapter_sha256": vector_sha256(state.adapter),
            "steps": state.optimizer.steps,
            "record_sha256": state.record_sha256,
            "record": signed_to_json(signed),
            "entries": [entry.decode() for entry in entries],
            "accepted_round": state.accepted_round,
            "accepted_loss": state.accepted_loss,
        }
        write_atomic(staging / "state.json", canonical_json(value))
        final = self.directory / "rounds" / f"{state.round:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        sync_directory(final.parent)
        self._append_record(signed)
        every = self.study.evaluation.every_rounds
        for old in self._rounds()[:-_KEEP]:
            if int(old.name) == state.accepted_round:
                continue
            if every and (int(old.name) + 1) % every == 0:
                (old / "optimizer.npz").unlink(missing_ok=True)
            else:
                shutil.rmtree(old)

    def round_entries(self) -> list[bytes]:
        """Return the ledger entries of the newest whole round."""
        rounds = self._rounds()
        if not rounds:
            return []
        return [entry.encode() for entry in json.loads((rounds[-1] / "state.json").read_text())["entries"]]

    def pending(self) -> Pending | None:
        """Read the attempt in progress, None when there is none."""
        path = self.directory / "pending.json"
        if not path.is_file():
            return None
        value = json.loads(path.read_text())
        return Pending(**{**value, "cohort": tuple(value["cohort"])})

    def save_pending(self, pending: Pending) -> None:
        write_atomic(self.directory / "pending.json", json.dumps(vars(pending)).encode())

    def clear_pending(self) -> None:
        (self.directory / "pending.json").unlink(missing_ok=True)

    def culprits(self) -> dict[str, str]:
        """Read which sites spoilt an attempt, with the reason."""
        path = self.directory / "culprits.json"
        found: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def save_culprits(self, culprits: dict[str, str]) -> None:
        write_atomic(self.directory / "culprits.json", canonical_json(culprits))

    def log(self, event: str, **fields: Any) -> None:
        """Append one event for people, tests and the report; never data of a site."""
        line = json.dumps({"event": event, "time_unix_s": int(self._clock()), **fields}, sort_keys=True)
        append_durable(self.directory / "log.jsonl", line.encode() + b"\n", mode=0o644)

    def _append_record(self, signed: SignedRecord) -> None:
        append_durable(
            self.directory / "records.jsonl", canonical_json(signed_to_json(signed)) + b"\n", mode=0o644
        )
        self._records.append(signed)

    def _read_records(self) -> list[SignedRecord]:
        path = self.directory / "records.jsonl"
        try:
            return [signed_from_json(json.loads(line)) for line in cut_torn_line(path).splitlines()]
        except ValueError as error:
            raise CheckpointInvalid(
                f"{path}: expected one signed record a line, got something else"
            ) from error

    def _rounds(self) -> list[Path]:
        root = self.directory / "rounds"
        return sorted(p for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def _read_optimizer(path: Path, state: dict[str, Any]) -> OptimizerState:
    with (path / "optimizer.npz").open("rb") as handle:
        arrays = np.load(handle, allow_pickle=False)
        return OptimizerState(arrays["first"], arrays["second"], state["steps"])


def write_signed_study(directory: Path, manifest: bytes, signature: bytes) -> None:
    """Place a signed study in a directory; raises RunDirectoryBusy when another study is in it."""
    path = directory / "study.json"
    if path.is_file() and path.read_bytes() != manifest:
        raise RunDirectoryBusy(
            f"{directory}: expected an empty directory or the same study, got another; choose another --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "operator.sig", signature.hex().encode())
    write_atomic(path, manifest)


def read_signed_study(directory: Path) -> Study:
    """Read and verify a study directory's manifest; raises CheckpointInvalid or SignatureInvalid."""
    try:
        manifest = (directory / "study.json").read_bytes()
        signature = bytes.fromhex((directory / "operator.sig").read_text().strip())
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{directory}: expected a signed study, got none") from error
    study = parse_study(manifest)
    verify_resolved(study)
    verify_signature(study.cohort.operator_key, Purpose.STUDY, manifest, signature)
    return study


def read_records(directory: Path) -> list[SignedRecord]:
    """Read the signed round records of a study directory that nobody writes to."""
    path = directory / "records.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [signed_from_json(json.loads(line)) for line in lines]
