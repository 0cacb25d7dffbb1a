"""Healthchecks of the containers: does something listen where it must? Imports nothing but sockets.

    python -m deploy.docker.health tcp:127.0.0.1:9400 unix:/run/fedrad/agent.sock

Exit code 0 when every address takes a connection within 3 s, 1 with one line where one does not.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

_TIMEOUT_S = 3.0


def check(address: str) -> str:
    """Connect to `tcp:HOST:PORT` or `unix:PATH`; return what is wrong, empty where nothing is."""
    kind, _, where = address.partition(":")
    try:
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_TIMEOUT_S)
                probe.connect(where)
        elif kind == "tcp":
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_TIMEOUT_S).close()
        else:
            return f"{address}: expected tcp:HOST:PORT or unix:PATH"
    except (OSError, ValueError) as error:
        return f"{address}: {error}"
    return ""


def main(addresses: Sequence[str]) -> int:
    problems = [problem for problem in map(check, addresses) if problem]
    print("; ".join(problems) or "ok")
    return 1 if problems or not addresses else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
