"""The audit of what came out of a study: releases and their files, site records, retained contributions."""

from __future__ import annotations

import hashlib
import json

from common.canonical import sha256_hex
from common.config import Mode, Study
from common.errors import FedRadError
from common.ledger.bundle import RECORDS_NAME
from common.ledger.case import Case, StudyCase
from common.ledger.checkpoint import parse_ledger_proof, verify_ledger_proof, witness_key
from common.ledger.entries import (
    AdapterDecision,
    Outcome,
    Release,
    ReleasedFile,
)
from common.ledger.findings import Finding, Problem, Problems, Status, conclude
from common.ledger.statements import commit
from common.ledger.study_checks import kind_evidence
from common.records import signed_from_json, verify_chain

ADAPTER_NAME = "adapter_model.safetensors"
PROOF_NAME = "ledger.tlog-proof"
ENTRY_NAME = "ledger.entry.json"
_MODULUS = 1 << 32


def check_releases(case: Case, study: StudyCase) -> Finding:
    """Every release is the adapter of a round, and its files are exactly those in the ledger."""
    problems, unchecked, versions = Problems(), [], []
    made = {record.adapter_out: record.number for _, record in study.rounds if record.adapter_out}
    rejected = {
        e.body.rejected for _, e in study.entries if isinstance(e.body, AdapterDecision) and e.body.rejected
    }
    last = 0
    for index, entry in study.entries:
        body, where = entry.body, f"entry {index}"
        if not isinstance(body, Release):
            continue
        name = f"release {body.version}"
        versions.append(body.version)
        if body.version <= last:
            problems.add(f"{name} follows release {last}", where)
        last = max(last, body.version)
        if made.get(body.adapter) != body.number:
            problems.add(f"{name} is not the adapter of round {body.number}", where)
        if body.adapter in rejected:
            problems.add(f"{name} is an adapter that was rolled back", where)
        if study.manifest.privacy.mode is Mode.PLAIN:
            unchecked.append(f"{name} was trained without privacy")
        folder = case.bundle.folder(f"releases/{body.version}")
        problems += _check_files(case, study, body, folder, where)
        if ADAPTER_NAME in folder:
            if adapter_sha256(folder[ADAPTER_NAME], study.manifest) != body.adapter:
                problems.add(f"{name}: the adapter file holds another adapter", f"releases/{body.version}")
        elif folder:
            unchecked.append(f"{name}: the adapter file is not in the bundle, only its hash")
    if not versions:
        unchecked.append("the study has no release")
    return conclude(
        "releases",
        problems,
        passed=f"{len(versions)} releases, each the adapter of its round",
        unchecked="; ".join(unchecked),
        evidence=kind_evidence(study, Release),
        study=study.sha256,
    )


def check_release_members(case: Case) -> Finding:
    """No release lies in the bundle that is not in the ledger."""
    logged = {str(e.body.version) for e in case.entries if isinstance(e.body, Release)}
    found = {name.split("/")[0] for name in case.bundle.folder("releases")}
    problems = [Problem(f"release {v} is not in the ledger", f"releases/{v}") for v in sorted(found - logged)]
    return conclude(
        "release-logged", problems, passed=f"{len(found)} releases in the bundle, all in the ledger"
    )


def check_records(case: Case, study: StudyCase) -> Finding:
    """The signed records that the sites chain say the same as the ledger's round entries."""
    data = case.bundle.members.get(RECORDS_NAME)
    if data is None:
        return Finding(
            "site-records",
            Status.NOT_CHECKABLE,
            "the sites' records are not in the bundle",
            study=study.sha256,
        )
    problems = Problems()
    try:
        signed = [
            s
            for s in map(signed_from_json, map(json.loads, data.splitlines()))
            if s.record.study == study.sha256
        ]
        verify_chain(
            signed,
            study=study.sha256,
            after_round=-1,
            previous=study.sha256,
            operator_key=study.manifest.cohort.operator_key,
        )
        by_round = {s.record.round: s.record for s in signed}
    except (FedRadError, ValueError) as error:
        return conclude(
            "site-records", [Problem(f"records: {error}", RECORDS_NAME)], passed="", study=study.sha256
        )
    for index, entry in study.rounds:
        record = by_round.pop(entry.number, None) if entry.outcome is Outcome.RELEASED else None
        if entry.outcome is not Outcome.RELEASED:
            continue
        summed = {p.site for p in entry.participations if p.summed}
        if (
            record is None
            or record.sha256 != entry.record
            or (record.adapter_in, record.adapter_out) != (entry.adapter_in, entry.adapter_out)
            or set(record.contributors) != summed
        ):
            problems.add(
                f"round {entry.number}: the sites' record says otherwise than the ledger", f"entry {index}"
            )
    problems += [
        Problem(f"round {n}: a record without a ledger entry", RECORDS_NAME) for n in sorted(by_round)
    ]
    return conclude(
        "site-records",
        problems,
        passed=f"{len(signed)} chained records agree with the ledger",
        evidence=(RECORDS_NAME,),
        study=study.sha256,
    )


def check_retained(case: Case, study: StudyCase) -> Finding:
    """Retained masked contributions open their commitments, and their sum is the round's aggregate.

    `retained/<round>-<attempt>/<site>.bin` holds little-endian uint32, `<site>.key` the commitment's
    32-byte opening; `aggregate.key` opens the commitment to the sum modulo 2^32.
    """
    problems, checked = Problems(), 0
    for index, record in study.rounds:
        folder = case.bundle.folder(f"retained/{record.number}-{record.attempt}")
        if not folder:
            continue
        where = f"retained/{record.number}-{record.attempt}"
        expected = {p.site for p in record.participations if p.summed}
        names = {f"{site}.{end}" for site in expected for end in ("bin", "key")} | {"aggregate.key"}
        if folder.keys() != names:
            problems.add(f"round {record.number}: not the contributions of its {len(expected)} sites", where)
            continue
        try:
            for part in record.participations:
                if (
                    part.summed
                    and commit(folder[f"{part.site}.key"], folder[f"{part.site}.bin"]) != part.commitment
                ):
                    problems.add(
                        f"round {record.number}: {part.site}'s contribution is not the committed one",
                        where,
                    )
            total = sum_modulo([folder[f"{site}.bin"] for site in sorted(expected)])
            if commit(folder["aggregate.key"], total) != record.aggregate:
                problems.add(
                    f"round {record.number}: the contributions do not add up to the aggregate",
                    f"entry {index}",
                )
        except FedRadError as error:
            problems.add(f"round {record.number}: {error}", where)
        checked += 1
    unchecked = "" if checked or problems else "no masked contributions were retained in the bundle"
    return conclude(
        "aggregate",
        problems,
        passed=f"{checked} rounds' masked contributions open and add up",
        unchecked=unchecked,
        evidence=("retained/",) if checked else (),
        study=study.sha256,
    )


def adapter_sha256(data: bytes, study: Study) -> str:
    """Name the adapter in a safetensors file: SHA-256 over the manifest's tensors in their order.

    Returns an empty string for a file that does not hold exactly those tensors as float32.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        specs = {spec.name: spec for spec in study.adapter.tensors}
        if header.keys() != specs.keys() or len(data) < 8 + length:
            return ""
        digest, used = hashlib.sha256(), 0
        for spec in study.adapter.tensors:
            item = header[spec.name]
            start, end = item["data_offsets"]
            if item["dtype"] != "F32" or tuple(item["shape"]) != spec.shape or end - start != 4 * spec.size:
                return ""
            digest.update(data[8 + length + start : 8 + length + end])
            used += end - start
        return digest.hexdigest() if used == len(data) - 8 - length else ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def sum_modulo(vectors: list[bytes]) -> bytes:
    """Add equally long vectors of little-endian uint32 modulo 2^32."""
    from array import array

    from common.errors import LedgerInvalid

    if not vectors or len({len(v) for v in vectors}) != 1 or len(vectors[0]) % 4:
        raise LedgerInvalid("expected retained contributions of one length, a multiple of 4 bytes")
    columns = [memoryview(v).cast("I") for v in vectors]
    total = array("I", (sum(values) % _MODULUS for values in zip(*columns, strict=True)))
    return total.tobytes()


def _check_files(
    case: Case, study: StudyCase, body: Release, folder: dict[str, bytes], where: str
) -> list[Problem]:
    name = f"release {body.version}"
    listed: dict[str, ReleasedFile] = {f.path: f for f in body.files}
    problems = Problems()
    for path, data in folder.items():
        if path in (PROOF_NAME, ENTRY_NAME):
            continue
        if path not in listed:
            problems.add(f"{name}: extra file {path}", where)
        elif (len(data), sha256_hex(data)) != (listed[path].bytes, listed[path].sha256):
            problems.add(f"{name}: {path} is not the file that was signed", where)
    for path in listed:
        if path not in folder and path != ADAPTER_NAME:
            problems.add(f"{name}: {path} is in the ledger but not in the bundle", where)
    problems += _check_proof(case, study, body, folder, name)
    return problems


def _check_proof(
    case: Case, study: StudyCase, body: Release, folder: dict[str, bytes], name: str
) -> list[Problem]:
    if PROOF_NAME not in folder or ENTRY_NAME not in folder:
        return [Problem(f"{name}: the offline ledger proof is missing", f"releases/{body.version}")]
    try:
        proof = parse_ledger_proof(folder[PROOF_NAME])
        cohort = study.manifest.cohort
        witnesses = [witness_key(s.id, bytes.fromhex(s.witness_key)) for s in cohort.site if s.witness_key]
        verify_ledger_proof(
            folder[ENTRY_NAME], proof, log=case.bundle.log, witnesses=witnesses, quorum=cohort.witness_quorum
        )
        if case.entries[proof.index].body != body:
            return [Problem(f"{name}: the offline proof is of another entry", f"releases/{body.version}")]
    except (FedRadError, IndexError) as error:
        return [Problem(f"{name}: offline proof: {error}", f"releases/{body.version}")]
    return []
