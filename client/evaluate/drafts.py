"""What a release writes for held-out studies, kept batch by batch so that a stopped evaluation goes on.

Guarantees: a draft in the journal was written by the adapter that the journal's name gives; a torn last line
is written again, any other damage is refused. Journals hold report text: they are readable by their owner
only and never leave the site.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import EvaluationRefused
from common.files import append_durable

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Journal:
    """An append-only file of JSON objects, one per line, each with a `key`."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """Read the records by key, dropping a torn last line from the file."""
        if not self.path.is_file():
            return {}
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self.path.open("r+b") as handle:
                handle.truncate(whole)
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                records[str(record["key"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationRefused(f"{self.path}:{number}: expected a record, got other text") from error
        return records

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records]
        append_durable(self.path, ("\n".join(lines) + "\n").encode())


def write_drafts(
    model: Any,
    tokenizer: Any,
    *,
    device: str,
    features: Callable[[Sequence[int]], torch.Tensor],
    keys: Sequence[str],
    indications: Sequence[str],
    max_new_tokens: int,
    journal: Journal,
    name: str,
    batch_size: int,
    template: str | None = None,
    progress: Progress,
) -> list[str]:
    """Write a draft per study, those in the journal excepted; `features` gives some rows as [n, T, D]."""
    from client.evaluation import generate_reports

    done = {key: str(record["draft"]) for key, record in journal.read().items()}
    left = [row for row, key in enumerate(keys) if key not in done]
    progress(name, len(keys) - len(left), len(keys))
    for start in range(0, len(left), batch_size):
        rows = left[start : start + batch_size]
        written = generate_reports(
            model,
            tokenizer,
            features=features(rows).to(device),
            indications=[indications[row] for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            template=template,
        )
        records = [{"key": keys[row], "draft": text} for row, text in zip(rows, written, strict=True)]
        journal.append(records)
        done |= {record["key"]: record["draft"] for record in records}
        progress(name, len(done), len(keys))
    return [done[key] for key in keys]
