"""The ledger's cost: durable appends per CPU-second, an inclusion proof at 10^6 leaves, a 1,000-round audit.

Appends are of encoded round-sized entries, in batches of 1,000 with one fsync each, hashing and indexing
included. The audit parses and verifies a bundle of 1,000 rounds with three sites: every control, epsilons
recomputed, in seconds of CPU of one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.ledger.audit import verify_bundle
from common.ledger.bundle import pack, parse_bundle
from common.ledger.checkpoint import Checkpoint
from common.ledger.entries import OPERATOR, Entry, Incident, format_entry
from common.ledger.merkle import hash_leaf, verify_inclusion
from server.log import Log
from tests.common.ledger.consortium import ORIGIN, START_S, finished_bundle, key_of

LEAVES = 1_000_000
BATCH = 1000


def run(progress: Callable[[str], None]) -> dict[str, float]:
    """Measure and return `ledger_append_per_cpu_s`, `inclusion_proof_ms` and `audit_1000_rounds_s`."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fedrad-ledger-") as folder:
        results |= _log(Path(folder), progress)
    results["audit_1000_rounds_s"] = _audit(progress)
    return results


def _log(folder: Path, progress: Callable[[str], None]) -> dict[str, float]:
    entry = Entry(START_S, "ab" * 32, Incident(code="site-dropped", site="cedar", number=0, detail=""))
    template = format_entry(entry).replace(b'"number":0', b'"number":%d')
    with Log(folder, origin=ORIGIN, private_key=key_of(OPERATOR).private) as log:
        spent = 0.0
        for start in range(0, LEAVES, BATCH):
            leaves = [template % number for number in range(start, start + BATCH)]
            before = time.process_time()
            log.append_leaves(leaves)
            spent += time.process_time() - before
            if start % (LEAVES // 10) == 0:
                progress(f"ledger: {start} of {LEAVES} entries")
        log.checkpoint()
        head = Checkpoint(ORIGIN, log.size, log.root)
        times = []
        for index in range(7, LEAVES, LEAVES // 500):
            before = time.perf_counter()
            proof = log.prove(index)
            times.append(time.perf_counter() - before)
            leaf = hash_leaf(log.leaf(index))
            verify_inclusion(leaf, index=index, size=head.size, proof=proof.hashes, root=head.root)
    return {
        "ledger_append_per_cpu_s": LEAVES / spent,
        "inclusion_proof_ms": 1000 * statistics.median(times),
    }


def _audit(progress: Callable[[str], None]) -> float:
    progress("ledger: making a bundle of 1,000 rounds")
    data = pack(finished_bundle(1000, site_epsilon=900.0, release_epsilon=800.0))
    before = time.process_time()
    bundle = parse_bundle(data)
    report = verify_bundle(bundle, trusted=bundle.log, progress=lambda what: progress(f"ledger: {what}"))
    spent = time.process_time() - before
    if not report.passed:
        raise RuntimeError("the benchmark's own bundle did not pass")
    return spent
