"""The name in a client's certificate, handed from the TLS connection to the request.

uvicorn verifies the certificate against the CA; ASGI has no agreed place for its name, so it goes into the
connection's `state`, which no request header can reach.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,63}")


class CertificateProtocol(H11Protocol):
    """HTTP/1.1 that knows the common name of its client's certificate."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        secured = transport.get_extra_info("ssl_object")
        certificate = secured.getpeercert() if secured is not None else None
        self.app_state = {**self.app_state, "certificate_user": common_name(certificate)}


def common_name(certificate: Any) -> str:
    """Return a verified certificate's common name where it could be a user's, '' otherwise."""
    for part in (certificate or {}).get("subject", ()):
        for key, value in part:
            if key == "commonName" and _NAME.fullmatch(value):
                return str(value)
    return ""
