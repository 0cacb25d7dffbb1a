"""A DICOM C-STORE receiver: the other way in, for a PACS that sends instead of exporting.

Guarantees: only listed AE titles over mutual TLS (or plain on loopback, when told); only CR and DX images
and C-ECHO; a file appears whole, under a name made from the hash of its UID, so a sender chooses no path;
the same instance twice is stored once; success is answered when the file would survive a power cut, and
storage commitment (asked for and reported on the same association) says so again for files that are there;
an endless instance ends its association. It does not de-identify: the inbox holds identified images and is
mode 0700; import it, then delete it. It is the only part of the data side that opens a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ReceiverRefused
from common.files import write_atomic

MAX_INSTANCE_BYTES, MAX_OVERRUN_BYTES = 256 << 20, 1 << 20
MAX_COMMITMENT = 10_000
SUCCESS, REFUSED_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
NO_SUCH_INSTANCE, INVALID_ARGUMENT = 0x0112, 0x0115
ALL_COMMITTED, SOME_FAILED = 1, 2
_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"


@dataclass(frozen=True, slots=True)
class ReceiverPlan:
    """Where to listen, whom to admit, and where to store."""

    inbox: Path
    address: str
    port: int
    ae_title: str
    senders: tuple[str, ...]
    certificate: Path | None = None
    private_key: Path | None = None
    authority: Path | None = None
    max_instances: int = 1_000_000


@dataclass(slots=True)
class Receiver:
    """A running receiver; `close` ends it."""

    server: Any
    port: int
    stored: int = 0
    repeated: int = 0
    refused: int = 0
    _arriving: dict[Any, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Stop listening and end open associations."""
        self.server.shutdown()
        self.server.server_close()


def verify_plan(plan: ReceiverPlan) -> None:
    """Raise ReceiverRefused unless senders are listed and the line is TLS or loopback."""
    if not plan.senders or any(not 1 <= len(title.strip()) <= 16 for title in (*plan.senders, plan.ae_title)):
        raise ReceiverRefused("expected at least one sender and AE titles of 1 to 16 characters")
    files = (plan.certificate, plan.private_key, plan.authority)
    if any(files) and not all(files):
        raise ReceiverRefused("expected certificate, private key and authority together, got some of them")
    if not any(files) and not ipaddress.ip_address(plan.address).is_loopback:
        raise ReceiverRefused(
            f"expected TLS files for {plan.address}; without TLS only a loopback address is served"
        )


def start_receiver(plan: ReceiverPlan, *, stored: Callable[[], None] = lambda: None) -> Receiver:
    """Start to listen in a thread and return the receiver; raises ReceiverRefused.

    `stored` is called, from the receiver's threads, after each image that is new.
    """
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import (
        ComputedRadiographyImageStorage,
        DigitalXRayImageStorageForPresentation,
        StorageCommitmentPushModel,
        Verification,
    )

    verify_plan(plan)
    plan.inbox.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in plan.inbox.glob("*/.*.partial"):
        left.unlink()
    entity = AE(ae_title=plan.ae_title)
    entity.require_called_aet = True
    entity.require_calling_aet = list(plan.senders)
    entity.maximum_associations = 4
    entity.network_timeout = entity.dimse_timeout = entity.acse_timeout = 60
    entity.add_supported_context(Verification)
    entity.add_supported_context(StorageCommitmentPushModel)
    for storage in (ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation):
        entity.add_supported_context(storage, _syntaxes())
    receiver = Receiver(server=None, port=0)
    try:
        receiver.server = entity.start_server(
            (plan.address, plan.port),
            block=False,
            ssl_context=_tls(plan),
            evt_handlers=[
                (evt.EVT_C_STORE, lambda event: _store(event, plan, receiver, stored)),
                (evt.EVT_N_ACTION, lambda event: _commit(event, plan)),
                (evt.EVT_PDU_RECV, lambda event: _count(event, receiver)),
                (evt.EVT_CONN_CLOSE, lambda event: receiver._arriving.pop(event.assoc, None)),
            ],
        )
    except OSError as error:
        raise ReceiverRefused(f"cannot listen on {plan.address}:{plan.port}: {error.strerror}") from error
    receiver.port = receiver.server.server_address[1]
    return receiver


def _store(event: Any, plan: ReceiverPlan, receiver: Receiver, stored: Callable[[], None]) -> int:
    path = _path_of(str(event.request.AffectedSOPInstanceUID), plan)
    receiver._arriving.pop(event.assoc, None)
    with receiver._lock:
        if path.exists():
            receiver.repeated += 1
            return SUCCESS
        if (
            receiver.stored >= plan.max_instances
            or event.request.DataSet.getbuffer().nbytes > MAX_INSTANCE_BYTES
        ):
            receiver.refused += 1
            return REFUSED_RESOURCES
        try:
            write_atomic(path, event.encoded_dataset(), mode=0o600)
        except OSError:
            receiver.refused += 1
            return REFUSED_RESOURCES
        except (ValueError, AttributeError):
            receiver.refused += 1
            return NOT_UNDERSTOOD
        receiver.stored += 1
    stored()
    return SUCCESS


def _path_of(uid: str, plan: ReceiverPlan) -> Path:
    name = hashlib.sha256(uid.encode()).hexdigest()
    return plan.inbox / name[:2] / f"{name[:40]}.dcm"


def _count(event: Any, receiver: Receiver) -> None:
    """Count what an association has sent since its last instance, and end it when that has no end."""
    from pynetdicom.pdu import P_DATA_TF

    if not isinstance(event.pdu, P_DATA_TF):
        return
    before, most = receiver._arriving.get(event.assoc, 0), MAX_INSTANCE_BYTES + MAX_OVERRUN_BYTES
    receiver._arriving[event.assoc] = before + event.pdu.pdu_length
    if before <= most < before + event.pdu.pdu_length:
        receiver.refused += 1
        event.assoc.abort()


def _commit(event: Any, plan: ReceiverPlan) -> tuple[int, None]:
    """Answer a storage commitment request (PS3.4 J.3) and report what is stored, on the same association."""
    from pynetdicom.sop_class import StorageCommitmentPushModel

    try:
        asked = list(event.action_information.ReferencedSOPSequence)
        transaction = event.action_information.TransactionUID
        names = [(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in asked]
    except (AttributeError, ValueError):
        return INVALID_ARGUMENT, None
    if event.request.ActionTypeID != 1 or not 1 <= len(names) <= MAX_COMMITMENT:
        return INVALID_ARGUMENT, None
    report, kind = commitment_report(names, transaction, plan)

    def send() -> None:
        # The association may be gone before the report: the sender asks again.
        with contextlib.suppress(RuntimeError, ValueError):
            event.assoc.send_n_event_report(report, kind, StorageCommitmentPushModel, _COMMITMENT_INSTANCE)

    threading.Thread(target=send, daemon=True).start()
    return SUCCESS, None


def commitment_report(names: list[tuple[str, str]], transaction: str, plan: ReceiverPlan) -> tuple[Any, int]:
    """Return the report on (class, instance) UIDs and its type: all committed, or some not here."""
    from pydicom.dataset import Dataset

    def items(chosen: list[tuple[str, str]], *, reason: int | None) -> list[Any]:
        found = []
        for sop_class, instance in chosen:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
            if reason is not None:
                item.FailureReason = reason
            found.append(item)
        return found

    stored = [name for name in names if _path_of(name[1], plan).is_file()]
    missing = [name for name in names if name not in stored]
    report = Dataset()
    report.TransactionUID = transaction
    if stored:
        report.ReferencedSOPSequence = items(stored, reason=None)
    if missing:
        report.FailedSOPSequence = items(missing, reason=NO_SUCH_INSTANCE)
    return report, SOME_FAILED if missing else ALL_COMMITTED


def _tls(plan: ReceiverPlan) -> ssl.SSLContext | None:
    if plan.certificate is None or plan.private_key is None or plan.authority is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(plan.certificate, plan.private_key)
        context.load_verify_locations(plan.authority)
    except (OSError, ssl.SSLError) as error:
        raise ReceiverRefused(f"cannot use the TLS files: {error}") from error
    return context


def _syntaxes() -> list[str]:
    from pydicom import uid

    return [
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.JPEGLosslessSV1,
        uid.JPEGLSLossless,
        uid.JPEG2000Lossless,
        uid.JPEG2000,
        uid.RLELossless,
    ]
