"""The site's side of witnessing one study's log: what it checks before it contributes and before it unmasks.

Guarantees: a contribution is made only on an adapter whose round record is in a log that extends all this
site has seen of it, and unmasked only when the manifest's quorum has cosigned the same head. Where the
manifest asks for no witnesses, the log must still be one history for this site.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.canonical import sha256_hex
from common.config import Study
from common.errors import LedgerInvalid
from common.identity import SigningKey
from common.ledger.checkpoint import parse_checkpoint, parse_ledger_proof
from common.ledger.entries import Entry, RoundRecord, StudyOpened
from common.ledger.note import format_signature_line, parse_lines
from common.ledger.release_proof import LedgerTrust, trust_of
from common.ledger.witness import WitnessState, parse_cosign_request, verify_logged


class SiteWitness:
    """The witness of one study at one site; its state is one file in `directory`."""

    def __init__(
        self, directory: Path, *, study: Study, site: str, key: SigningKey, clock: Callable[[], float]
    ) -> None:
        self._study = study
        self._site = site
        self._key = key
        self._clock = clock
        self._trust: LedgerTrust = trust_of(study)
        name = sha256_hex(self._trust.log.name.encode())[:32]
        self._state = WitnessState(directory / f"{name}.note", log=self._trust.log)

    @property
    def seen_size(self) -> int:
        """The size of the tree this site has seen: what it says in its hello."""
        return self._state.seen.size if self._state.seen else 0

    def cosign(self, request: bytes, entry: bytes, proof: bytes, *, record_sha256: str) -> bytes:
        """Check a checkpoint and the newest entry in it, then return this site's cosignature line.

        record_sha256: the newest round record this site has verified, which the entry must name; empty before
        the first round, when the entry must open this study. Raises WitnessBehind, LogForked, LogShrunk,
        InclusionInvalid, NoteSignatureInvalid or LedgerInvalid.
        """
        asked = parse_cosign_request(request)
        signature = self._state.cosign(
            asked, name=self._site, private_key=self._key.private, time_s=int(self._clock())
        )
        parsed = parse_ledger_proof(proof)
        head = parse_checkpoint(asked.note.text)
        logged = verify_logged(entry, index=parsed.index, proof=parsed.hashes, head=head)
        self._verify_newest(logged, record_sha256)
        return format_signature_line(signature)

    def _verify_newest(self, logged: Entry, record_sha256: str) -> None:
        body = logged.body
        if logged.study != self._study.sha256:
            raise LedgerInvalid(f"ledger: expected an entry of study {self._study.sha256[:16]}…, got another")
        if not record_sha256 and not isinstance(body, StudyOpened):
            raise LedgerInvalid(f"ledger: expected the study's opening, got an entry of kind {logged.kind}")
        if record_sha256 and (not isinstance(body, RoundRecord) or body.record != record_sha256):
            raise LedgerInvalid(f"ledger: expected the entry of record {record_sha256[:16]}…, got another")

    def verify_quorum(self, lines: bytes) -> None:
        """Raise unless these cosignature lines are the manifest's quorum over the head last cosigned here.

        Raises WitnessBehind, QuorumNotReached, NoteInvalid or NoteSignatureInvalid.
        """
        self._state.verify_witnessed(
            parse_lines(lines), witnesses=self._trust.witnesses, quorum=self._trust.quorum
        )
