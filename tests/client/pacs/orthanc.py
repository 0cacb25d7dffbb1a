"""Debian's Orthanc on loopback, in a folder of its own: the PACS of the end-to-end tests."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.client.serving.page.running import until

PROGRAM = shutil.which("Orthanc") or ("/usr/sbin/Orthanc" if Path("/usr/sbin/Orthanc").exists() else None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc: its DICOM port and its REST client."""

    dicom_port: int
    rest: httpx.Client

    def get(self, path: str) -> Any:
        return self.rest.get(path).raise_for_status().json()

    def instances(self, modality: str) -> list[dict[str, Any]]:
        """The simplified tags of every instance of a modality."""
        found = [self.get(f"/instances/{id}/simplified-tags") for id in self.get("/instances")]
        return [tags for tags in found if tags.get("Modality") == modality]


@contextmanager
def orthanc(folder: Path, *, dicom_port: int, fedrad_port: int) -> Iterator[Orthanc]:
    """Run Orthanc with AE title ORTHANC over `folder`; it knows FEDRAD as a modality."""
    assert PROGRAM is not None
    folder.mkdir(exist_ok=True)
    http_port = free_port()
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "Plugins": [],
        "HttpPort": http_port,
        "DicomPort": dicom_port,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": False,
        "DicomCheckModalityHost": True,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomModalities": {"fedrad": ["FEDRAD", "127.0.0.1", fedrad_port]},
        "JobsHistorySize": 10,
        "SaveJobs": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = (folder / "orthanc.log").open("ab")
    process = subprocess.Popen([PROGRAM, str(folder / "orthanc.json")], stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=60, trust_env=False) as rest:

        def there() -> bool:
            assert process.poll() is None, (folder / "orthanc.log").read_text()[-2000:]
            try:
                return rest.get("/system").is_success
            except httpx.HTTPError:
                return False

        try:
            until(there, within_s=60)
            yield Orthanc(dicom_port, rest)
        finally:
            process.terminate()
            process.wait(30)
            log.close()
