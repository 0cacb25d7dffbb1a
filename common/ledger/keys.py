"""Which key was whose, when: the history of enrolments, rotations, revocations and compromises.

Guarantees: a key counts from the entry that introduces it until the entry that removes it, and never for
something dated at or after the time since which it is known to be compromised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from common.config import Study
from common.ledger.entries import OPERATOR, Enrolment, Entry, KeyCompromise, KeyUse, Revocation, Rotation

_FOREVER = 1 << 62


@dataclass
class _Tenure:
    key: str
    first: int
    last: int = _FOREVER
    compromised_s: int = _FOREVER


@dataclass
class KeyHistory:
    """Keys by holder and use; `index` is the position in the log, `time_s` the entry's time."""

    _tenures: dict[tuple[str, KeyUse], list[_Tenure]] = field(default_factory=dict)

    def introduce(self, holder: str, use: KeyUse, key: str, index: int) -> None:
        tenures = self._tenures.setdefault((holder, use), [])
        if key and not any(t.key == key for t in tenures):
            tenures.append(_Tenure(key, index))

    def remove(self, holder: str, use: KeyUse, key: str, index: int) -> None:
        for tenure in self._tenures.get((holder, use), []):
            if tenure.key == key:
                tenure.last = min(tenure.last, index)

    def valid(self, holder: str, use: KeyUse, *, index: int, time_s: int) -> tuple[str, ...]:
        """The keys that count for an entry at `index` dated `time_s`."""
        return tuple(
            t.key
            for t in self._tenures.get((holder, use), [])
            if t.first <= index < t.last and time_s < t.compromised_s
        )

    def known(self, holder: str, use: KeyUse) -> tuple[str, ...]:
        """Every key the holder ever had for this use."""
        return tuple(t.key for t in self._tenures.get((holder, use), []))

    def compromise(self, holder: str, use: KeyUse, key: str, *, index: int, since_s: int) -> None:
        for tenure in self._tenures.get((holder, use), []):
            if tenure.key == key:
                tenure.last = min(tenure.last, index)
                tenure.compromised_s = min(tenure.compromised_s, since_s)


def key_history(
    entries: Iterable[Entry], studies: Iterable[tuple[int, Study]], *, operator_key: str
) -> KeyHistory:
    """Build the history of a log: its studies pin keys from their entry on, key entries change them.

    `operator_key` is the log's own key, which stays the operator's for the life of the log.
    """
    history = KeyHistory()
    history.introduce(OPERATOR, KeyUse.MESSAGE, operator_key, 0)
    pinned = dict(studies)
    for index, entry in enumerate(entries):
        body = entry.body
        if index in pinned:
            for site in pinned[index].cohort.site:
                history.introduce(site.id, KeyUse.MESSAGE, site.message_key, index)
                history.introduce(site.id, KeyUse.WITNESS, site.witness_key, index)
        elif isinstance(body, Enrolment):
            history.introduce(body.site, KeyUse.MESSAGE, body.message_key, index)
            history.introduce(body.site, KeyUse.WITNESS, body.witness_key, index)
        elif isinstance(body, Rotation):
            history.introduce(body.holder, body.use, body.new, index + 1)
            history.remove(body.holder, body.use, body.old, index + 1)
        elif isinstance(body, Revocation):
            history.remove(body.holder, body.use, body.key, index + 1)
        elif isinstance(body, KeyCompromise):
            history.compromise(body.holder, body.use, body.key, index=index + 1, since_s=body.since_s)
    return history
