"""The page's API as the page uses it: drafts streamed, regions, similar cases, decisions on record."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from client.access import Action
from client.serving.page.static_files import FOLDER
from common.model import phantoms
from deploy.local.synthetic import write_synthetic_sites
from tests.client.pacs.nodes import chest_bytes
from tests.client.serving.page.running import RunningPage, running_page, until


def phantom_png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    findings = (phantoms.Finding("Pleural Effusion", "left", "large"),)
    stream = io.BytesIO()
    Image.fromarray(phantoms.expose(phantoms.render(findings, rng), phantoms.Scanner(), rng)).save(
        stream, "PNG"
    )
    return stream.getvalue()


def dark_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.eye(80, dtype=np.uint8) * 255).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPage]:
    folder = tmp_path_factory.mktemp("page")
    write_synthetic_sites(folder, sites=["north"], patients={"north": 40}, seed=4)
    with running_page(folder, data=folder / "north") as running:
        yield running


@pytest.fixture
def ask(page: RunningPage) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{page.url}/page/api", timeout=60, trust_env=False) as client:
        yield client


def add(ask: httpx.Client, picture: bytes, **parameters: str) -> dict[str, Any]:
    response = ask.post("/cases", content=picture, params=parameters)
    assert response.status_code == 201
    value: dict[str, Any] = response.json()
    return value


def draft(ask: httpx.Client, id: str) -> list[tuple[str, dict[str, Any]]]:
    """Have a case drafted; returns the events."""
    with ask.stream("POST", f"/cases/{id}/draft") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).strip().split("\n\n")
    events = [block.split("\n") for block in blocks]
    return [(one[0].removeprefix("event: "), json.loads(one[1].removeprefix("data: "))) for one in events]


def test_draft_streams_decision_tokens_and_the_whole(ask: httpx.Client) -> None:
    case = add(ask, phantom_png(1), indication="Cough.")
    assert case["state"] == "waiting" and case["indication"] == "Cough."
    events = draft(ask, case["id"])
    names = [name for name, _ in events]
    assert names[0] == "decision" and names[-1] == "draft" and set(names[1:-1]) == {"token"}
    whole = events[-1][1]
    assert "".join(value["text"] for name, value in events if name == "token").startswith(whole["text"])
    assert whole["model"]["round"] == 19 and whole["model"]["release_epsilon"] == 8.0
    stored = ask.get(f"/cases/{case['id']}").json()
    assert stored["state"] == "drafted" and stored["draft"] == whole


def test_regions_have_a_row_for_each_token_and_add_up_to_sentences(ask: httpx.Client) -> None:
    case = add(ask, phantom_png(2))
    whole = draft(ask, case["id"])[-1][1]
    found = ask.get(f"/cases/{case['id']}/grounding").json()
    values = np.frombuffer(base64.b64decode(found["values"]), "<f4").reshape(found["tokens"], -1)
    assert found["side"] == 4 and values.shape[1] == 16 and found["box"] == [0, 0, 1, 1]
    assert found["tokens"] == len(whole["logprobs"]) == len(whole["pieces"])
    assert np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0
    assert whole["sentences"][-1]["end_token"] <= found["tokens"]
    assert ask.get(f"/cases/{case['id']}/grounding").json() == found


def test_pixels_come_at_full_depth(ask: httpx.Client) -> None:
    case = add(ask, chest_bytes(5))
    response = ask.get(f"/cases/{case['id']}/pixels")
    rows, columns = int(response.headers["x-rows"]), int(response.headers["x-columns"])
    values = np.frombuffer(response.content, "<u2").reshape(rows, columns)
    assert (rows, columns) == (96, 96) and len(np.unique(values)) > 200
    assert response.headers["cache-control"] == "no-store"


def test_dicom_brings_patient_and_indication(ask: httpx.Client) -> None:
    case = add(ask, chest_bytes(7))
    assert case["patient"]["name"] == "Brandt Zofia" and case["patient"]["accession"] == "XR7"
    assert case["indication"] == "Cough." and case["kind"] == "dicom"


def test_refused_picture_says_why_in_two_languages(ask: httpx.Client) -> None:
    case = add(ask, dark_png())
    (first, _), (last, whole) = draft(ask, case["id"])
    assert (first, last) == ("decision", "draft")
    assert whole["decision"]["refused"] and whole["decision"]["reason_zh"] == "这不是胸片。"
    assert ask.get(f"/cases/{case['id']}").json()["state"] == "refused"
    assert ask.get(f"/cases/{case['id']}/grounding").status_code == 409


def test_accepted_text_and_its_edits_are_on_the_access_log(page: RunningPage, ask: httpx.Client) -> None:
    case = add(ask, phantom_png(3))
    whole = draft(ask, case["id"])[-1][1]
    text = f"{whole['text']} No acute fracture."
    body = {"outcome": "accept", "text": text, "reason": "", "seconds": 12.5}
    taken = ask.post(f"/cases/{case['id']}/decision", json=body)
    assert taken.status_code == 201 and taken.json()["edited_words"] == 3
    record = list(page.log.records())[-1]
    assert (record.action, record.user, record.model_version) == (Action.SIGN_OFF, "dr.lin", 3)
    payload = json.loads(page.log.read_payload(record))
    assert payload["text"] == text and payload["drafted"] == whole["text"] and payload["edited_words"] == 3
    assert payload["picture"] == case["picture_sha256"] and payload["reading_s"] == 12.5
    assert ask.get(f"/cases/{case['id']}").json()["state"] == "accepted"
    again = ask.post(f"/cases/{case['id']}/decision", json=body)
    assert again.status_code == 409 and again.json()["error"]["code"] == "CaseDecided"
    assert ask.post(f"/cases/{case['id']}/draft").json()["error"]["code"] == "CaseDecided"


def test_rejection_needs_a_reason_and_is_on_record(page: RunningPage, ask: httpx.Client) -> None:
    case = add(ask, phantom_png(4))
    draft(ask, case["id"])
    without = ask.post(f"/cases/{case['id']}/decision", json={"outcome": "reject"})
    assert without.json()["error"]["code"] == "SignOffInvalid"
    taken = ask.post(f"/cases/{case['id']}/decision", json={"outcome": "reject", "reason": "Wrong side"})
    assert taken.status_code == 201
    record = list(page.log.records())[-1]
    assert record.action is Action.DISCARD
    assert json.loads(page.log.read_payload(record))["reason"] == "Wrong side"


@pytest.mark.parametrize(
    "body",
    [{"outcome": "sign"}, {"outcome": "accept", "final": True}, {"outcome": "accept", "text": "x" * 40_000}],
)
def test_malformed_decision_is_refused(ask: httpx.Client, body: dict[str, Any]) -> None:
    case = add(ask, phantom_png(5))
    assert ask.post(f"/cases/{case['id']}/decision", json=body).status_code == 422


def test_similar_cases_are_this_sites_and_not_the_picture_itself(
    page: RunningPage, ask: httpx.Client
) -> None:
    assert ask.post("/examples?count=2").json() == {"added": 2}
    case = next(one for one in ask.get("/cases").json()["cases"] if one["source"] == "site")
    draft(ask, case["id"])

    def found() -> Any:
        value = ask.get(f"/cases/{case['id']}/similar?count=3").json()
        return value if value["ready"] else None

    value = until(found)
    assert value["indexed"] == value["total"] > 3 and len(value["cases"]) == 3
    own = case["patient"]["id"]
    assert own not in [one["study"] for one in value["cases"]]
    picture = ask.get(f"/priors/{value['cases'][0]['number']}")
    assert picture.content.startswith(b"\x89PNG") and picture.headers["cache-control"] == "no-store"
    assert ask.get("/priors/99999").status_code >= 400


def test_a_damaged_case_is_one_line_and_the_others_are_as_they_were(
    page: RunningPage, ask: httpx.Client
) -> None:
    good, bad = add(ask, phantom_png(11)), add(ask, phantom_png(12))
    path = page.folder / "page" / "worklist" / bad["id"] / "case.json"
    whole = path.read_bytes()
    before = len(list(page.log.records()))
    try:
        path.write_bytes(whole[:40])
        rows = {row["id"]: row for row in ask.get("/cases").json()["cases"]}
        assert rows[good["id"]] == {k: good[k] for k in rows[good["id"]]}
        line = rows[bad["id"]]
        assert line["state"] == "damaged" and f"{bad['id']}/case.json" in line["problem"]
        assert line.keys() == rows[good["id"]].keys() | {"problem"}
        body = {"outcome": "accept", "text": "Clear."}
        at = f"/cases/{bad['id']}"
        for answer in (
            ask.get(at), ask.get(f"{at}/pixels"), ask.get(f"{at}/grounding"), ask.get(f"{at}/similar"),
            ask.post(f"{at}/draft"), ask.post(f"{at}/decision", json=body),
            ask.post("/cases", content=phantom_png(12)),
        ):  # fmt: skip
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "CaseDamaged")
        assert ask.post("/examples?count=1").status_code == 201
        assert len(list(page.log.records())) == before
    finally:
        path.write_bytes(whole)
    assert ask.get(f"/cases/{bad['id']}").json() == bad


@pytest.mark.parametrize(
    "path", ["/cases/" + "0" * 32, "/cases/..%2f..%2fx", "/cases/x/pixels", "/priors/-1"]
)
def test_unknown_case_is_refused(ask: httpx.Client, path: str) -> None:
    assert ask.get(path).status_code >= 400


def test_what_is_no_picture_is_refused(ask: httpx.Client) -> None:
    answer = ask.post("/cases", content=b"GIF89a not a radiograph")
    assert answer.json()["error"]["code"] == "ImageUnreadable"


def test_files_are_served_with_a_strict_policy_and_no_other_file_is(page: RunningPage) -> None:
    with httpx.Client(base_url=page.url, trust_env=False) as client:
        for name in ("", *(path.name for path in FOLDER.iterdir())):
            answer = client.get(f"/page/{name}")
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy
            again = client.get(f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304
        for start in ("/", "/page"):
            assert client.get(start).headers["location"] == "/page/"
        for name in ("__init__.py", "..%2fapi.py", "%2e%2e/api.py", ".env"):
            assert client.get(f"/page/{name}").status_code == 404


def test_page_names_nothing_outside_this_server(tmp_path: Path) -> None:
    for path in FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text
        assert " style=" not in text and "innerHTML" not in text and "eval(" not in text
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000
