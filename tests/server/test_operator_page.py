from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.operator_page import charts
from server.operator_page.page import ago, in_bytes, in_seconds, make_page
from server.status import EpsilonPoint, RoundView, read_view
from tests.server.study_folder import START_UNIX_S, eventful, serve_round, write_folder

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def client_of(directory: Path) -> TestClient:
    return TestClient(
        make_page(directory, hosts=("127.0.0.1",), clock=lambda: START_UNIX_S + 200.0),
        base_url="http://127.0.0.1",
    )


def test_the_page_says_what_is_going_on_in_words(tmp_path: Path) -> None:
    eventful(tmp_path)
    text = client_of(tmp_path).get("/").text
    for words in (
        "9<span> of 14</span>", "BudgetExceeded", "only the site can raise it", "not-connected × 2",
        "2 minutes ago", "1 failed attempt<", "900.0 kB", "stopped",
    ):  # fmt: skip
        assert words in text, words


def test_the_page_says_whom_an_open_round_waits_for_and_who_was_late(tmp_path: Path) -> None:
    from dataclasses import replace

    from server.checkpoint import Pending
    from server.operator_page.page import study_page

    study = write_folder(tmp_path)
    serve_round(tmp_path, study, 0, late={"west": 95.0})
    pending = Pending(1, 1, study.site_ids, START_UNIX_S + 100.0, "0" * 32, {})
    view = replace(read_view(tmp_path), attempt=pending, state="running")
    pages = {now: study_page(view, now_s=START_UNIX_S + now, refresh_s=0) for now in (40, 160)}
    assert "answered 1.6 min past the deadline" in pages[40]
    assert "round 2 is open: 60.0 s to the deadline" in pages[40]
    assert "round 2 is open: past the deadline; up to 9.0 min more" in pages[160]


def test_before_the_first_round_the_page_counts_no_site_as_serving(tmp_path: Path) -> None:
    write_folder(tmp_path)
    text = client_of(tmp_path).get("/").text
    assert '<p class="figure">–</p>' in text and "not heard of yet" in text
    assert "4<span> of 4</span>" not in text


def test_every_answer_forbids_scripts_frames_and_other_origins(tmp_path: Path) -> None:
    eventful(tmp_path)
    client = client_of(tmp_path)
    for path in ("/", "/status.json", "/style.css", "/nothing", "/study/000000000000"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'"), path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_the_page_holds_no_script_no_inline_style_and_no_other_address(tmp_path: Path) -> None:
    eventful(tmp_path)
    text = client_of(tmp_path).get("/").text
    assert "<script" not in text
    assert " style=" not in text
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(tmp_path: Path, method: str) -> None:
    eventful(tmp_path)
    assert client_of(tmp_path).request(method, "/").status_code == 405


def test_another_host_name_is_refused(tmp_path: Path) -> None:
    """Else a web page could read this one by rebinding its own name to loopback."""
    eventful(tmp_path)
    assert client_of(tmp_path).get("/", headers={"host": "evil.example"}).status_code == 400


def test_text_of_a_manifest_is_escaped(tmp_path: Path) -> None:
    study = write_folder(tmp_path)
    from dataclasses import replace

    from server.operator_page.page import study_page

    view = replace(read_view(tmp_path), purpose='<script>alert("x")</script>', id=study.study.id)
    text = study_page(view, now_s=0, refresh_s=0)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_several_studies_are_listed_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    eventful(tmp_path / "studies" / "one")
    study = write_folder(tmp_path / "studies" / "two", id="other")
    shutil.copytree(tmp_path / "studies" / "one", tmp_path / "studies" / "broken")
    (tmp_path / "studies" / "broken" / "operator.sig").write_text("00" * 64)
    client = client_of(tmp_path)
    text = client.get("/").text
    assert "broken cannot be read: SignatureInvalid" in text
    assert str(tmp_path) not in text
    assert client.get(f"/study/{study.sha256[:16]}").status_code == 200
    assert client.get("/study/ffffffffffffffff").status_code == 404


def test_an_empty_folder_says_that_there_is_no_study(tmp_path: Path) -> None:
    assert "no study in this directory yet" in client_of(tmp_path).get("/").text


def test_status_json_is_the_view(tmp_path: Path) -> None:
    eventful(tmp_path)
    (view,) = client_of(tmp_path).get("/status.json").json()["studies"]
    assert (view["rounds_done"], view["sites"][1]["reason"]) == (9, "BudgetExceeded")


def rounds_of(count: int) -> list[RoundView]:
    return [RoundView(n, 1, 2.0 + n % 3, ("a", "b"), {"c<&": "no-answer"}, 0) for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 14, 1000])
def test_charts_are_well_formed_and_bounded_however_many_rounds_there_are(count: int) -> None:
    rounds = rounds_of(count)
    points = [EpsilonPoint(n, 0.1 * n) for n in range(1, min(count, 12) + 1)]
    for text in (
        charts.epsilon_chart(points, limit=8.0, rounds_planned=max(1, count)),
        charts.seconds_chart(rounds, []),
        charts.presence_grid(["a", "b", "c<&"], rounds),
    ):
        assert ET.fromstring(text).tag.endswith("svg")  # noqa: S314  our own text
        assert len(text) < 60_000


def test_a_round_that_waited_for_a_deadline_does_not_flatten_the_others() -> None:
    rounds = [RoundView(n, 1, 600.0 if n == 5 else 3.0, ("a",), {}, 0) for n in range(12)]
    text = charts.seconds_chart(rounds, [])
    assert "600 s" in text
    assert 'class="cut"' in text


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (ago(0, 30), "just now"), (ago(0, 3700), "1 hour ago"), (ago(0, 200_000), "2 days ago"),
        (ago(100, 0), "in the future: compare clocks"), (in_bytes(999), "999 B"),
        (in_bytes(21_876_188), "21.9 MB"), (in_seconds(12.34), "12.3 s"), (in_seconds(600), "10.0 min"),
    ],
)  # fmt: skip
def test_figures_are_written_as_people_say_them(written: str, words: str) -> None:
    assert written == words


@pytest.fixture()
def served(tmp_path: Path) -> Iterator[str]:
    """`fedrad-server page` as its own process, over a study with events."""
    eventful(tmp_path / "study")
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "page", "--study", str(tmp_path / "study"), "--listen",
         "127.0.0.1:0"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        address = process.stderr.readline().strip()
        assert address.startswith("http://127.0.0.1:"), address
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        process.stderr.close()


def test_the_command_serves_the_page_and_ends_when_told(served: str) -> None:
    host = served.removeprefix("http://").rstrip("/")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=120)) as connection:
        connection.request("GET", "/status.json")
        response = connection.getresponse()
        assert response.headers.get("server") is None
        assert json.loads(response.read())["studies"][0]["id"] == "chest"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it_without_errors_and_without_sideways_scrolling(
    served: str, tmp_path: Path, width: int, scheme: str
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served, timeout=120_000)
        assert said == []
        assert {served, f"{served}style.css"} <= set(asked)
        assert all(url.startswith(served) for url in asked)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg.chart").count() == 2
        assert page.locator("svg.grid rect.cell-missing").count() == 3
        # the stylesheet came through the policy: colours are the page's, not the browser's
        assert page.evaluate("getComputedStyle(document.querySelector('svg.chart .line')).fill") == "none"
        shot = Path(os.environ.get("FEDRAD_SCREENSHOTS", tmp_path)) / f"operator-{width}-{scheme}.png"
        page.screenshot(path=str(shot), full_page=True)
        assert shot.stat().st_size > 20_000
        browser.close()
