"""End to end with Orthanc: image, C-STORE, draft, SR in the same study, FHIR, the reader's worklist."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from fhir.resources.R4B.diagnosticreport import DiagnosticReport

from client.pacs.jobs import JobQueue
from tests.client.pacs.nodes import chest, chest_bytes
from tests.client.pacs.orthanc import PROGRAM, free_port, orthanc
from tests.client.serving.page.running import running_page, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="Debian's orthanc is not installed"),
    pytest.mark.filterwarnings("ignore:.*socket.*:pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = """
directory = "pacs"
[listen]
ae_title = "FEDRAD"
port = {listen}
senders = ["ORTHANC"]
[destination]
ae_title = "ORTHANC"
address = "127.0.0.1"
port = {orthanc}
[fhir]
directory = "fhir"
[retry]
first_s = 0.2
most_s = 0.5
"""


def test_image_sent_by_orthanc_comes_back_as_a_preliminary_report(tmp_path: Path) -> None:
    listen, dicom = free_port(), free_port()
    (tmp_path / "pacs.toml").write_text(CONFIG.format(listen=listen, orthanc=dicom))
    queue = tmp_path / "pacs"
    image = chest(31)
    with (
        orthanc(tmp_path / "orthanc", dicom_port=dicom, fedrad_port=listen) as archive,
        running_page(tmp_path, pacs=tmp_path / "pacs.toml") as page,
    ):
        stored = archive.rest.post("/instances", content=chest_bytes(31)).raise_for_status().json()["ID"]
        archive.rest.post("/modalities/fedrad/store", content=stored).raise_for_status()
        (report,) = until(lambda: archive.instances("SR"))
        assert report["StudyInstanceUID"] == image.StudyInstanceUID
        assert report["SeriesInstanceUID"] != image.SeriesInstanceUID
        assert (report["CompletionFlag"], report["VerificationFlag"]) == ("PARTIAL", "UNVERIFIED")
        assert report["PreliminaryFlag"] == "PRELIMINARY"
        assert (report["PatientID"], report["AccessionNumber"]) == (image.PatientID, "XR31")
        (study,) = archive.get("/studies")
        assert len(archive.get(f"/studies/{study}/series")) == 2
        text = json.dumps(report)
        assert "round=19" in text and "release-epsilon=8" in text and "release=3" in text

        until(lambda: list((queue / "done").glob("*.json")))
        (resource,) = (tmp_path / "fhir").iterdir()
        value = json.loads(resource.read_bytes())
        DiagnosticReport.model_validate(value)
        assert value["status"] == "preliminary"
        assert value["imagingStudy"][0]["identifier"]["value"] == f"urn:oid:{image.StudyInstanceUID}"
        assert all(sentence in text for sentence in value["conclusion"].split(". ")[:1])

        api = f"{page.url}/page/api"
        (case,) = httpx.get(f"{api}/cases", trust_env=False).json()["cases"]
        assert (case["source"], case["state"]) == ("pacs", "drafted")
        whole = httpx.get(f"{api}/cases/{case['id']}", trust_env=False).json()
        assert whole["draft"]["text"] == value["conclusion"]
        assert httpx.get(f"{api}/cases/{case['id']}/grounding", trust_env=False).json()["tokens"] > 0

        archive.rest.post("/modalities/fedrad/store", content=stored).raise_for_status()
        until(lambda: not any(path.is_file() for path in (queue / "inbox").rglob("*")))
        assert len(archive.instances("SR")) == 1
    assert [record.action.value for record in page.log.records()] == ["draft"]


def test_report_waits_for_an_archive_that_is_down(tmp_path: Path) -> None:
    from tests.client.pacs.nodes import send

    listen, dicom = free_port(), free_port()
    config = CONFIG.format(listen=listen, orthanc=dicom).replace('["ORTHANC"]', '["PACS"]')
    (tmp_path / "pacs.toml").write_text(config)
    with running_page(tmp_path, pacs=tmp_path / "pacs.toml"):
        assert send(listen, chest(33)) == [0]
        queue = JobQueue(tmp_path / "pacs")
        until(lambda: any(job.deliveries and job.deliveries["sr"].attempts for job in queue.open_jobs()))
        with orthanc(tmp_path / "orthanc", dicom_port=dicom, fedrad_port=listen) as archive:
            (report,) = until(lambda: archive.instances("SR"))
            assert report["AccessionNumber"] == "XR33"
            until(lambda: list((tmp_path / "pacs" / "done").glob("*.json")))
