"""The site's rounds of secure aggregation, kept durable between calls: one machine per round and attempt.

Guarantees: a machine is stored before what it returned is sent, so that no step is ever taken twice with
different results; machines of rounds behind are erased with their secrets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.secagg import SiteRound
from common.config import Study
from common.errors import SecondUpload
from common.files import write_atomic
from common.identity import SigningKey
from common.secagg.messages import Upload
from common.secagg.study_terms import round_terms


class MaskedRounds:
    """All machines of one study at one site, by round and attempt, below `directory` (0700)."""

    def __init__(
        self,
        directory: Path,
        *,
        study: Study,
        site: str,
        key: SigningKey,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory, self._study, self._site = directory, study, site
        self._key, self._random = key, random_bytes
        self._identities = {entry.id: entry.message_key for entry in study.cohort.site}
        self._machines: dict[tuple[int, int], SiteRound] = {}

    def machine(self, round: int, attempt: int) -> SiteRound:
        """Return the machine of a round's attempt: in memory, from disk, or new with a fresh seed."""
        if (round, attempt) not in self._machines:
            path = self._path(round, attempt)
            if path.is_file():
                machine = self._restore(json.loads(path.read_text()), round=round, attempt=attempt)
            else:
                machine = SiteRound(
                    self._random(32),
                    terms=round_terms(self._study, round=round, attempt=attempt),
                    site=self._site,
                    identities=self._identities,
                    sign=self._key.private.sign,
                )
                self._machines[(round, attempt)] = machine
                self.store(round, attempt)
            self._machines[(round, attempt)] = machine
        return self._machines[(round, attempt)]

    def store(self, round: int, attempt: int) -> None:
        """Make the machine's state durable; call before sending what its last step returned."""
        snapshot = self._machines[(round, attempt)].snapshot()
        write_atomic(self._path(round, attempt), json.dumps(snapshot).encode(), mode=0o600)

    def mask(self, round: int, attempt: int, vector: npt.NDArray[np.uint32]) -> Upload:
        """Mask a vector in place and make the machine durable.

        After a crash between this and the spooled reply nothing had been sent: the same vector is masked
        again to the same bytes. Raises SecondUpload for a vector that gives others.
        """
        machine = self.machine(round, attempt)
        before = machine.upload
        if before is not None:
            machine = self._restore({**machine.snapshot(), "upload": None}, round=round, attempt=attempt)
        upload = machine.mask(vector)
        if before is not None and upload != before:
            raise SecondUpload(
                f"round {round} attempt {attempt}: expected the vector masked before, got another"
            )
        self._machines[(round, attempt)] = machine
        self.store(round, attempt)
        return upload

    def forget_before(self, round: int) -> None:
        """Erase the machines of rounds below `round`."""
        for path in self._directory.glob("*.json"):
            if int(path.name[:6]) < round:
                path.unlink()
        self._machines = {key: machine for key, machine in self._machines.items() if key[0] >= round}

    def _restore(self, snapshot: Mapping[str, Any], *, round: int, attempt: int) -> SiteRound:
        return SiteRound.restore(
            snapshot,
            terms=round_terms(self._study, round=round, attempt=attempt),
            identities=self._identities,
            sign=self._key.private.sign,
        )

    def _path(self, round: int, attempt: int) -> Path:
        return self._directory / f"{round:06d}-{attempt}.json"
