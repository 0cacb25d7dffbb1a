"""Make an audit bundle from the files of a run; nothing is verified here, the auditor does that.

Guarantees: entries beyond the last signed checkpoint are left out, so a bundle of a running log is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.errors import BundleInvalid
from common.ledger.bundle import ENTRIES_NAME, RECORDS_NAME, SBOM_NAME, Bundle, make_bundle
from common.ledger.note import VerifierKey
from common.ledger.sbom import make_sbom

CHECKPOINTS_NAME = "checkpoints"


def export_bundle(
    log_directory: Path,
    *,
    log: VerifierKey,
    exported_s: int,
    software: str,
    releases: Mapping[int, Path] | None = None,
    records: Path | None = None,
    retained: Path | None = None,
    leave_out: frozenset[str] = frozenset(),
    with_sbom: bool = True,
) -> Bundle:
    """Collect a bundle from a log directory (see server/log.py).

    releases: folder of each version's files, without those named in `leave_out`; records: the signed round
    records, one JSON object per line; retained: `<round>-<attempt>/<site>.bin`, `.key`, `aggregate.key`.
    """
    notes = sorted((log_directory / CHECKPOINTS_NAME).glob("*.note"))
    if not notes:
        raise BundleInvalid(f"{log_directory}: expected a log with a signed checkpoint, got none")
    lines = (log_directory / "entries.jsonl").read_bytes().split(b"\n")[: int(notes[-1].stem)]
    members = {ENTRIES_NAME: b"".join(line + b"\n" for line in lines)}
    members |= {f"{CHECKPOINTS_NAME}/{path.name}": path.read_bytes() for path in notes}
    for version, folder in (releases or {}).items():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in leave_out:
                members[f"releases/{version}/{path.name}"] = path.read_bytes()
    if records is not None:
        members[RECORDS_NAME] = records.read_bytes()
    if retained is not None:
        for path in sorted(retained.glob("*/*")):
            members[f"retained/{path.parent.name}/{path.name}"] = path.read_bytes()
    if with_sbom:
        members[SBOM_NAME] = make_sbom()
    return make_bundle(log=log, exported_s=exported_s, software=software, members=members)
