"""Readers of what hospitals have: each yields `SourceStudy` in a fixed order and reads no pixels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.data.importing import ImportPlan, Progress, Reader
    from client.data.study import SourceStudy

FORMATS = ("table", "dicom+table", "dicomdir", "mimic-cxr-jpg", "padchest", "openi-xml", "fhir-ndjson")


def guess_format(source: Path) -> str:
    """Guess the format of a folder from the files that only one format has."""
    from client.data.dicom import is_dicom
    from client.data.sources.paths import walk_files

    for pattern, name in (
        ("DICOMDIR", "dicomdir"),
        ("mimic-cxr-*-metadata.csv*", "mimic-cxr-jpg"),
        ("PADCHEST_*.csv*", "padchest"),
        ("indiana_projections.csv", "openi-xml"),
        ("*.ndjson*", "fhir-ndjson"),
    ):
        if any(source.glob(pattern)):
            return name
    return "dicom+table" if any(is_dicom(path) for path in islice(walk_files(source), 200)) else "table"


def reader_of(name: str) -> Reader:
    """Return the reader of a format."""

    def read(plan: ImportPlan, progress: Progress) -> Iterator[SourceStudy]:
        from client.data.labels import with_labels
        from client.data.sources.mimic import label_table

        labels = plan.labels or (label_table(plan.source) if name == "mimic-cxr-jpg" else None)
        return with_labels(studies(plan, progress), labels)

    def studies(plan: ImportPlan, progress: Progress) -> Iterator[SourceStudy]:
        from client.data.sources import dicom_folder, fhir, mimic, openi, padchest, table

        if name == "table":
            return table.read_table(plan.source, table=plan.table, mapping=plan.mapping)
        if name == "mimic-cxr-jpg":
            return mimic.read_mimic(plan.source)
        if name == "padchest":
            return padchest.read_padchest(plan.source)
        if name == "openi-xml":
            return openi.read_openi(plan.source)
        if name == "fhir-ndjson":
            rows = fhir.read_fhir_rows(plan.source)
            return dicom_folder.read_dicom_folder(plan.source, rows=rows, progress=progress)
        rows = dicom_folder.report_rows(plan.source, table=plan.table, mapping=plan.mapping)
        files = dicom_folder.dicomdir_files(plan.source) if name == "dicomdir" else None
        return dicom_folder.read_dicom_folder(plan.source, rows=rows, files=files, progress=progress)

    return read
