"""One study in the operator's log: what the server loop appends, and what it shows the sites to witness.

Every method may be called again after a crash: an entry that is in the log already is not appended twice.
Guarantees: an entry is durable, and under a signed checkpoint, before anything that rests on it is sent.
It talks to nobody: `server/app.py` carries its bytes to the sites and back.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from common.canonical import sha256_hex
from common.config import Study, format_study
from common.errors import EntryInvalid, FedRadError, LedgerInvalid
from common.identity import Purpose, SigningKey, load_key, verify_signature
from common.ledger.checkpoint import format_ledger_proof, verify_quorum, witness_key
from common.ledger.entries import (
    NO_STUDY,
    OPERATOR,
    SOFTWARE_CHANGED,
    Approval,
    Body,
    DataUse,
    Decision,
    Enrolment,
    Entry,
    Evaluation,
    Incident,
    Outcome,
    Participation,
    Release,
    RoundRecord,
    StudyEnd,
    StudyOpened,
    format_entry,
    parse_entry,
    signed_bytes,
)
from common.ledger.note import Note, VerifierKey, format_lines, parse_signature_line
from common.ledger.release_proof import origin_of
from common.ledger.statements import sign_entry, verify_contribution, verify_signed_by
from common.ledger.witness import format_cosign_request
from server.bundles import LEDGER_NAME
from server.checkpoint import StudyDirectory
from server.log import Log

log = logging.getLogger("fedrad.server")


@dataclass(frozen=True)
class WitnessOffer:
    """What one site is shown with a request: a checkpoint to cosign, and the newest entry with its proof."""

    request: bytes
    entry: bytes
    proof: bytes


@dataclass(frozen=True)
class Stated:
    """What a site stated in the log: how often, its highest ε, and the commitments of all sites."""

    statements: int
    epsilon: float
    commitments: Set[str]


class StudyLog:
    """The entries of one study, found again when the log is opened."""

    def __init__(self, book: Log, study: Study, key: SigningKey, *, clock: Callable[[], float]) -> None:
        self._book = book
        self._study = study
        self._key = key
        self._clock = clock
        self._seen_sizes: dict[str, int] = {}
        self._newest = -1
        self._shown = -1
        self._releases: dict[int, int] = {}
        self._approved: set[str] = set()
        self._rounds: set[tuple[int, int]] = set()
        self._leaves: set[str] = set()
        self._stated: set[bytes] = set()
        self._software = ("", "")
        self._spent: dict[str, tuple[int, float]] = {}
        self._commitments: set[str] = set()
        self._release_epsilon = 0.0
        self.ended = False
        self.evaluated = False
        for index, entry in enumerate(book.entries()):
            self._note_entry(index, entry)
        if book.size:
            book.checkpoint()  # a crash may have come between an append and its checkpoint

    @property
    def witnesses(self) -> tuple[VerifierKey, ...]:
        sites = [site for site in self._study.cohort.site if site.witness_key]
        return tuple(witness_key(site.id, bytes.fromhex(site.witness_key)) for site in sites)

    def open(
        self,
        approvals: Mapping[str, bytes],
        *,
        statements: Iterable[bytes] = (),
        code: str,
        lockfile: str,
        software: str,
    ) -> None:
        """Log the study, the sites' approvals and their own entries, unless they are logged already.

        approvals: 64-byte signatures of the manifest that `verify_approval` let pass; statements: entries
        that `verify_own` let pass.
        """
        stated = [parse_entry(statement) for statement in statements]
        new = {signed_bytes(entry): entry for entry in stated if signed_bytes(entry) not in self._stated}
        enrolments = [self._dated(entry) for entry in new.values() if isinstance(entry.body, Enrolment)]
        self._append_entries(enrolments)
        bodies: list[Body] = []
        if self._newest < 0:
            opened = StudyOpened(manifest=self._study, code=code, lockfile=lockfile, software=software)
            bodies.append(opened)
        for site, signature in sorted(approvals.items()):
            if site not in self._approved:
                self.verify_approval(site, signature)
                approve = Decision.APPROVE
                bodies.append(Approval(site=site, decision=approve, policy="", signature=signature.hex()))
        self._append(bodies)
        self._append_entries([self._dated(e) for e in new.values() if isinstance(e.body, DataUse)])

    def announce_software(self, *, code: str, lockfile: str, number: int) -> None:
        """Log that other software runs from this round on, where it is not the last one logged."""
        if self._software not in (("", ""), (code, lockfile)):
            self._append([Incident(code=SOFTWARE_CHANGED, site="", number=number, detail="")])
        self._software = (code, lockfile)

    def verify_approval(self, site: str, signature: bytes) -> None:
        """Raise SignatureInvalid unless the site signed this study's manifest."""
        key = self._study.site(site).message_key
        verify_signature(key, Purpose.APPROVAL, format_study(self._study), signature)

    def verify_own(self, site: str, statement: bytes) -> None:
        """Raise unless this is the site's own signed entry about its keys or its data in this study.

        Raises EntryInvalid, SignatureInvalid or what parsing raises.
        """
        entry, pinned = parse_entry(statement), self._study.site(site)
        body = entry.body
        if not isinstance(body, Enrolment | DataUse) or body.site != site:
            raise EntryInvalid(
                f"{site}: expected its enrolment or its data, got an entry of kind {entry.kind}"
            )
        if isinstance(body, Enrolment) and (body.message_key, body.witness_key) != (
            pinned.message_key, pinned.witness_key or body.witness_key,
        ):  # fmt: skip
            raise EntryInvalid(f"{site}: expected the keys that the manifest pins, got others")
        if entry.study != (self._study.sha256 if isinstance(body, DataUse) else NO_STUDY):
            raise EntryInvalid(f"{site}: expected an entry of this study, got one of another")
        verify_signed_by(entry, signer=site, public_hex=pinned.message_key)

    def seal(self, bodies: Iterable[Body]) -> list[bytes]:
        """Sign entries without logging them yet, so that they can be made durable with what they say.

        Raises SignatureInvalid where a site did not sign its participation in a round.
        """
        return [format_entry(entry) for entry in self._verified(bodies)]

    def add_sealed(self, entries: Iterable[bytes]) -> None:
        """Log sealed entries that are not logged yet, under a new checkpoint."""
        self._append_entries([parse_entry(e) for e in entries if sha256_hex(e) not in self._leaves])

    def add_round(self, record: RoundRecord, *incidents: Incident) -> None:
        """Log one attempt and what went wrong in it, once.

        Raises SignatureInvalid where a site did not sign its participation.
        """
        if not self.has_attempt(record.number, record.attempt):
            self._append_entries(self._verified([record, *incidents]))

    def stated(self, site: str) -> Stated:
        """Return what the log holds of a site's statements about its contributions."""
        count, epsilon = self._spent.get(site, (0, 0.0))
        return Stated(count, epsilon, self._commitments)

    def has_attempt(self, number: int, attempt: int) -> bool:
        """Tell whether this attempt's outcome is in the log."""
        return (number, attempt) in self._rounds

    def verify_participation(self, record: RoundRecord, part: Participation) -> None:
        """Raise SignatureInvalid unless the site signed these values of this round."""
        verify_contribution(self._study.sha256, record, part, self._study.site(part.site).message_key)

    def add_release(self, release: Release) -> tuple[bytes, Note]:
        """Log a release, once; returns its entry and the latest checkpoint, to be cosigned before `proof`."""
        if release.version not in self._releases:
            self._append([release])
        return self._book.leaf(self._releases[release.version]), self._book.checkpoint()

    def version_of(self, adapter: str) -> int:
        """Return the version under which an adapter was released, or the next free one."""
        for version, index in self._releases.items():
            body = self._book.read(index).body
            if isinstance(body, Release) and body.adapter == adapter:
                return version
        return max(self._releases, default=0) + 1

    def release_leaf(self, version: int) -> bytes:
        """Return a logged release's entry; raises LedgerInvalid."""
        if version not in self._releases:
            raise LedgerInvalid(f"expected release {version} in the log, got none")
        return self._book.leaf(self._releases[version])

    def head(self) -> Note:
        """Return the latest checkpoint with the cosignatures gathered so far."""
        return self._book.checkpoint()

    def add(self, body: Incident | Evaluation | StudyEnd) -> None:
        """Log an incident, or the evaluation or the end of the study (once)."""
        if (isinstance(body, StudyEnd) and self.ended) or (isinstance(body, Evaluation) and self.evaluated):
            return
        self._append([body])

    def bodies(self) -> list[Body]:
        """Return what this study's entries say, in order."""
        return [entry.body for entry in self._book.entries() if entry.study == self._study.sha256]

    @property
    def release_epsilon(self) -> float:
        """What the last released round stated: the released sums' cost so far."""
        return self._release_epsilon

    # --- witnessing ---------------------------------------------------------------------------------------

    def saw(self, site: str, size: int) -> None:
        """Remember the tree size that a site says it has seen (its hello, or a WitnessBehind refusal)."""
        self._seen_sizes[site] = min(size, self._book.size)

    @property
    def sizes(self) -> dict[str, int]:
        """The tree size that each site has seen, as far as known."""
        return dict(self._seen_sizes)

    def offer(self, seen_size: int) -> WitnessOffer:
        """Return what a site is shown next: the latest checkpoint, and in it the last released round.

        Before the first released round it is the study's opening. The bytes depend on log and size only:
        cosignatures gathered meanwhile are left out, so that a request can be made again.
        """
        request = self._book.cosign_request(seen_size)
        proof = self._book.prove(self._shown)
        bare = Note(request.note.text, request.note.signatures[:1])
        return WitnessOffer(
            format_cosign_request(replace(request, note=bare)),
            self._book.leaf(self._shown),
            format_ledger_proof(replace(proof, note=bare)),
        )

    def cosigned(self, site: str, line: bytes) -> None:
        """Keep a site's cosignature of the latest checkpoint.

        Raises NoteInvalid, NoteSignatureInvalid or LedgerInvalid for one that is not this site's.
        """
        signature = parse_signature_line(line)
        if signature.name != site:
            raise LedgerInvalid(f"cosignature: expected one of {site}, got one of {signature.name!r}")
        self._book.add_cosignatures([signature], witnesses=self.witnesses)
        self._seen_sizes[site] = self._book.size

    def witnessed(self) -> bytes:
        """Return the cosignature lines of the latest checkpoint once they are a quorum's.

        Raises QuorumNotReached.
        """
        note = self._book.checkpoint()
        verify_quorum(note, self.witnesses, quorum=self._study.cohort.witness_quorum)
        return format_lines(note.signatures[1:])

    def proof(self, leaf: bytes) -> bytes:
        """Return the offline proof of an entry under the latest checkpoint; raises LedgerInvalid."""
        for index in range(self._book.size - 1, -1, -1):
            if self._book.leaf(index) == leaf:
                return format_ledger_proof(self._book.prove(index))
        raise LedgerInvalid("expected an entry of this log, got another")

    # --- inside -------------------------------------------------------------------------------------------

    def _append(self, bodies: Iterable[Body]) -> None:
        """Append entries signed by the operator, under a new checkpoint."""
        self._append_entries([self._signed(body) for body in bodies])

    def _append_entries(self, entries: list[Entry]) -> None:
        if entries:
            first = self._book.append(entries)
            self._book.checkpoint()
            for offset, entry in enumerate(entries):
                self._note_entry(first + offset, entry)

    def _verified(self, bodies: Iterable[Body]) -> list[Entry]:
        """Sign entries whose rounds hold nothing that a site did not sign; raises SignatureInvalid."""
        bodies = list(bodies)
        for body in bodies:
            if isinstance(body, RoundRecord):
                for part in body.participations:
                    self.verify_participation(body, part)
        return [self._signed(body) for body in bodies]

    def _signed(self, body: Body) -> Entry:
        return self._dated(Entry(0, self._study.sha256, body))

    def _dated(self, entry: Entry) -> Entry:
        """Give an entry the log's time and, beside the signatures it has, the operator's."""
        time_s = max(int(self._clock()), self._book.last_time_s)
        return sign_entry(replace(entry, time_s=time_s), signer=OPERATOR, key=self._key)

    def _note_entry(self, index: int, entry: Entry) -> None:
        body = entry.body
        if isinstance(body, Enrolment | DataUse):
            self._stated.add(signed_bytes(entry))
        if entry.study != self._study.sha256:
            return
        self._leaves.add(sha256_hex(self._book.leaf(index)))
        if isinstance(body, StudyOpened):
            self._shown, self._software = index, (body.code, body.lockfile)
        elif isinstance(body, Approval):
            self._approved.add(body.site)
        elif isinstance(body, RoundRecord):
            self._rounds.add((body.number, body.attempt))
            self._software = (body.code, body.lockfile)
            for part in body.participations:
                count, epsilon = self._spent.get(part.site, (0, 0.0))
                self._spent[part.site] = (count + 1, max(epsilon, part.epsilon))
                self._commitments.add(part.commitment)
            if body.outcome is Outcome.RELEASED:
                self._shown, self._release_epsilon = index, body.release_epsilon
        elif isinstance(body, Release):
            self._releases[body.version] = index
        elif isinstance(body, Evaluation):
            self.evaluated = True
        elif isinstance(body, StudyEnd):
            self.ended = True
        self._newest = index


def cosign_or_name(study_log: StudyLog, site: str, line: bytes) -> str:
    """Keep a cosignature; a line that does not hold is named in the log and costs the site's vote only."""
    try:
        study_log.cosigned(site, line)
    except FedRadError as error:
        log.warning("cosignature of %s refused: %s: %s", site, error.code, error)
        return error.code
    return ""


@contextlib.contextmanager
def open_study_log(
    directory: Path, *, clock: Callable[[], float] = time.time
) -> Iterator[tuple[StudyDirectory, StudyLog]]:
    """Hold a study directory and its log for this process.

    Raises CheckpointInvalid, RunDirectoryBusy, LogInUse, LogTruncated or LogRewritten.
    """
    with contextlib.closing(StudyDirectory(directory, clock=clock)) as opened:
        study, key = opened.study, load_key(opened.key_path)
        with Log(directory / LEDGER_NAME, origin=origin_of(study), private_key=key.private) as book:
            yield opened, StudyLog(book, study, key, clock=clock)
