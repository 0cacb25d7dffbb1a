"""A study through log, witnesses, release and audit: the calls that server and sites make, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.witness import SiteWitness
from common.canonical import sha256_hex
from common.config import format_study
from common.errors import (
    LedgerInvalid,
    LogForked,
    NoteSignatureInvalid,
    QuorumNotReached,
    SignatureInvalid,
    WitnessBehind,
)
from common.identity import Purpose
from common.ledger.audit import verify_bundle
from common.ledger.entries import (
    OPERATOR,
    EndReason,
    Incident,
    Outcome,
    Release,
    RoundRecord,
    StudyEnd,
)
from common.ledger.export import export_bundle
from common.ledger.findings import Status
from common.ledger.output_checks import ENTRY_NAME, PROOF_NAME
from common.ledger.release_proof import list_files, origin_of, trust_of, verify_release_folder
from server.log import Log
from server.study_log import StudyLog, WitnessOffer, cosign_or_name
from tests.common.ledger.consortium import (
    CODE,
    LOCKFILE,
    START_S,
    adapter_name,
    epsilons,
    key_of,
    release_files,
    round_record,
    study,
)

ROUNDS = 3
STUDY = study(rounds=ROUNDS)
SITES = STUDY.site_ids
APPROVALS = {s: key_of(s).sign(Purpose.APPROVAL, format_study(STUDY)) for s in SITES}


class Clock:
    now = float(START_S)

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Run:
    """An operator's log and three witnessing sites; `reopen` is a crash of the operator's process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.sites = {
            s: SiteWitness(directory / s, study=STUDY, site=s, key=key_of(f"{s} witness"), clock=self.clock)
            for s in SITES
        }
        self.values = epsilons(STUDY, ROUNDS)
        self.log = self._open()

    def _open(self) -> StudyLog:
        self.book = Log(
            self.directory / "ledger", origin=origin_of(STUDY), private_key=key_of(OPERATOR).private
        )
        opened = StudyLog(self.book, STUDY, key_of(OPERATOR), clock=self.clock)
        for name, site in self.sites.items():
            opened.saw(name, site.seen_size)
        return opened

    def reopen(self) -> None:
        self.book.close()
        self.log = self._open()

    def start(self) -> None:
        self.log.open(APPROVALS, code=CODE, lockfile=LOCKFILE, software="fedrad 0.1.0")

    def record(self, number: int, **terms: object) -> RoundRecord:
        site, release = self.values[number]
        plain = round_record(STUDY, number, epsilon=site, release_epsilon=release)
        return replace(plain, record=record_sha256(number), **terms)  # type: ignore[arg-type]

    def offer(self, name: str) -> WitnessOffer:
        return self.log.offer(self.log.sizes.get(name, 0))

    def witness(self, record: str, *, names: tuple[str, ...] = SITES) -> bytes:
        """The first exchange gathers cosignatures, the second shows them."""
        for name in names:
            offer = self.offer(name)
            line = self.sites[name].cosign(offer.request, offer.entry, offer.proof, record_sha256=record)
            self.log.cosigned(name, line)
        note = self.log.witnessed()
        for name in names:
            self.sites[name].verify_quorum(note)
        return note


def record_sha256(number: int) -> str:
    return sha256_hex(f"record {number}".encode()) if number >= 0 else ""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.book.close()


def test_a_study_from_opening_to_audit(run: Run) -> None:
    run.start()
    for number in range(ROUNDS):
        run.witness(record_sha256(number - 1))
        run.log.add_round(run.record(number))
    run.log.add(Incident(code="site-dropped", site="cedar", number=2, detail=""))
    folder = run.directory / "release"
    folder.mkdir()
    for name, data in release_files(ROUNDS - 1, STUDY).items():
        (folder / name).write_bytes(data)
    site, epsilon = run.values[-1]
    leaf, _ = run.log.add_release(
        Release(
            version=1, adapter=adapter_name(ROUNDS), number=ROUNDS - 1, base="tiny", site_epsilon=site,
            release_epsilon=epsilon, delta=STUDY.privacy.delta, files=list_files(folder),
        )
    )  # fmt: skip
    run.witness(record_sha256(ROUNDS - 1))
    (folder / ENTRY_NAME).write_bytes(leaf)
    (folder / PROOF_NAME).write_bytes(run.log.proof(leaf))
    assert verify_release_folder(folder, [trust_of(STUDY)])[0].version == 1
    run.log.add(
        StudyEnd(reason=EndReason.COMPLETED, number=2, adapter=adapter_name(ROUNDS), release_epsilon=epsilon)
    )
    run.witness(record_sha256(ROUNDS - 1))
    bundle = export_bundle(
        run.directory / "ledger", log=trust_of(STUDY).log, exported_s=int(run.clock()),
        software="fedrad 0.1.0", releases={1: folder},
    )  # fmt: skip
    report = verify_bundle(bundle, trusted=trust_of(STUDY).log)
    assert [f for f in report.findings if f.status is Status.FAIL] == []
    open_questions = {f.control for f in report.findings if f.status is Status.NOT_CHECKABLE}
    assert open_questions == {"enrolment", "site-records", "aggregate"}


def test_after_a_crash_at_any_step_nothing_is_logged_twice(run: Run) -> None:
    for _ in range(2):
        run.start()
        run.reopen()
    for number in range(2):
        for _ in range(2):
            run.witness(record_sha256(number - 1))
            run.reopen()
        for _ in range(2):
            run.log.add_round(run.record(number))
            run.reopen()
    end = StudyEnd(reason=EndReason.STOPPED, number=1, adapter=adapter_name(2), release_epsilon=0.0)
    run.log.add(end)
    run.reopen()
    run.log.add(end)
    kinds = [entry.kind for entry in run.book.entries()]
    assert kinds == ["study", "approval", "approval", "approval", "round", "round", "end"]


def test_an_approval_that_the_site_did_not_make_is_not_logged(run: Run) -> None:
    with pytest.raises(SignatureInvalid):
        run.log.open({"amber": APPROVALS["birch"]}, code=CODE, lockfile=LOCKFILE, software="fedrad 0.1.0")
    assert run.book.size == 0


def test_a_statement_that_the_site_did_not_sign_is_not_logged(run: Run) -> None:
    run.start()
    record = run.record(0)
    forged = replace(record.participations[0], epsilon=0.001)
    with pytest.raises(SignatureInvalid):
        run.log.add_round(replace(record, participations=(forged, *record.participations[1:])))
    assert run.book.size == 4


def test_no_site_contributes_on_a_record_that_is_not_in_the_log(run: Run) -> None:
    run.start()
    run.witness("")
    run.log.add_round(run.record(0))
    offer = run.offer("amber")
    with pytest.raises(LedgerInvalid, match="expected the entry of record"):
        run.sites["amber"].cosign(offer.request, offer.entry, offer.proof, record_sha256=record_sha256(7))
    with pytest.raises(LedgerInvalid, match="study's opening"):
        run.sites["amber"].cosign(offer.request, offer.entry, offer.proof, record_sha256="")


def test_no_site_unmasks_without_the_quorum_or_on_another_head(run: Run) -> None:
    run.start()
    with pytest.raises(QuorumNotReached):
        run.witness("", names=("amber",))
    note = run.witness("", names=("amber", "birch"))
    with pytest.raises(WitnessBehind):  # it has seen no head at all
        run.sites["cedar"].verify_quorum(note)
    run.log.add_round(run.record(0))
    with pytest.raises(QuorumNotReached):
        run.log.witnessed()


def test_a_failed_attempt_leaves_the_last_released_round_to_be_shown(run: Run) -> None:
    run.start()
    run.witness("")
    run.log.add_round(run.record(0))
    failed = round_record(STUDY, 1, epsilon=9.0, release_epsilon=0.0, outcome=Outcome.FAILED)
    run.log.add_round(failed)
    run.witness(record_sha256(0))


def test_an_operator_that_forks_its_log_is_caught_by_the_site_it_forks(run: Run, tmp_path: Path) -> None:
    run.start()
    run.witness("")
    other = Run(tmp_path / "fork")
    other.clock.now += 100
    other.start()
    other.log.saw("amber", other.book.size)
    offer = other.offer("amber")
    other.book.close()
    with pytest.raises(LogForked):
        run.sites["amber"].cosign(offer.request, offer.entry, offer.proof, record_sha256="")
    assert list((run.directory / "amber").glob("*.fork"))


def test_a_cosignature_of_another_site_or_a_false_one_is_named_and_not_kept(run: Run) -> None:
    run.start()
    offer = run.offer("amber")
    line = run.sites["amber"].cosign(offer.request, offer.entry, offer.proof, record_sha256="")
    with pytest.raises(LedgerInvalid, match="expected one of birch"):
        run.log.cosigned("birch", line)
    assert cosign_or_name(run.log, "birch", line) == "LedgerInvalid"
    assert cosign_or_name(run.log, "amber", b"garbage") == "NoteInvalid"
    run.log.add_round(run.record(0))
    with pytest.raises(NoteSignatureInvalid):
        run.log.cosigned("amber", line)
    assert run.book.latest and len(run.book.latest.signatures) == 1


def test_a_site_that_lags_behind_is_asked_from_where_it_stands(run: Run) -> None:
    run.start()
    run.witness("")
    run.log.add_round(run.record(0))
    run.witness(record_sha256(0), names=("amber", "birch"))
    run.log.saw("cedar", 999)
    offer = run.offer("cedar")
    with pytest.raises(WitnessBehind, match="from size 4"):
        run.sites["cedar"].cosign(offer.request, offer.entry, offer.proof, record_sha256=record_sha256(0))
    run.log.saw("cedar", run.sites["cedar"].seen_size)
    run.witness(record_sha256(0), names=("cedar",))
