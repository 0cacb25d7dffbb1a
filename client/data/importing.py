"""The import: gather the studies of a source, prepare each, then seal the prepared data folder.

Guarantees: the folder appears whole or not at all; after a crash the same command continues and ends with
the same bytes; a second run with nothing changed does nothing; every study read is kept or has one reason;
memory does not grow with the number of studies beyond their identifiers. No socket is opened. It does not
watch the source: files changed while it runs may be seen old or new.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from client.data.curation import Curation, curate
from client.data.index import write_index
from client.data.journal import Journal
from client.data.leak_gate import SAMPLE, measure_leaks, verify_recall
from client.data.ocr import tesseract_version
from client.data.prepare import Recipe, dicom_name
from client.data.recogniser import load_recogniser, recogniser_identity
from client.data.redaction_rules import RULES_VERSION
from client.data.reports import PRIORS_VERSION
from client.data.sitekey import SiteKey
from client.data.sources import paths
from client.data.store import (
    DEFAULT_FRACTIONS,
    Pair,
    Split,
    bucket,
    file_sha256,
    iter_pairs,
    read_card,
    refuse_existing,
    seal_dataset,
    split_of,
)
from client.data.study import Dropped, Prepared, Reason, SourceStudy
from client.data.summary import Counts, ImportSummary
from client.data.workers import prepared
from common.errors import DatasetExists, DatasetInvalid, ImportBusy, SourceInvalid
from common.files import write_atomic

PREVIEW = 10
_COMMIT_EVERY = 64
Progress = Callable[[str, int, int], None]
Reader = Callable[["ImportPlan", Progress], Iterator[SourceStudy]]


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What is imported, from where and how; equal plans of an unchanged source give equal bytes."""

    source: Path
    format: str
    directory: Path
    key: SiteKey
    mapping: Mapping[str, str]
    table: Path | None = None
    max_side: int = 512
    bits: int = 8
    keep_priors: bool = False
    check_writing: bool = True
    with_dicom: bool = False
    check_chest: bool = True
    recogniser: str = ""
    labels: Path | None = None
    workers: int = 1
    withdrawn: frozenset[str] = frozenset()


def import_studies(plan: ImportPlan, read_source: Reader, *, progress: Progress) -> ImportSummary:
    """Import a source into `plan.directory` and return the summary.

    `read_source` yields the studies of the source in a fixed order; `progress(stage, done, total)` is
    called often. Raises SourceInvalid, DatasetExists, ImportBusy or another FedRadError.
    """
    verify_plan(plan)
    mark = fingerprint(plan)
    work = work_folder(plan.directory)
    if (plan.directory / "pairs.jsonl").is_file():
        if read_card(plan.directory).get("import", {}).get("fingerprint") != mark:
            raise DatasetExists(f"{plan.directory} holds data of another import; choose another folder")
        shutil.rmtree(work, ignore_errors=True)
        return summary_of(plan.directory)
    refuse_existing(plan.directory, replace=False)
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_one(work):
        if not (work / "plan").is_file() or (work / "plan").read_text() != mark:
            _empty(work)
            write_atomic(work / "plan", mark.encode(), mode=0o600)
        staging = work / "dataset"
        staging.mkdir(exist_ok=True, mode=0o700)
        journal = Journal(work / "journal.sqlite")
        try:
            run_stages(plan, journal, read_source, staging=staging, progress=progress)
            seal(plan, journal, staging, mark=mark, progress=progress)
        finally:
            journal.close()
        shutil.rmtree(work)
    return replace(summary_of(plan.directory), done_before=False)


def preview_import(plan: ImportPlan, read_source: Reader, *, progress: Progress) -> ImportSummary:
    """Do everything but write: the summary that an import would give, with the first ten pairs."""
    verify_plan(plan)
    journal = Journal(None)
    try:
        run_stages(plan, journal, read_source, staging=None, progress=progress)
        curation = curate_journal(journal, progress=progress)
        counts = Counts()
        preview: list[dict[str, Any]] = []
        for outcome, pair in decided(journal, curation, plan):
            counts.add(outcome, pair)
            if pair is not None and len(preview) < PREVIEW:
                preview.append({**asdict(pair), "where": outcome.where})
    finally:
        journal.close()
    return counts.summary(plan.directory, done_before=False, preview=preview)


def verify_plan(plan: ImportPlan) -> None:
    """Raise SourceInvalid unless the source is a folder apart from the output."""
    if not plan.source.is_dir():
        raise SourceInvalid(f"expected a folder at {plan.source}, found none")
    source, directory = plan.source.resolve(), plan.directory.resolve()
    if directory.is_relative_to(source) or source.is_relative_to(directory):
        raise SourceInvalid(f"expected an output folder apart from the source {plan.source}")


def fingerprint(plan: ImportPlan) -> str:
    """Keyed hash of the plan and of the names, sizes and times of all source files."""
    mac = hmac.new(plan.key.derive("import fingerprint"), digestmod=hashlib.sha256)
    tables = [file_sha256(path) if path and path.is_file() else "" for path in (plan.table, plan.labels)]
    mac.update(json.dumps([settings_of(plan), tables, tool_versions()], sort_keys=True).encode())
    for path in paths.walk_files(plan.source):
        status = path.stat()
        entry = (path.relative_to(plan.source).as_posix(), status.st_size, status.st_mtime_ns)
        mac.update(json.dumps(entry).encode("utf-8", "surrogateescape"))
    return mac.hexdigest()


def settings_of(plan: ImportPlan) -> dict[str, Any]:
    """Return what of a plan decides the bytes and says nothing about patients."""
    return {
        "format": plan.format,
        "mapping": dict(plan.mapping),
        "max_side": plan.max_side,
        "bits": plan.bits,
        "keep_priors": plan.keep_priors,
        "check_writing": plan.check_writing,
        "with_dicom": plan.with_dicom,
        "check_chest": plan.check_chest,
        "recogniser": recogniser_identity(plan.recogniser) if plan.recogniser else {},
        "redaction_rules": RULES_VERSION,
        "prior_rules": PRIORS_VERSION,
    }


def work_folder(directory: Path) -> Path:
    """Return the private folder beside the output in which an import keeps its state."""
    return directory.with_name(f".{directory.name}.importing")


@contextmanager
def only_one(work: Path) -> Iterator[None]:
    """Hold the lock of a work folder; raises ImportBusy when another process has it."""
    with (work / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ImportBusy(f"another import uses {work}") from error
        yield


def run_stages(
    plan: ImportPlan,
    journal: Journal,
    read_source: Reader,
    *,
    staging: Path | None,
    progress: Progress,
) -> None:
    """Gather the studies unless that is done, then prepare those without an outcome."""
    if not journal.gathered():
        journal.gather(read_source(plan, progress))
    total = journal.count()
    if total == 0:
        raise SourceInvalid(f"expected at least one study in {plan.source}, found none")
    done = total - journal.count(open_only=True)
    recipe = Recipe(
        plan.source,
        staging,
        plan.key,
        max_side=plan.max_side,
        bits=plan.bits,
        keep_priors=plan.keep_priors,
        check_writing=plan.check_writing,
        with_dicom=plan.with_dicom,
        check_chest=plan.check_chest,
        recogniser=plan.recogniser,
    )
    batch: list[tuple[int, Prepared | Dropped]] = []
    for outcome in prepared(journal.open_studies(), recipe, workers=plan.workers):
        batch.append(outcome)
        done += 1
        if len(batch) >= _COMMIT_EVERY:
            journal.record(batch)
            batch.clear()
        progress("prepare", done, total)
    journal.record(batch)


def curate_journal(journal: Journal, *, progress: Progress) -> Curation:
    """Compare the prepared studies of a journal with each other."""
    total = journal.count()

    def studies() -> Iterator[Prepared]:
        for number, outcome in enumerate(journal.outcomes(), start=1):
            progress("compare", number, total)
            if isinstance(outcome, Prepared):
                yield outcome

    return curate(studies())


def decided(
    journal: Journal, curation: Curation, plan: ImportPlan
) -> Iterator[tuple[Prepared | Dropped, Pair | None]]:
    """Yield each study's final outcome and, where it is kept, its pair with flags in the outcome's facts."""
    split_key = plan.key.derive("split")
    for outcome in journal.outcomes():
        if isinstance(outcome, Prepared) and outcome.patient in plan.withdrawn:
            yield Dropped(outcome.where, outcome.study, Reason.WITHDRAWN), None
        elif isinstance(outcome, Prepared) and outcome.study in curation.dropped:
            yield Dropped(outcome.where, outcome.study, curation.dropped[outcome.study]), None
        elif isinstance(outcome, Dropped):
            yield outcome, None
        else:
            flags = sorted({*outcome.facts["flags"], *curation.flags[outcome.study]})
            split = split_of(curation.group[outcome.patient], key=split_key, fractions=DEFAULT_FRACTIONS)
            yield replace(outcome, facts={**outcome.facts, "flags": flags}), pair_of(outcome, split)


def pair_of(outcome: Prepared, split: Split) -> Pair:
    """Make the stored pair of a prepared study."""
    return Pair(
        patient=outcome.patient,
        study=outcome.study,
        images=outcome.images,
        view=outcome.view,
        indication=outcome.indication,
        findings=outcome.findings,
        impression=outcome.impression,
        split=split,
    )


def seal(plan: ImportPlan, journal: Journal, staging: Path, *, mark: str, progress: Progress) -> None:
    """Write drops, facts, pairs, card and checksums, and give the folder its name."""
    curation = curate_journal(journal, progress=progress)
    counts = Counts()
    kept_images: set[str] = set()
    with (staging / "drops.jsonl").open("w") as drops, (staging / "facts.jsonl").open("w") as facts:
        for outcome, pair in decided(journal, curation, plan):
            counts.add(outcome, pair)
            if isinstance(outcome, Dropped):
                drops.write(json.dumps(asdict(outcome), sort_keys=True) + "\n")
            else:
                facts.write(json.dumps({"study": outcome.study, **outcome.facts}, sort_keys=True) + "\n")
                kept_images.update(outcome.images)
    if not kept_images:
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts.dropped.most_common())
        raise DatasetInvalid(f"no study of {counts.read} could be kept: {reasons}")
    _remove_others(staging, kept_images)
    card = {
        "import": {**settings_of(plan), "fingerprint": mark},
        "split_fractions": dict(DEFAULT_FRACTIONS),
        "versions": tool_versions(),
        "leak_gate": gate(journal, curation, plan),
        **counts.card(),
    }
    write_index(
        staging / "index.parquet",
        (
            (pair, outcome.facts)
            for outcome, pair in decided(journal, curation, plan)
            if isinstance(outcome, Prepared) and pair is not None
        ),
    )
    pairs = (pair for _, pair in decided(journal, curation, plan) if pair is not None)
    seal_dataset(staging, plan.directory, pairs, card=card)


def gate(journal: Journal, curation: Curation, plan: ImportPlan) -> dict[str, Any]:
    """Measure de-identification on reports of this import; raises LeakGateFailed under the levels."""
    from itertools import islice

    reports = [
        pair.findings for _, pair in islice(decided(journal, curation, plan), 10 * SAMPLE) if pair is not None
    ]
    every = max(1, len(reports) // SAMPLE)
    score = measure_leaks(
        reports[::every][:SAMPLE],
        seed=int.from_bytes(plan.key.derive("leak gate")[:4], "big"),
        recognise=load_recogniser(plan.recogniser) if plan.recogniser else None,
    )
    verify_recall(score)
    return {
        "known_recall": score.known_recall,
        "free_recall": score.free_recall,
        "uncued_recall": score.uncued_recall,
        "planted": bucket(score.known_planted),
    }


def summary_of(directory: Path) -> ImportSummary:
    """Read the summary of a finished import back from its folder."""
    counts = Counts()
    with (directory / "drops.jsonl").open() as handle:
        for line in handle:
            counts.add(Dropped(**{**json.loads(line), "reason": Reason(json.loads(line)["reason"])}), None)
    with (directory / "facts.jsonl").open() as handle:
        for line in handle:
            counts.flags.update(json.loads(line)["flags"])
    for pair in iter_pairs(directory):
        counts.read += 1
        counts.splits[pair.split] += 1
        counts.patients.add(pair.patient)
    return counts.summary(directory, done_before=True, preview=[])


def tool_versions() -> dict[str, str]:
    """Return the versions of what decides the bytes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("fedrad", "numpy", "pillow", "pydicom", "pylibjpeg", "rapidfuzz", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "tesseract": tesseract_version()}


def _remove_others(staging: Path, kept: set[str]) -> None:
    """Delete images of dropped studies and partial files that a crash left."""
    for folder, wanted in (("images", kept), ("dicom", {dicom_name(image) for image in kept})):
        for path in paths.walk_files(staging / folder) if (staging / folder).is_dir() else ():
            if path.relative_to(staging).as_posix() not in wanted:
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()


def _empty(work: Path) -> None:
    for entry in work.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            os.unlink(entry)
