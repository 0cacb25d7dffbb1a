"""A site's privacy budget: an append-only ledger that is charged, durably, before data is touched.

    budget.jsonl    one line per commitment, charge or end of a study, chained by SHA-256, fsynced
    budget.seeds    the seeds of the last two charges of each study, so that a crashed round is recomputed

A study is committed once, with its privacy plan, and its cap is that plan's cost. A site's total is reserved
at commitment: the full cost of all open studies with what ended studies spent, composed by privacy-loss
distributions, must fit the site's limits.

Guarantees: `charge` returns only after its line is on disk; no study passes its plan and no site its limits;
one (study, round, attempt) is charged once and served for one request on unchanged data only; rounds move
forward only. A torn last line, whose charge thus never returned, is removed; any other damage is refused.

It cannot notice that the whole file was put back to an older copy: `head` is to be kept elsewhere for that.
The seeds determine the noise of the last rounds and are as secret as the data; the ledger holds their hashes.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.canonical import canonical_json, parse_canonical, sha256_hex
from common.errors import (
    BodyTooLarge,
    BudgetBusy,
    BudgetCorrupt,
    BudgetExceeded,
    BudgetMismatch,
    NotCanonical,
    PlanInvalid,
    RoundAlreadyServed,
)
from common.files import sync_directory, write_atomic
from common.privacy.accounting import SampledGaussian, epsilon_pld
from common.privacy.mechanism import Mode, PrivacyPlan, View

_MAX_LINE_BYTES = 16_384
_GENESIS = "0" * 64
_SEEDS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class BudgetLimits:
    """What a site allows in total, over all studies, for one patient."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise PlanInvalid(f"expected a finite epsilon and a delta in (0, 1), got {self}")


@dataclass(frozen=True)
class Charge:
    """A durable charge: the seed to use, and whether the same request had been charged before."""

    seed: bytes
    repeated: bool


@dataclass(frozen=True, kw_only=True)
class StudyBudget:
    """One study's account; epsilon at the study's own delta."""

    study: str
    open: bool
    delta: float
    charges: int
    charges_committed: int
    epsilon_spent: float
    epsilon_committed: float

    @property
    def charges_left(self) -> int:
        return self.charges_committed - self.charges if self.open else 0

    @property
    def epsilon_left(self) -> float:
        """What the study may still add to its own epsilon."""
        return self.epsilon_committed - self.epsilon_spent if self.open else 0.0


@dataclass(frozen=True, kw_only=True)
class BudgetSummary:
    """All studies of a site; epsilon over all of them composed at the site's delta."""

    limits: BudgetLimits
    studies: tuple[StudyBudget, ...]
    epsilon_spent: float
    epsilon_committed: float
    head: str

    @property
    def epsilon_left(self) -> float:
        """What is not committed."""
        return self.limits.epsilon - self.epsilon_committed


@dataclass
class _Account:
    plan: PrivacyPlan
    open: bool = True
    served: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def cap(self) -> int:
        return self.plan.rounds + self.plan.spare_rounds

    def cost(self, charges: int) -> SampledGaussian:
        plan = self.plan
        return SampledGaussian(plan.sampling_rate, plan.site_noise, charges * plan.local_steps)

    @property
    def spent(self) -> SampledGaussian:
        return self.cost(len(self.served))

    @property
    def reserved(self) -> SampledGaussian:
        return self.cost(self.cap if self.open else len(self.served))


class Budget:
    """The open ledger of one site; one process at a time."""

    def __init__(self, path: Path, limits: BudgetLimits, descriptor: int, data: bytes) -> None:
        self._path, self._limits, self._descriptor = path, limits, descriptor
        self._accounts: dict[str, _Account] = {}
        self._head, self._count = _GENESIS, 0
        self._broken = False
        self._total_fits: bool | None = None
        self._size = self._replay(data)

    @classmethod
    def open(cls, path: Path, limits: BudgetLimits) -> Budget:
        """Open or create the ledger at `path` (mode 0600), repair a torn tail, lock it.

        Raises BudgetBusy when another process has it open, BudgetCorrupt when a line was altered.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BudgetBusy(f"{path.name} is open in another process") from error
            os.fchmod(descriptor, 0o600)
            data = path.read_bytes()
            budget = cls(path, limits, descriptor, data)
            if budget._size < len(data):
                os.ftruncate(descriptor, budget._size)
            os.fsync(descriptor)
            sync_directory(path.parent)
            return budget
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._broken = -1, True

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def usable(self) -> bool:
        """Whether it can be charged; one whose write failed must be opened again."""
        return not self._broken

    @property
    def head(self) -> str:
        """SHA-256 of the last line: names the whole ledger."""
        return self._head

    def commit(self, study: str, plan: PrivacyPlan) -> None:
        """Reserve a study's whole cost; nothing happens when the same plan is committed already.

        Raises BudgetExceeded when the site's limits would be passed, BudgetMismatch for another plan.
        """
        known = self._accounts.get(study)
        if known is not None:
            if known.plan != plan or not known.open:
                raise BudgetMismatch(f"study {study[:16]} is committed with another plan, or has ended")
            return
        if plan.mode is Mode.PLAIN:
            raise BudgetMismatch("mode plain has no privacy to budget")
        costs = [account.reserved for account in self._accounts.values()]
        total = epsilon_pld([*costs, _Account(plan).reserved], delta=self._limits.delta)
        if total > self._limits.epsilon:
            raise BudgetExceeded(
                f"with study {study[:16]} the site would commit epsilon {total:.3f}, "
                f"its limit is {self._limits.epsilon:.3f} at delta {self._limits.delta:.1e}"
            )
        self._append({"kind": "commit", "study": study, "plan": plan.to_json()})

    def charge(
        self,
        study: str,
        *,
        round: int,
        attempt: int,
        request_sha256: str,
        data_sha256: str,
        seed: bytes,
        sampling_rate: float,
        noise_multiplier: float,
        local_steps: int = 1,
    ) -> Charge:
        """Charge one round durably; only then may data be touched, with the seed returned.

        The same request on the same data gets the seed of its first charge and is not charged again. Raises
        RoundAlreadyServed for anything else that was charged or passed, BudgetExceeded when the study's plan
        or the site's limits are spent, BudgetMismatch for a mechanism that is not the committed plan's.
        """
        self._verify_usable()
        account = self._account(study)
        plan = account.plan
        if (sampling_rate, noise_multiplier, local_steps) != (
            plan.sampling_rate,
            plan.site_noise,
            plan.local_steps,
        ):
            raise BudgetMismatch(
                f"round {round} does not run the mechanism that study {study[:16]} committed"
            )
        key = (round, attempt)
        entry = {
            "kind": "charge",
            "study": study,
            "round": round,
            "attempt": attempt,
            "request_sha256": request_sha256,
            "data_sha256": data_sha256,
            "seed_sha256": sha256_hex(seed),
        }
        if key in account.served:
            return Charge(self._stored_seed(account.served[key], entry), repeated=True)
        if account.served and key < max(account.served):
            raise RoundAlreadyServed(f"round {round} attempt {attempt} comes after a later one was served")
        if not account.open or len(account.served) >= account.cap:
            raise BudgetExceeded(
                f"study {study[:16]} has used all of its {account.cap} charges, or has ended"
            )
        self._verify_total(study, account)
        self._keep_seed(study, key, seed)
        self._append(entry)
        return Charge(seed, repeated=False)

    def end(self, study: str) -> None:
        """Give back what an open study has not spent; it can never be charged again."""
        if self._account(study).open:
            self._append({"kind": "end", "study": study})

    def spent(self, study: str) -> float:
        """Epsilon that a study has spent, at its own delta."""
        account = self._account(study)
        return epsilon_pld([account.spent], delta=account.plan.delta)

    def summary(self) -> BudgetSummary:
        """Spent, committed and left, by study and in total."""
        rows = []
        for study, account in self._accounts.items():
            delta = account.plan.delta
            spent = epsilon_pld([account.spent], delta=delta)
            rows.append(
                StudyBudget(
                    study=study,
                    open=account.open,
                    delta=delta,
                    charges=len(account.served),
                    charges_committed=account.cap,
                    epsilon_spent=spent,
                    epsilon_committed=account.plan.epsilon(View.SITE) if account.open else spent,
                )
            )
        accounts = self._accounts.values()
        return BudgetSummary(
            limits=self._limits,
            studies=tuple(rows),
            epsilon_spent=epsilon_pld([a.spent for a in accounts], delta=self._limits.delta),
            epsilon_committed=epsilon_pld([a.reserved for a in accounts], delta=self._limits.delta),
            head=self._head,
        )

    # --- rules --------------------------------------------------------------------------------------------

    def _account(self, study: str) -> _Account:
        if study not in self._accounts:
            raise BudgetMismatch(f"study {study[:16]} has no committed privacy plan")
        return self._accounts[study]

    def _verify_total(self, study: str, account: _Account) -> None:
        """Raise BudgetExceeded when this charge would pass the limits, lowered since commitment perhaps."""
        if self._total_fits is None:
            costs = [a.reserved for a in self._accounts.values()]
            self._total_fits = epsilon_pld(costs, delta=self._limits.delta) <= self._limits.epsilon
        if self._total_fits:
            return
        costs = [a.cost(len(a.served) + (name == study)) for name, a in self._accounts.items()]
        total = epsilon_pld(costs, delta=self._limits.delta)
        if total > self._limits.epsilon:
            raise BudgetExceeded(
                f"this round would bring the site to epsilon {total:.3f}, its limit is "
                f"{self._limits.epsilon:.3f} at delta {self._limits.delta:.1e}"
            )

    # --- seeds --------------------------------------------------------------------------------------------

    @property
    def _seeds_path(self) -> Path:
        return self._path.with_suffix(".seeds")

    def _seeds(self) -> dict[str, list[dict[str, Any]]]:
        if not self._seeds_path.exists():
            return {}
        value: dict[str, list[dict[str, Any]]] = parse_canonical(
            self._seeds_path.read_bytes(), max_bytes=1 << 20
        )
        return value

    def _keep_seed(self, study: str, key: tuple[int, int], seed: bytes) -> None:
        seeds = self._seeds()
        kept = [s for s in seeds.get(study, []) if (s["round"], s["attempt"]) in self._account(study).served]
        kept.append({"round": key[0], "attempt": key[1], "seed": seed.hex()})
        seeds[study] = kept[-_SEEDS_KEPT:]
        write_atomic(self._seeds_path, canonical_json(seeds), mode=0o600)

    def _stored_seed(self, charged: dict[str, Any], wanted: dict[str, Any]) -> bytes:
        where = f"round {charged['round']} attempt {charged['attempt']}"
        for name in ("request_sha256", "data_sha256"):
            if charged[name] != wanted[name]:
                raise RoundAlreadyServed(f"{where} was charged for another {name.split('_')[0]}")
        for stored in self._seeds().get(charged["study"], []):
            seed = bytes.fromhex(stored["seed"])
            if sha256_hex(seed) == charged["seed_sha256"]:
                return seed
        raise RoundAlreadyServed(f"{where} was charged and its seed is erased")

    # --- file ---------------------------------------------------------------------------------------------

    def _verify_usable(self) -> None:
        if self._broken:
            raise BudgetCorrupt("the ledger is closed, or a write to it failed: open it again")

    def _append(self, entry: dict[str, Any]) -> None:
        self._verify_usable()
        line = _format_line(self._head, self._count, entry)
        self._broken = True  # until the line is known to be on disk
        written = os.pwrite(self._descriptor, line, self._size)
        if written != len(line):
            raise BudgetCorrupt(f"wrote {written} of {len(line)} bytes to the ledger")
        os.fsync(self._descriptor)
        self._size += len(line)
        self._apply(entry)
        self._head, self._count = _line_hash(line), self._count + 1
        self._broken = False
        if entry["kind"] != "charge":
            self._total_fits = None

    def _replay(self, data: bytes) -> int:
        """Apply all whole lines; return their length in bytes."""
        end = data.rfind(b"\n") + 1
        for line in data[:end].splitlines(keepends=True):
            entry = _parse_line(line, head=self._head, count=self._count, where=self._path.name)
            try:
                self._apply(entry)
            except (KeyError, TypeError, PlanInvalid) as error:
                raise BudgetCorrupt(
                    f"{self._path.name} line {self._count + 1} is not a ledger entry"
                ) from error
            self._head, self._count = _line_hash(line), self._count + 1
        return end

    def _apply(self, entry: dict[str, Any]) -> None:
        kind, study = entry["kind"], entry["study"]
        if kind == "commit":
            self._accounts[study] = _Account(PrivacyPlan.from_json(entry["plan"]))
        elif kind == "charge":
            self._accounts[study].served[(entry["round"], entry["attempt"])] = entry
        elif kind == "end":
            self._accounts[study].open = False
        else:
            raise KeyError(kind)


def read_summary(path: Path, limits: BudgetLimits) -> BudgetSummary:
    """The summary of a ledger that an agent may have open: nothing is locked, repaired or written."""
    return Budget(path, limits, -1, path.read_bytes() if path.exists() else b"").summary()


def _format_line(head: str, count: int, entry: dict[str, Any]) -> bytes:
    body = canonical_json({"entry": entry, "previous": head, "sequence": count})
    return body + b" " + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _line_hash(line: bytes) -> str:
    return line[-65:-1].decode()


def _parse_line(line: bytes, *, head: str, count: int, where: str) -> dict[str, Any]:
    body, _, digest = line[:-1].rpartition(b" ")
    try:
        value = parse_canonical(body, max_bytes=_MAX_LINE_BYTES)
    except (NotCanonical, BodyTooLarge) as error:
        raise BudgetCorrupt(f"{where} line {count + 1} is not canonical JSON") from error
    if digest.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
        raise BudgetCorrupt(f"{where} line {count + 1} does not match its checksum")
    if not isinstance(value, dict) or (value.get("previous"), value.get("sequence")) != (head, count):
        raise BudgetCorrupt(f"{where} line {count + 1} does not follow the line before it")
    entry = value.get("entry")
    if not isinstance(entry, dict):
        raise BudgetCorrupt(f"{where} line {count + 1} holds no entry")
    return entry
