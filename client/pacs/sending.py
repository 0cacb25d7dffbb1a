"""One attempt to deliver: a structured report by C-STORE, a DiagnosticReport to a folder or a FHIR server.

An attempt ends well, raises `DeliveryFailed` (worth another attempt) or `DeliveryRefused` (never). Messages
name the node and the status, nothing of the patient.
"""

from __future__ import annotations

import io
import ssl
from pathlib import Path
from typing import Any

from client.pacs.config import Destination, FhirTarget, TlsFiles
from client.pacs.diagnostic_report import identifier_of
from common.errors import DeliveryFailed, DeliveryRefused, DestinationUnreachable
from common.files import write_atomic

TIMEOUT_S = 30.0


def store_report(report: bytes, destination: Destination, *, calling: str) -> None:
    """Send a structured report by C-STORE; raises DeliveryFailed or DeliveryRefused."""
    import pydicom
    from pynetdicom.sop_class import EnhancedSRStorage

    dataset = pydicom.dcmread(io.BytesIO(report))
    link = _associate(destination, calling, EnhancedSRStorage)
    try:
        status = link.send_c_store(dataset).get("Status")
    except (ValueError, RuntimeError) as error:
        raise DeliveryFailed(
            f"{destination.ae_title}: the association broke ({type(error).__name__})"
        ) from error
    finally:
        link.release()
    if status is None:
        raise DeliveryFailed(f"{destination.ae_title}: no answer to C-STORE")
    if status == 0x0000 or 0xB000 <= status <= 0xBFFF:
        return
    if 0xA700 <= status <= 0xA7FF or status == 0x0213:
        raise DeliveryFailed(f"{destination.ae_title}: out of resources (status {status:04X})")
    raise DeliveryRefused(f"{destination.ae_title}: refused the report (status {status:04X})")


def echo(destination: Destination, *, calling: str) -> None:
    """Ask a node whether it is there (C-ECHO); raises DestinationUnreachable."""
    from pynetdicom.sop_class import Verification

    try:
        link = _associate(destination, calling, Verification)
        status = link.send_c_echo().get("Status")
        link.release()
    except (DeliveryFailed, ValueError, RuntimeError) as error:
        raise DestinationUnreachable(str(error)) from error
    if status != 0x0000:
        raise DestinationUnreachable(f"{destination.ae_title}: no answer to C-ECHO")


def post_report(report: bytes, target: FhirTarget, *, name: str) -> None:
    """Write a DiagnosticReport to the folder, or create it at the server unless it is there.

    Raises DeliveryFailed or DeliveryRefused.
    """
    if target.directory is not None:
        try:
            write_atomic(target.directory / f"DiagnosticReport-{name}.json", report, mode=0o600)
        except OSError as error:
            raise DeliveryFailed(f"{target.directory}: {error.strerror}") from error
        return
    import httpx

    headers = {
        "Content-Type": "application/fhir+json",
        "Accept": "application/fhir+json",
        "If-None-Exist": f"identifier={identifier_of(report)}",
    }
    if target.token_file is not None:
        headers["Authorization"] = f"Bearer {_token(target.token_file)}"
    try:
        response = httpx.post(
            f"{target.url}/DiagnosticReport",
            content=report,
            headers=headers,
            timeout=TIMEOUT_S,
            trust_env=False,
        )
    except httpx.HTTPError as error:
        raise DeliveryFailed(f"{target.url}: {type(error).__name__}") from error
    if response.is_success:
        return
    if response.status_code in (401, 403, 408, 409, 429) or response.status_code >= 500:
        raise DeliveryFailed(f"{target.url}: status {response.status_code}")
    raise DeliveryRefused(f"{target.url}: refused the report (status {response.status_code})")


def tls_client(files: TlsFiles) -> ssl.SSLContext:
    """Build a context that shows our certificate and believes the authority; raises DeliveryFailed."""
    try:
        context = ssl.create_default_context(cafile=files.authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files.certificate, files.private_key)
    except (OSError, ssl.SSLError) as error:
        raise DeliveryFailed(f"cannot use the TLS files: {error}") from error
    return context


def _associate(destination: Destination, calling: str, sop_class: Any) -> Any:
    from pydicom import uid
    from pynetdicom import AE

    entity = AE(ae_title=calling)
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = (
        TIMEOUT_S
    )
    entity.add_requested_context(sop_class, [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
    tls = (tls_client(destination.tls), destination.address) if destination.tls else None
    link = entity.associate(
        destination.address, destination.port, ae_title=destination.ae_title, tls_args=tls
    )
    if not link.is_established:
        why = "rejected the association" if link.is_rejected else "cannot be reached, or takes no such object"
        raise DeliveryFailed(f"{destination.ae_title} at {destination.address}:{destination.port}: {why}")
    return link


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise DeliveryFailed(f"{path}: expected the FHIR server's token, got none") from error
