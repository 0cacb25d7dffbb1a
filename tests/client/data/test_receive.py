"""The DICOM receiver: whom it admits, what it stores, and that a sender chooses no path."""

import datetime
import json
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    StorageCommitmentPushModel,
    Verification,
)

from client.data.receive import Receiver, ReceiverPlan, start_receiver, verify_plan
from client.data.sources.dicom_folder import read_dicom_folder
from client.data.sources.table import read_rows
from common.errors import ReceiverRefused
from tests.client import association_sockets  # noqa: F401  (mends pynetdicom on import)
from tests.client.data.synthetic_dicom import Planted, dataset_for

STUDY = Planted("XR1", "445566", "Brandt", "Zofia", "19500102", "20200304", "Moreau^Kenji", (), (), False, "")


def image(uid: str = "1.2.3.4") -> Dataset:
    ds = dataset_for(STUDY, np.full((64, 64), 0.5), view="PA", number=1, inverted=False)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    return ds


def plan(folder: Path, **changes: Any) -> ReceiverPlan:
    values = {
        "inbox": folder / "inbox",
        "address": "127.0.0.1",
        "port": 0,
        "ae_title": "FEDRAD",
        "senders": ("PACS",),
    }
    return ReceiverPlan(**{**values, **changes})


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    running = start_receiver(plan(tmp_path))
    yield running
    running.close()


def associate(
    port: int, *, title: str = "PACS", called: str = "FEDRAD", tls: ssl.SSLContext | None = None
) -> Any:
    entity = AE(ae_title=title)
    entity.connection_timeout = entity.acse_timeout = 5
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    entity.add_requested_context(CTImageStorage)
    entity.add_requested_context(Verification)
    return entity.associate("127.0.0.1", port, ae_title=called, tls_args=(tls, "localhost") if tls else None)


def test_allowed_sender_stores_an_image_once(tmp_path: Path, receiver: Receiver) -> None:
    link = associate(receiver.port)
    assert link.is_established
    assert link.send_c_echo().Status == 0
    assert [link.send_c_store(image()).Status for _ in range(2)] == [0, 0]
    link.release()
    files = [path for path in (tmp_path / "inbox").rglob("*") if path.is_file()]
    assert (receiver.stored, receiver.repeated, len(files)) == (1, 1, 1)
    assert pydicom.dcmread(files[0]).PatientID == "445566"
    assert "1.2.3.4" not in files[0].name
    assert (tmp_path / "inbox").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("title", "called"), [("STRANGER", "FEDRAD"), ("PACS", "OTHER")])
def test_unlisted_or_misaddressed_sender_is_rejected(receiver: Receiver, title: str, called: str) -> None:
    assert not associate(receiver.port, title=title, called=called).is_established


def test_other_kinds_of_image_are_not_accepted(receiver: Receiver) -> None:
    link = associate(receiver.port)
    assert CTImageStorage not in {context.abstract_syntax for context in link.accepted_contexts}
    link.release()


def test_full_inbox_refuses(tmp_path: Path) -> None:
    running = start_receiver(plan(tmp_path, max_instances=1))
    link = associate(running.port)
    assert [link.send_c_store(image(uid)).Status for uid in ("1.2.1", "1.2.2")] == [0, 0xA700]
    link.release()
    running.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"senders": ()},
        {"senders": ("A" * 17,)},
        {"address": "0.0.0.0"},  # noqa: S104
        {"certificate": Path("only.pem")},
    ],
)
def test_unsafe_plan_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ReceiverRefused):
        verify_plan(plan(tmp_path, **changes))


def certificate(folder: Path, name: str, authority: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """Issue a P-256 certificate, self-signed without an authority, and write both PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    issued = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority[0].subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(authority[1] if authority else key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(issued.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return issued, key


def client_context(folder: Path, name: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if name:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


def is_turned_away(port: int, context: ssl.SSLContext) -> bool:
    """Tell whether the server ends the TLS handshake, or the line right after it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as line:
                line.settimeout(2)
                return line.recv(1) == b""
        except TimeoutError:
            return False
        except (ssl.SSLError, ConnectionError):
            return True


def test_only_certified_senders_get_through_tls(tmp_path: Path) -> None:
    authority = certificate(tmp_path, "ca", None)
    certificate(tmp_path, "site", authority)
    certificate(tmp_path, "pacs", authority)
    certificate(tmp_path, "rogue", None)
    files = {
        "certificate": tmp_path / "site.pem",
        "private_key": tmp_path / "site.key",
        "authority": tmp_path / "ca.pem",
    }
    running = start_receiver(plan(tmp_path, **files))
    link = associate(running.port, tls=client_context(tmp_path, "pacs"))
    assert link.is_established and link.send_c_store(image()).Status == 0
    link.release()
    assert is_turned_away(running.port, client_context(tmp_path, "rogue"))
    assert is_turned_away(running.port, client_context(tmp_path, None))
    assert not is_turned_away(running.port, client_context(tmp_path, "pacs"))
    running.close()


def asked_for(*uids: str) -> Dataset:
    """Build the request of a storage commitment for DX instances."""
    request = Dataset()
    request.TransactionUID = "1.2.3.99"
    request.ReferencedSOPSequence = []
    for uid in uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = (
            DigitalXRayImageStorageForPresentation,
            uid,
        )
        request.ReferencedSOPSequence.append(item)
    return request


@pytest.mark.parametrize(("uids", "kind", "failed"), [(["1.2.1"], 1, []), (["1.2.1", "1.2.2"], 2, ["1.2.2"])])
def test_commitment_names_what_is_stored_and_what_is_not(
    receiver: Receiver, uids: list[str], kind: int, failed: list[str]
) -> None:
    reported: queue.Queue[tuple[int, Dataset]] = queue.Queue()

    def note(event: Any) -> tuple[int, None]:
        reported.put((event.request.EventTypeID, event.event_information))
        return 0, None

    entity = AE(ae_title="PACS")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation)
    entity.add_requested_context(StorageCommitmentPushModel)
    link = entity.associate(
        "127.0.0.1", receiver.port, ae_title="FEDRAD", evt_handlers=[(evt.EVT_N_EVENT_REPORT, note)]
    )
    assert link.send_c_store(image("1.2.1")).Status == 0
    status, _ = link.send_n_action(asked_for(*uids), 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1")
    assert status.Status == 0
    seen, report = reported.get(timeout=60)
    assert seen == kind
    assert report.TransactionUID == "1.2.3.99"
    assert [item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence] == ["1.2.1"]
    assert [item.ReferencedSOPInstanceUID for item in report.get("FailedSOPSequence", [])] == failed
    empty, _ = link.send_n_action(asked_for(), 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1")
    assert empty.Status == 0x0115
    link.release()


def test_endless_instance_ends_its_association(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.data.receive.MAX_INSTANCE_BYTES", 20_000)
    monkeypatch.setattr("client.data.receive.MAX_OVERRUN_BYTES", 50_000)
    link = associate(receiver.port)
    large = dataset_for(STUDY, np.full((256, 256), 0.5), view="PA", number=1, inverted=False)
    assert "Status" not in link.send_c_store(large)
    link.join(timeout=120)
    assert not link.is_established
    assert (receiver.stored, receiver.refused) == (0, 1)
    link = associate(receiver.port)
    medium = dataset_for(STUDY, np.full((128, 128), 0.5), view="PA", number=2, inverted=False)
    assert link.send_c_store(medium).Status == 0xA700
    assert link.send_c_store(image()).Status == 0
    link.release()
    assert [path.suffix for path in (tmp_path / "inbox").rglob("*") if path.is_file()] == [".dcm"]


def receive_process(inbox: Path) -> tuple[Any, int]:
    """Start the command and return its process and port."""
    start = [sys.executable, "-m", "client.data.cli", "receive", "--out", str(inbox), "--allow", "PACS"]
    process = subprocess.Popen(
        [*start, "--port", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    return process, int(process.stderr.readline().split(":")[1].split(" ")[0])


def test_acknowledged_images_survive_kill_9_and_the_rest_is_sent_again(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    process, port = receive_process(inbox)
    images = [image(f"1.2.{number}") for number in range(40)]
    acknowledged: list[str] = []

    def send_all(to: int) -> None:
        link = associate(to)
        for one in images:
            try:
                status = link.send_c_store(one)
            except RuntimeError:
                break
            if "Status" in status and status.Status == 0:
                acknowledged.append(one.SOPInstanceUID)
        if link.is_established:
            link.release()
        else:
            link.abort()
        link.join(timeout=30)

    sender = threading.Thread(target=send_all, args=(port,))
    sender.start()
    limit = time.monotonic() + 120
    while len(acknowledged) < 5 and time.monotonic() < limit:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    sender.join()
    stored = {pydicom.dcmread(path).SOPInstanceUID for path in inbox.rglob("*.dcm")}
    assert 5 <= len(acknowledged) < 40
    assert set(acknowledged) <= stored
    # What a kill in the middle of a file leaves is no image to the import; the next start removes it.
    whole = next(inbox.rglob("*.dcm"))
    (whole.parent / f".{whole.name}.1.partial").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "reports.csv").write_text("accession,report\nXR1,FINDINGS: Clear lungs.\n")
    rows = read_rows(tmp_path / "reports.csv", required=("study",))
    studies = list(read_dicom_folder(inbox, rows=rows))
    assert [len(study.images) for study in studies] == [len(stored)]
    process, port = receive_process(inbox)
    acknowledged.clear()
    send_all(port)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert len(acknowledged) == 40
    assert len(list(inbox.rglob("*.dcm"))) == 40
    assert list(inbox.rglob(".*.partial")) == []


def test_command_ends_on_sigterm_with_its_counts(tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "client.data.cli",
        "receive",
        "--out",
        str(tmp_path / "inbox"),
        "--allow",
        "PACS",
    ]
    process = subprocess.Popen(
        [*arguments, "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    link = associate(int(line.split(":")[1].split(" ")[0]))
    assert link.send_c_store(image()).Status == 0
    link.release()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert json.loads(output) == {"stored": 1, "repeated": 0, "refused": 0}
    assert process.returncode == 0
