"""What an import did: exact counts for the site, bucketed counts for the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.data.store import SPLITS, Pair, bucket
from client.data.study import Dropped, Prepared


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What an import did; exact counts, for the site's own eyes."""

    directory: str
    done_before: bool
    read: int
    kept: int
    dropped: dict[str, int]
    patients: int
    splits: dict[str, int]
    flags: dict[str, int]
    preview: list[dict[str, Any]]


@dataclass(slots=True)
class Counts:
    """Running counts over decided studies."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    redactions: Counter[str] = field(default_factory=Counter)
    priors_removed: int = 0
    patients: set[str] = field(default_factory=set)

    def add(self, outcome: Prepared | Dropped, pair: Pair | None) -> None:
        """Count one study."""
        self.read += 1
        if isinstance(outcome, Dropped) or pair is None:
            self.dropped[outcome.reason if isinstance(outcome, Dropped) else ""] += 1
            return
        self.splits[pair.split] += 1
        self.patients.add(pair.patient)
        self.flags.update(outcome.facts["flags"])
        self.languages[outcome.facts["language"]] += 1
        self.redactions.update(outcome.facts["redactions"])
        self.priors_removed += outcome.facts["priors_removed"]

    def summary(self, directory: Path, *, done_before: bool, preview: list[dict[str, Any]]) -> ImportSummary:
        """Return the exact counts for the site."""
        return ImportSummary(
            directory=str(directory),
            done_before=done_before,
            read=self.read,
            kept=sum(self.splits.values()),
            dropped=dict(sorted(self.dropped.items())),
            patients=len(self.patients),
            splits={split: self.splits[split] for split in SPLITS},
            flags=dict(sorted(self.flags.items())),
            preview=preview,
        )

    def card(self) -> dict[str, Any]:
        """Return bucketed counts for the card."""
        return {
            "dropped": _bucketed(self.dropped),
            "flags": _bucketed(self.flags),
            "languages": _bucketed(self.languages),
            "redactions": _bucketed(self.redactions),
            "priors_removed": bucket(self.priors_removed),
        }


def _bucketed(counts: Mapping[str, int]) -> dict[str, str]:
    return {name: bucket(count) for name, count in sorted(counts.items()) if count}
