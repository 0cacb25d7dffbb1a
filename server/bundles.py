"""An audit bundle of a run: from the directory that a study ran in to one file."""

from __future__ import annotations

from pathlib import Path

from common.errors import BundleInvalid
from common.ledger.bundle import Bundle
from common.ledger.entries import Release, parse_entry
from common.ledger.export import export_bundle
from common.ledger.output_checks import ADAPTER_NAME, ENTRY_NAME
from common.ledger.release_proof import trust_of
from server.checkpoint import read_signed_study

LEDGER_NAME = "ledger"


def export_run(run: Path, *, exported_s: int, software: str, with_adapters: bool = True) -> Bundle:
    """Bundle a study directory, or a local run that holds one in `server/`; raises BundleInvalid.

    Releases are folders with a ledger entry: `release/`, or any in `releases/`.
    """
    server = run / "server" if (run / "server").is_dir() else run
    if not (server / LEDGER_NAME).is_dir():
        raise BundleInvalid(f"{server}: expected a study directory with a ledger, got none")
    study = read_signed_study(server)
    releases = {}
    for folder in (run / "release", *sorted((run / "releases").glob("*"))):
        entry = folder / ENTRY_NAME
        if entry.is_file():
            body = parse_entry(entry.read_bytes()).body
            if isinstance(body, Release):
                releases[body.version] = folder
    records, retained = server / "records.jsonl", server / "retained"
    return export_bundle(
        server / LEDGER_NAME,
        log=trust_of(study).log,
        exported_s=exported_s,
        software=software,
        releases=releases,
        records=records if records.is_file() else None,
        retained=retained if retained.is_dir() else None,
        leave_out=frozenset() if with_adapters else frozenset({ADAPTER_NAME}),
    )
