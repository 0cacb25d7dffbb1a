"""The demonstration: four made-up hospitals with synthetic radiographs, and a study of theirs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from common.canonical import canonical_json
from common.errors import RunDirectoryBusy
from common.files import write_atomic

SITES = ("north", "east", "south", "west")
PUBLIC_PATIENTS = 40
PATIENTS = 2800  # nominal, as in docs; a public constant, not a count of the data

Progress = Callable[[str, int, int], None]


def prepare_demo(out: Path, *, seed: int, mode: str, progress: Progress) -> tuple[Path, Path]:
    """Write the hospitals' data and the manifest below `out`; returns manifest and data folder.

    What is there already is kept. Raises RunDirectoryBusy for a folder with another seed or mode, and
    ManifestInvalid for a mode that is none, before anything is written.
    """
    from deploy.local.consortium import PUBLIC
    from deploy.local.synthetic import write_synthetic_sites
    from server.studies import study_template

    asked = canonical_json({"seed": seed, "mode": mode})
    marker, data, manifest = out / "demo.json", out / "data", out / "study.toml"
    if marker.is_file() and marker.read_bytes() != asked:
        raise RunDirectoryBusy(
            f"{marker}: expected the demo of seed {seed} and mode {mode}, got another; choose another --out"
        )
    text = study_template(
        id="chest-demo", base="tiny", sites=SITES, mode=mode, patients=PATIENTS, accept_every_rounds=5
    )
    write_atomic(marker, asked)
    for site in SITES:
        if not (data / site / "pairs.jsonl").is_file():
            shutil.rmtree(data / site, ignore_errors=True)
            write_synthetic_sites(data, sites=[site], seed=seed, progress=progress)
    if not (data / PUBLIC / "pairs.jsonl").is_file():
        shutil.rmtree(data / PUBLIC, ignore_errors=True)
        write_synthetic_sites(data, sites=[PUBLIC], patients={PUBLIC: PUBLIC_PATIENTS}, seed=seed + 1)
    if not manifest.is_file():
        write_atomic(manifest, text.encode())
    return manifest, data
