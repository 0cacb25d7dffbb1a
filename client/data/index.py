"""`index.parquet`: pairs and facts of a prepared data folder as columns, for fast reads by split or flag.

Guarantees: made from the same pairs and facts it has the same bytes; rows are in the order of
`pairs.jsonl`, which stays the authority. It is absent where pyarrow is not installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from client.data.store import Pair
from common.errors import DatasetInvalid

ROWS_PER_GROUP = 1000


def write_index(path: Path, rows: Iterable[tuple[Pair, dict[str, Any]]]) -> bool:
    """Write the index in row groups; returns False where pyarrow is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return False
    text, strings = pa.string(), pa.list_(pa.string())
    schema = pa.schema(
        [
            ("patient", text),
            ("study", text),
            ("images", strings),
            ("view", text),
            ("indication", text),
            ("findings", text),
            ("impression", text),
            ("split", text),
            ("language", text),
            ("words", pa.int32()),
            ("priors_removed", pa.int32()),
            ("flags", strings),
            ("sha256", strings),
        ]
    )
    source = iter(rows)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(source, ROWS_PER_GROUP)):
            columns = {name: [_value(pair, facts, name) for pair, facts in batch] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))
    return True


def read_index(directory: Path, *, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Read columns of the index; raises DatasetInvalid when it is missing or has no such column."""
    import pyarrow.parquet as pq

    path = directory / "index.parquet"
    if not path.is_file():
        raise DatasetInvalid(f"expected an index at {path}, found none")
    known = pq.read_schema(path).names
    if unknown := sorted(set(columns) - set(known)):
        raise DatasetInvalid(f"expected columns among {', '.join(known)}, got {unknown[0]!r}")
    found: dict[str, list[Any]] = pq.read_table(path, columns=list(columns), use_threads=False).to_pydict()
    return found


def _value(pair: Pair, facts: dict[str, Any], name: str) -> Any:
    if name in Pair.__slots__:
        value = getattr(pair, name)
        return list(value) if isinstance(value, tuple) else value
    return facts[name]
