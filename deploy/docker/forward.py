"""A loopback port whose connections go to one other address: how the relay's container reaches the gateway.

The relay speaks to 127.0.0.1 only. In compose its network holds nothing but this forwarder, and the network
that the forwarder shares with the gateway leads nowhere else, so the relay has one way: to the gateway.
It reads nothing of what passes; a side that ends its half leaves the other half open, as TCP does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import Sequence

_PIECE = 256 << 10
_CONNECT_S = 20.0


async def forward(
    listen: tuple[str, int], to: tuple[str, int], *, stop: asyncio.Event, ready: asyncio.Event
) -> int:
    """Carry connections until `stop`; returns how many were carried. `ready` is set once it listens."""
    carried = 0

    async def carry(near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        nonlocal carried
        try:
            far_in, far_out = await asyncio.wait_for(asyncio.open_connection(*to), _CONNECT_S)
        except (OSError, TimeoutError):
            near_out.close()
            return
        carried += 1
        await asyncio.gather(_pump(near_in, far_out), _pump(far_in, near_out))
        for writer in (far_out, near_out):
            writer.close()

    server = await asyncio.start_server(carry, *listen)
    ready.set()
    async with server:
        await stop.wait()
    return carried


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(_PIECE):
            target.write(data)
            await target.drain()
    with contextlib.suppress(OSError, RuntimeError):
        target.write_eof()  # the other direction may go on


def parse_address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT; raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not 0 < int(port) < 65536:
        raise ValueError(f"expected HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)


async def _run(listen: tuple[str, int], to: tuple[str, int]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await forward(listen, to, stop=stop, ready=asyncio.Event())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--listen", type=parse_address, required=True, help="HOST:PORT")
    parser.add_argument("--to", type=parse_address, required=True, help="HOST:PORT")
    given = parser.parse_args(arguments)
    asyncio.run(_run(given.listen, given.to))


if __name__ == "__main__":
    main()
