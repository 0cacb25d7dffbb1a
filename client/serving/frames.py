"""Messages between the front and an engine's worker process: a JSON head and bytes, with both lengths before.

Guarantees: no object is ever unpickled; lengths are capped before anything is read.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

from common.errors import BodyTooLarge, EngineFailed

_LENGTHS = struct.Struct(">II")
_MAX_HEAD = 4 << 20
_MAX_BODY = 256 << 20

Message = tuple[dict[str, Any], bytes]


def format_frame(head: dict[str, Any], body: bytes = b"") -> bytes:
    """Encode one message; NaN and infinity become null."""
    encoded = json.dumps(_finite(head), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(encoded), len(body)) + encoded + body


def read_frame(connection: socket.socket) -> Message | None:
    """Read one message from a blocking socket; None at its end. Raises BodyTooLarge or EngineFailed."""
    lengths = _read_exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    head, body = _verified(*_LENGTHS.unpack(lengths))
    data = _read_exactly(connection, head + body)
    return None if data is None else (_parse_head(data[:head]), data[head:])


async def receive_frame(reader: asyncio.StreamReader) -> Message | None:
    """Read one message from a stream; None at its end. Raises BodyTooLarge or EngineFailed."""
    try:
        head, body = _verified(*_LENGTHS.unpack(await reader.readexactly(_LENGTHS.size)))
        encoded = await reader.readexactly(head)
        return _parse_head(encoded), await reader.readexactly(body)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _verified(head: int, body: int) -> tuple[int, int]:
    if head > _MAX_HEAD or body > _MAX_BODY:
        raise BodyTooLarge(f"expected a message of at most {_MAX_HEAD} and {_MAX_BODY} bytes, got more")
    return head, body


def _parse_head(encoded: bytes) -> dict[str, Any]:
    try:
        value = json.loads(encoded)
    except ValueError as error:
        raise EngineFailed("expected a message's JSON head, got something else") from error
    if not isinstance(value, dict):
        raise EngineFailed("expected a message's head as an object, got something else")
    return value


def _read_exactly(connection: socket.socket, many: int) -> bytes | None:
    data = bytearray(many)
    view, got = memoryview(data), 0
    while got < many:
        try:
            read = connection.recv_into(view[got:])
        except ConnectionError:
            return None
        if not read:
            return None
        got += read
    return bytes(data)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
