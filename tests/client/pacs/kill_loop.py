"""A PACS loop in a process of its own, to be killed: arguments FOLDER PORT ARCHIVE_PORT."""

import signal
import sys
import time
from pathlib import Path

from client.pacs.config import Retry
from client.pacs.loop import PacsLoop, Written
from tests.client.pacs.nodes import config, drafter


def slow(data: bytes, indication: str) -> Written:
    time.sleep(0.05)
    return drafter(data, indication)


if __name__ == "__main__":
    folder, port, archive_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    settings = config(
        folder / "p",
        archive_port=archive_port,
        fhir=folder / "fhir",
        listen_port=port,
        retry=Retry(first_s=0.05, most_s=0.1, attempts=1000),
    )
    loop = PacsLoop(settings, slow)
    loop.start()
    print("ready", flush=True)
    signal.pause()
