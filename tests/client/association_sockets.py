"""pynetdicom closes the socket of an association also where the other side is gone first.

`AssociationSocket._shutdown_socket` of pynetdicom 3.0 calls `shutdown` and `close` in one `try`; on a
connection that the peer has ended, `shutdown` raises and `close` is never reached. The collector closes the
socket later, with a ResourceWarning in whatever test is running then. Importing this module mends that for
the test process.
"""

from __future__ import annotations

import contextlib
import socket

from pynetdicom.transport import AssociationSocket


def _shutdown_and_close(self: AssociationSocket) -> None:
    if self.socket is None:
        return
    with contextlib.suppress(OSError):
        self.socket.shutdown(socket.SHUT_RDWR)
    self.socket.close()


AssociationSocket._shutdown_socket = _shutdown_and_close  # type: ignore[method-assign]
