"""The other sides of the PACS loop in tests: an archive that takes reports, a modality that sends images."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    DigitalXRayImageStorageForPresentation,
    EnhancedSRStorage,
    Verification,
)

from client.data.receive import ReceiverPlan
from client.pacs.config import Destination, FhirTarget, PacsConfig, Retry
from client.pacs.loop import Written
from client.serving.engine import ModelVersion
from common.model import phantoms
from tests.client import association_sockets  # noqa: F401  (mends pynetdicom on import)
from tests.client.data.synthetic_dicom import Planted, dataset_for

VERSION = ModelVersion(
    version=3,
    study="5" * 64,
    study_id="demo",
    round=20,
    adapter_sha256="a" * 64,
    base="tiny",
    mode="consortium",
    release_epsilon=4.5,
    delta=1e-5,
    protected=True,
)
SENTENCES = ("Small left pleural effusion.", "No pneumothorax.")


def chest(number: int, **header: str) -> Dataset:
    """One synthetic DX image of a phantom; every number is another patient and study."""
    rng = np.random.default_rng(number)
    findings = (phantoms.Finding("Pleural Effusion", "left", "large"),) if number % 2 else ()
    picture = phantoms.expose(phantoms.render(findings, rng), phantoms.Scanner(), rng) / 255
    planted = Planted(
        f"XR{number}",
        f"{445566 + number}",
        "Brandt",
        "Zofia",
        "19500102",
        "20200304",
        "M^K",
        (),
        (),
        False,
        "",
    )
    dataset = dataset_for(planted, picture, view="PA", number=number, inverted=False)
    dataset.ReasonForTheRequestedProcedure = "Cough."
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    return dataset


def chest_bytes(number: int, **header: str) -> bytes:
    stream = io.BytesIO()
    chest(number, **header).save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def drafter(data: bytes, indication: str) -> Written:
    """Draft without a model; the draft's id follows from the image, as a fresh draft's would not."""
    uid = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).SOPInstanceUID
    return Written(f"{abs(hash(str(uid))):032x}"[:32], VERSION, SENTENCES)


@dataclass
class Archive:
    """A storage SCP that keeps what it got; `answers` are the next statuses, then success."""

    port: int = 0
    got: list[Dataset] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def archive(*, port: int = 0, tls: Any = None, answers: tuple[int, ...] = ()) -> Iterator[Archive]:
    """Run an archive on loopback."""
    kept = Archive(answers=list(answers))

    def store(event: Any) -> int:
        with kept.lock:
            if kept.answers:
                status = kept.answers.pop(0)
                if status:
                    return status
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            kept.got.append(dataset)
        return 0

    entity = AE(ae_title="ARCHIVE")
    entity.add_supported_context(EnhancedSRStorage)
    entity.add_supported_context(Verification)
    server = entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)], ssl_context=tls
    )
    assert server is not None
    kept.port = server.server_address[1]
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()


def config(
    folder: Path,
    *,
    archive_port: int | None = None,
    fhir: Path | None = None,
    listen_port: int = 0,
    retry: Retry | None = None,
) -> PacsConfig:
    """A configuration on loopback."""
    return PacsConfig(
        directory=folder,
        listen=ReceiverPlan(folder / "inbox", "127.0.0.1", listen_port, "FEDRAD", ("PACS",)),
        destination=None if archive_port is None else Destination("ARCHIVE", "127.0.0.1", archive_port, None),
        fhir=None if fhir is None else FhirTarget(fhir, "", None),
        retry=retry or Retry(first_s=0.05, most_s=0.2, attempts=50),
        institution="",
        keep_days=30,
    )


def send(port: int, *datasets: Dataset) -> list[int]:
    """Send images by C-STORE as the PACS; returns the statuses."""
    entity = AE(ae_title="PACS")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    link = entity.associate("127.0.0.1", port, ae_title="FEDRAD")
    assert link.is_established
    statuses = [link.send_c_store(dataset).Status for dataset in datasets]
    link.release()
    return statuses
