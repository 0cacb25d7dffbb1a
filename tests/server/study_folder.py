"""A study directory as the server writes it, without a server: signed study, records, log lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.canonical import canonical_json
from common.config import Study, parse_study_toml
from common.identity import SigningKey, load_or_create_key
from common.model.tiny import tiny_base_directory
from common.records import RoundRecord, sign_record, signed_to_json
from server.studies import SiteKeys, resolve_study, study_template, write_study

SITES = ("north", "east", "south", "west")
START_UNIX_S = 1_800_000_000


def write_folder(directory: Path, *, mode: str = "consortium", rounds: int = 14, id: str = "chest") -> Study:
    """Sign a study of four sites into `directory`, nothing served yet."""
    draft = parse_study_toml(
        study_template(id=id, base="tiny", sites=SITES, mode=mode, rounds=rounds, patients=2800)
    )
    if mode != "plain":  # noise that meets the ε, so that nothing is calibrated
        noise = {"consortium": (0.8, 1.0), "local": (0.8, 0.8)}[mode]
        privacy = replace(draft.privacy, delta=3e-5, site_noise=noise[0], release_noise=noise[1])
        draft = replace(draft, privacy=privacy)
    operator = load_or_create_key(directory / "keys" / "message.key")
    keys = {site: SiteKeys(f"{n:064x}", f"{n + 16:064x}") for n, site in enumerate(SITES, start=1)}
    base = tiny_base_directory()
    study = resolve_study(draft, base=base, operator_key=operator.public, site_keys=keys)
    write_study(directory, study, operator, base=base)
    (directory / "lock").touch()
    log(directory, "started", round=0, rounds=study.rounds, study=study.sha256)
    return study


def log(directory: Path, event: str, **fields: Any) -> None:
    """Append a line to the study's log, as `StudyDirectory.log` does."""
    with (directory / "log.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, **fields}, sort_keys=True) + "\n")


def serve_round(
    directory: Path, study: Study, round: int, *, missing: dict[str, str] | None = None, seconds: float = 4.0,
    attempt: int = 1, late: dict[str, float] | None = None,
) -> RoundRecord:  # fmt: skip
    """Append a served round to records and log."""
    from common.identity import load_key

    missing = missing or {}
    there = tuple(sorted(set(study.site_ids) - set(missing)))
    record = RoundRecord(
        study=study.sha256, round=round, attempt=attempt, previous="0" * 64, adapter_in="1" * 64,
        adapter_out="2" * 64, cohort=tuple(sorted(study.site_ids)), contributors=there,
        missing={site: reason.partition(":")[0] for site, reason in missing.items()},
        contributions=dict.fromkeys(there, "3" * 64), groups=("projector",), learning_rate=0.001,
        sampling_rate=study.training.sampling_rate, patients=study.training.patients,
        mode=study.privacy.mode.value, clip_norm=study.privacy.clip_norm, site_share_sigma_units=3e5,
        server_sigma_units=4e5, time_unix_s=START_UNIX_S + 10 * round,
    )  # fmt: skip
    key: SigningKey = load_key(directory / "keys" / "message.key")
    with (directory / "records.jsonl").open("ab") as file:
        file.write(canonical_json(signed_to_json(sign_record(key, record))) + b"\n")
    log(
        directory, "round", round=round, attempt=attempt, cohort=list(record.cohort), missing=missing,
        seconds=seconds, step_norm=0.1, late=late or {},
    )  # fmt: skip
    return record


def fail_attempt(directory: Path, round: int, *, missing: dict[str, str], attempt: int = 1) -> None:
    """Append a failed attempt to the log."""
    log(
        directory, "round-failed", round=round, attempt=attempt, served=0, floor=3, missing=missing,
        reason="CohortTooSmall: uploads: expected at least 3 sites, got 2",
    )  # fmt: skip


def eventful(directory: Path, *, rounds: int = 14, served: int = 9) -> Study:
    """Write a study in which things happened: absences, a failed attempt, a refusal at the end."""
    study = write_folder(directory, rounds=rounds)
    refused = "SiteRefused: BudgetExceeded: this round would bring the site to epsilon 9, its limit is 8"
    for round in range(served):
        missing: dict[str, str] = {}
        if round in (3, 4):
            missing["west"] = "not connected"
        if round == 6:
            fail_attempt(
                directory, 6, missing={"north": "no answer before the deadline", "south": "NodeFailed: gone"}
            )
        if round == served - 1:
            missing["east"] = refused
        serve_round(
            directory, study, round, missing=missing, seconds=3.0 + round, attempt=2 if round == 6 else 1
        )
    traffic = {
        "adapter_bytes": 271360,
        "bytes": {"contribute-down": 900_000, "contribute-up": 800_000, "hello-down": 500},
        "messages": {"contribute-down": 36, "contribute-up": 36, "hello-down": 4},
    }
    (directory / "traffic.json").write_bytes(canonical_json(traffic))
    return study
