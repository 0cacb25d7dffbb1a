"""The import journal: which studies a source holds and what became of each, in one SQLite file.

Guarantees: a study has one position and at most one outcome; what was committed survives kill -9; memory
does not grow with the number of studies. The file holds identifiers: it lives in the private work folder
(mode 0700) and is deleted when the import ends.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from client.data.study import (
    Dropped,
    Prepared,
    Reason,
    SourceStudy,
    format_outcome,
    format_source,
    parse_outcome,
    parse_source,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (position INTEGER PRIMARY KEY, source TEXT NOT NULL, outcome TEXT);
CREATE TABLE IF NOT EXISTS seen (study TEXT PRIMARY KEY, patient TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_BATCH = 256


class Journal:
    """An open journal; `path` None keeps it in a temporary file that vanishes (dry run)."""

    def __init__(self, path: Path | None) -> None:
        self._connection = sqlite3.connect(path or "", isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def gathered(self) -> bool:
        """Tell whether the list of studies is complete."""
        return self._connection.execute("SELECT 1 FROM fact WHERE name = 'gathered'").fetchone() is not None

    def gather(self, sources: Iterable[SourceStudy]) -> None:
        """Store all studies of the source in one transaction, replacing an incomplete list.

        A study identifier that was seen before is marked as a duplicate, or as a study of two patients.
        """
        self._connection.execute("BEGIN")
        try:
            self._connection.execute("DELETE FROM study")
            self._connection.execute("DELETE FROM seen")
            self._connection.executemany(
                "INSERT INTO study (position, source) VALUES (?, ?)",
                ((position, format_source(self._marked(source))) for position, source in enumerate(sources)),
            )
            self._connection.execute("INSERT INTO fact VALUES ('gathered', '1')")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _marked(self, source: SourceStudy) -> SourceStudy:
        if not source.study:
            return source
        row = self._connection.execute("SELECT patient FROM seen WHERE study = ?", (source.study,)).fetchone()
        if row is None:
            self._connection.execute("INSERT INTO seen VALUES (?, ?)", (source.study, source.patient))
            return source
        reason = Reason.DUPLICATE_STUDY if row[0] == source.patient else Reason.PATIENT_CONFLICT
        return replace(source, reason=source.reason or reason)

    def count(self, *, open_only: bool = False) -> int:
        """Count the studies, or those without an outcome."""
        where = " WHERE outcome IS NULL" if open_only else ""
        return int(self._connection.execute(f"SELECT COUNT(*) FROM study{where}").fetchone()[0])  # noqa: S608

    def open_studies(self) -> Iterator[tuple[int, SourceStudy]]:
        """Yield the studies without an outcome by position; outcomes may be recorded meanwhile."""
        after = -1
        while rows := self._connection.execute(
            "SELECT position, source FROM study WHERE outcome IS NULL AND position > ? "
            "ORDER BY position LIMIT ?",
            (after, _BATCH),
        ).fetchall():
            for position, source in rows:
                yield position, parse_source(source)
            after = rows[-1][0]

    def record(self, outcomes: Iterable[tuple[int, Prepared | Dropped]]) -> None:
        """Commit outcomes together."""
        self._connection.execute("BEGIN")
        self._connection.executemany(
            "UPDATE study SET outcome = ? WHERE position = ?",
            ((format_outcome(outcome), position) for position, outcome in outcomes),
        )
        self._connection.execute("COMMIT")

    def outcomes(self) -> Iterator[Prepared | Dropped]:
        """Yield all outcomes by position."""
        after = -1
        while rows := self._connection.execute(
            "SELECT position, outcome FROM study WHERE outcome IS NOT NULL AND position > ? "
            "ORDER BY position LIMIT ?",
            (after, _BATCH),
        ).fetchall():
            for _, outcome in rows:
                yield parse_outcome(outcome)
            after = rows[-1][0]
