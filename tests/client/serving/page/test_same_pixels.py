"""One radiograph, five ways in: as the import stored it, and the DICOM file by page, API, chat and C-STORE.

All give one draft, and the regions behind its words lie where the viewer shows what the model saw.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest

from client.serving.picture import read_picture
from common.errors import ImageUnreadable
from tests.client.pacs.nodes import send
from tests.client.serving.page.running import RunningPage, running_page, shipped_release, until
from tests.client.serving.test_as_imported import KINDS, imported

PACS = """
directory = "pacs"
[listen]
ae_title = "FEDRAD"
port = 0
senders = ["PACS"]
[fhir]
directory = "fhir"
"""
# With the tests' key, this patient falls into the split from which the page takes its examples.
NUMBER = 32
DATA = KINDS["borders and shutters"](NUMBER)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPage]:
    folder = tmp_path_factory.mktemp("same")
    imported(folder, {"framed": DATA}, first=NUMBER)
    (folder / "pacs.toml").write_text(PACS)
    with running_page(folder, data=folder / "out", pacs=folder / "pacs.toml") as running:
        yield running


@pytest.fixture
def ask(page: RunningPage) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.url, timeout=60, trust_env=False) as client:
        yield client


def drafted(ask: httpx.Client, id: str) -> dict[str, Any]:
    ask.post(f"/page/api/cases/{id}/draft").raise_for_status()
    value: dict[str, Any] = ask.get(f"/page/api/cases/{id}").json()["draft"]
    return value


def shown(ask: httpx.Client, id: str) -> Any:
    response = ask.get(f"/page/api/cases/{id}/pixels")
    rows, columns = int(response.headers["x-rows"]), int(response.headers["x-columns"])
    return np.frombuffer(response.content, "<u2").reshape(rows, columns)


def test_every_way_in_gives_the_draft_of_the_stored_image(page: RunningPage, ask: httpx.Client) -> None:
    assert ask.post("/page/api/examples?count=1").json() == {"added": 1}
    (example,) = ask.get("/page/api/cases").json()["cases"]
    stored = drafted(ask, example["id"])
    assert np.array_equal((shown(ask, example["id"]) // 257).astype(np.uint8), read_picture(DATA).pixels)

    uploaded = ask.post("/page/api/cases?indication=", content=DATA).json()
    assert uploaded["source"] == "upload"
    by_page = drafted(ask, uploaded["id"])
    by_api = ask.post("/v1/report", content=DATA).json()
    url = "data:application/dicom;base64," + base64.b64encode(DATA).decode()
    content = [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], "logprobs": True}
    (choice,) = ask.post("/v1/chat/completions", json=body).json()["choices"]
    assert send(page.pacs_port, pydicom.dcmread(io.BytesIO(DATA))) == [0]

    def from_pacs() -> Any:
        cases = [one for one in ask.get("/page/api/cases").json()["cases"] if one["source"] == "pacs"]
        return ask.get(f"/page/api/cases/{cases[0]['id']}").json()["draft"] if cases else None

    by_store = until(from_pacs, within_s=300)
    assert stored["text"] and stored["logprobs"]
    for draft in (by_page, by_api, by_store):
        assert draft["text"] == stored["text"]
        assert draft["logprobs"] == pytest.approx(stored["logprobs"], abs=1e-5)
    assert choice["message"]["content"] == stored["text"]
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == pytest.approx(
        stored["logprobs"], abs=1e-5
    )


def test_regions_lie_on_the_part_of_the_shown_image_that_the_model_saw(ask: httpx.Client) -> None:
    case = ask.post("/page/api/cases", content=DATA).json()
    drafted(ask, case["id"])
    left, top, right, bottom = ask.get(f"/page/api/cases/{case['id']}/grounding").json()["box"]
    image = shown(ask, case["id"])
    height, width = image.shape
    part = image[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    seen = read_picture(DATA).pixels
    assert seen.shape < image.shape and 0.1 < left < right < 0.95 and 0.05 < top < bottom < 0.95
    assert np.array_equal(((part.astype(np.uint32) + 128) // 257).astype(np.uint8), seen)


def test_the_report_command_reads_the_dicom_file_as_the_stored_image(page: RunningPage) -> None:
    from client.drafting import draft_findings

    (stored,) = (page.folder / "out" / "images").rglob("*.png")
    (page.folder / "sent.dcm").write_bytes(DATA)
    release = shipped_release()
    of_stored = draft_findings(stored, release=release)
    of_dicom = draft_findings(page.folder / "sent.dcm", release=release, data=page.folder / "out")
    assert of_dicom["findings"] == of_stored["findings"] and len(of_stored["findings"]) > 20
    with pytest.raises(ImageUnreadable):
        draft_findings(page.folder / "none.png", release=release)
