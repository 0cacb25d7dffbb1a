"""The page in Chromium: what a radiologist sees and presses. Needs playwright and /usr/bin/chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.access import Action
from client.serving.worklist import Worklist, word_edits
from deploy.local.synthetic import write_synthetic_sites
from tests.client.pacs.nodes import chest_bytes
from tests.client.serving.page.running import RunningPage, running_page
from tests.client.serving.page.test_api import dark_png, phantom_png

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPage]:
    folder = tmp_path_factory.mktemp("page")
    write_synthetic_sites(folder, sites=["north"], patients={"north": 30}, seed=4)
    with running_page(folder, data=folder / "north") as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(page: RunningPage, chromium: Any) -> Iterator[Any]:
    """An open page; anything that goes wrong in it, or leaves this server, fails the test."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, locale="en-GB")
    opened, wrong = context.new_page(), []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    opened.on("request", lambda r: None if r.url.startswith((page.url, "blob:")) else wrong.append(r.url))
    yield opened
    context.close()
    assert not wrong


def put(page: RunningPage, picture: bytes) -> str:
    """Lay a case on the worklist as the API does; returns its id."""
    import httpx

    answer = httpx.post(f"{page.url}/page/api/cases", content=picture, trust_env=False)
    return str(answer.json()["id"])


def show(tab: Any, page: RunningPage, id: str) -> None:
    tab.goto(f"{page.url}/page/")
    tab.click(f'#cases li[data-id="{id}"]')


def drafted(tab: Any, page: RunningPage, picture: bytes) -> str:
    id = put(page, picture)
    show(tab, page, id)
    tab.wait_for_selector("#sentences li")
    tab.wait_for_function("() => document.querySelector('#sentences li[aria-current=true]')")
    return id


def test_a_damaged_case_is_a_line_that_says_what_to_do(tab: Any, page: RunningPage) -> None:
    good, bad = put(page, phantom_png(31)), put(page, phantom_png(32))
    path = page.folder / "page" / "worklist" / bad / "case.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:40])
        show(tab, page, good)
        tab.wait_for_selector("#sentences li")
        tab.check("#open-only")
        line = tab.text_content(f'#cases li[data-id="{bad}"]')
        assert "damaged case" in line and f"{bad}/case.json" in line and "restore" in line
        assert tab.locator(f'#cases li[data-id="{good}"][data-state="drafted"]').count() == 1
    finally:
        path.write_bytes(whole)


def shade(tab: Any) -> list[int]:
    """Sample the canvas: greys on a coarse grid."""
    found: list[int] = tab.evaluate(
        """async () => {
        await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
        const c = document.querySelector('#stage canvas'), d = c.getContext('2d')
          .getImageData(0, 0, c.width, c.height).data, out = [];
        for (let y = 20; y < c.height; y += 40) for (let x = 20; x < c.width; x += 40)
          out.push(...d.slice(4 * (y * c.width + x), 4 * (y * c.width + x) + 3));
        return out; }"""
    )
    return found


def test_first_paint_is_fast_and_the_draft_starts_with_its_first_token(tab: Any, page: RunningPage) -> None:
    put(page, phantom_png(19))
    paints = []
    while len(paints) < 3 or (min(paints) >= 500 and len(paints) < 20):
        tab.goto(f"{page.url}/page/")
        tab.wait_for_selector("#sentences li")
        paints.append(tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert min(paints) < 500
    id = put(page, phantom_png(20))  # the newest, hence the one that opens by itself
    tab.goto(f"{page.url}/page/")
    tab.wait_for_selector(f'#cases li[data-id="{id}"][data-state="drafted"]')
    asked, first, done = (
        tab.evaluate(f"performance.getEntriesByName('{name}').at(-1).startTime")
        for name in ("draft-asked", "first-token", "draft-done")
    )
    draft = Worklist(page.folder / "page" / "worklist").draft(id)
    assert draft is not None and first <= done
    assert (first - asked) / 1000 < draft["first_token_s"] + 0.25


def test_sentences_and_words_light_up_their_regions(tab: Any, page: RunningPage) -> None:
    drafted(tab, page, phantom_png(21))
    tab.wait_for_timeout(400)
    with_regions = shade(tab)
    tab.keyboard.press("o")
    without = shade(tab)
    tab.keyboard.press("o")
    assert with_regions != without and shade(tab) == with_regions
    greys = [without[i : i + 3] for i in range(0, len(without), 3)]
    assert sum(max(p) - min(p) > 4 for p in greys) < len(greys) * 0.05
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".word.on").count() == 1
    word = shade(tab)
    assert word != with_regions
    tab.keyboard.press("ArrowDown")
    assert tab.locator(".word.on").count() == 0


def test_window_invert_zoom_and_pan_answer_keys_and_mouse(tab: Any, page: RunningPage) -> None:
    drafted(tab, page, chest_bytes(21))
    tab.keyboard.press("o")
    start = shade(tab)
    corner = tab.locator("#stage .bl")
    before = corner.inner_text()
    for key in ("[", ",", "i", "+"):
        seen = shade(tab)
        tab.keyboard.press(key)
        assert shade(tab) != seen, key
    assert corner.inner_text() != before and "⇄" in corner.inner_text()
    seen = shade(tab)
    tab.mouse.move(600, 300)
    tab.mouse.down()
    tab.mouse.move(660, 340)
    tab.mouse.up()
    assert shade(tab) != seen
    seen = shade(tab)
    tab.keyboard.press("Shift+ArrowLeft")
    assert shade(tab) != seen
    tab.mouse.wheel(0, -300)
    for key in ("i", "w", "0"):
        tab.keyboard.press(key)
    assert shade(tab) == start


def test_edited_text_is_accepted_by_keys_alone_and_logged(tab: Any, page: RunningPage) -> None:
    id = drafted(tab, page, phantom_png(22))
    tab.keyboard.press("e")
    tab.keyboard.press("Control+End")
    tab.keyboard.type(" No acute fracture.")
    assert tab.inner_text("#edited") == "3 words changed"
    tab.keyboard.press("Control+Enter")
    tab.keyboard.press("Enter")
    tab.wait_for_selector('#state[data-state="accepted"]')
    record = list(page.log.records())[-1]
    payload = json.loads(page.log.read_payload(record))
    assert record.action is Action.SIGN_OFF and payload["text"].endswith("No acute fracture.")
    assert payload["edited_words"] == 3 and payload["reading_s"] > 0
    assert tab.locator('[data-do="edit"]').is_disabled()
    assert Worklist(page.folder / "page" / "worklist").state(id) == "accepted"


def test_rejection_asks_for_a_reason(tab: Any, page: RunningPage) -> None:
    drafted(tab, page, phantom_png(23))
    tab.keyboard.press("r")
    tab.keyboard.press("Enter")
    assert tab.inner_text("#state") != "rejected"
    tab.keyboard.press("3")
    tab.keyboard.press("Enter")
    tab.wait_for_selector('#state[data-state="rejected"]')
    payload = json.loads(page.log.read_payload(list(page.log.records())[-1]))
    assert payload["reason"] == "Invented finding" and not payload["accepted"]


def test_refused_image_shows_reason_and_score_and_can_be_reported_by_hand(
    tab: Any, page: RunningPage
) -> None:
    show(tab, page, put(page, dark_png()))
    tab.wait_for_selector('#state[data-state="refused"]')
    assert "This is no chest." in tab.inner_text("#notice")
    assert tab.inner_text("#domain .value") == "2.50 / 1.00"
    assert tab.locator('[data-do="accept"]').is_disabled()
    tab.keyboard.press("l")
    assert "这不是胸片。" in tab.inner_text("#notice") and tab.inner_text('[data-do="accept"]').startswith(
        "采纳"
    )
    tab.keyboard.press("e")
    tab.keyboard.type("Knee.")
    tab.keyboard.press("Control+Enter")
    tab.keyboard.press("Enter")
    tab.wait_for_selector('#state[data-state="accepted"]')


def test_similar_cases_open_beside_the_picture(tab: Any, page: RunningPage) -> None:
    drafted(tab, page, phantom_png(24))
    tab.wait_for_selector("#similar li", timeout=60_000)
    tab.keyboard.press("x")
    tab.wait_for_selector("#stage-prior:not([hidden])")
    assert tab.inner_text("#prior-text")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#stage-prior", state="hidden")


def test_both_languages_have_the_same_words(tab: Any, page: RunningPage) -> None:
    tab.goto(f"{page.url}/page/")
    english, chinese = tab.evaluate("import('/page/words.js').then((words) => words.names())")
    assert english == chinese


@pytest.mark.parametrize(
    ("one", "other"),
    [("", "a b"), ("a b c", "a x c d"), ("Small left effusion.", "Large left pleural effusion."), ("a", "")],
)
def test_page_counts_edits_as_the_log_does(tab: Any, page: RunningPage, one: str, other: str) -> None:
    tab.goto(f"{page.url}/page/")
    script = "([a, b]) => import('/page/report.js').then((report) => report.wordEdits(a, b))"
    assert tab.evaluate(script, [one, other]) == word_edits(one, other)


def test_page_adds_up_regions_as_the_server_does(tab: Any, page: RunningPage) -> None:
    import numpy as np

    from client.serving.grounding import span_map

    rows = np.random.default_rng(1).random((5, 16)).astype(np.float32)
    tab.goto(f"{page.url}/page/")
    script = "([r]) => import('/page/viewer.js').then((viewer) => Array.from(viewer.spanMap(r, 1, 4)))"
    got = np.array(tab.evaluate(script, [rows.tolist()]))
    np.testing.assert_allclose(got / got.sum(), span_map(rows, first_token=1, end_token=4), rtol=1e-5)
