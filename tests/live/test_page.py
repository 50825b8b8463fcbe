"""The page in headless Chromium: frames change, a typed prompt reaches the screen, the grid fills in."""

import time

import numpy as np
import pytest
from browser import find_browser, open_browser
from live_clients import wait_until

PROGRAM = find_browser()
LAG = 15.0  # seconds; about 4 at the video's own rate, more on a busy machine

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium here, so the page is not tested; test_server.py tests the protocol behind it"
)


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """The page of the shared server in a tab of 1280x900 pixels."""
    with open_browser(PROGRAM, tmp_path_factory.mktemp("chromium")) as browser:
        browser.resize(1280, 900)
        browser.call("Page.navigate", url=server.url)
        wait_until(lambda: browser.run("document.body?.dataset.state") == "idle", 30)
        yield browser
        browser.run("document.getElementById('stop').click()")
        assert not browser.errors


def colour(page) -> str:
    """Return the colour that a shape on the screen has: red, green or blue."""
    pixels = page.screenshot("screen").reshape(-1, 3).astype(int)
    vivid = pixels[np.ptp(pixels, axis=1) > 100]
    return ["red", "green", "blue"][int(np.argmax(vivid.sum(axis=0)))] if len(vivid) else ""


def test_frames_change_and_a_typed_prompt_changes_the_colour(page):
    page.run("document.getElementById('go').click()")
    wait_until(lambda: colour(page) == "red", 20)
    first = page.screenshot("screen")
    wait_until(lambda: (page.screenshot("screen") != first).mean() > 0.01)
    page.run("document.getElementById('prompt').value = 'a green square moving up slowly on a black background'")
    sent = time.monotonic()
    page.run("document.getElementById('go').click()")
    wait_until(lambda: colour(page) == "green", LAG)
    assert time.monotonic() - sent < LAG and page.run("document.getElementById('lag').textContent") != "–"
    labels = "[...document.querySelectorAll('#film b')].map((label) => label.textContent)"
    assert page.run(labels)[-1] == "a green square moving up slowly on a black background"


def test_the_grid_fills_in(page):
    page.run("document.getElementById('tab-method').click()")

    def coloured() -> float:
        return float((np.ptp(page.screenshot("grid").astype(int), axis=2) > 60).mean())

    page.run("document.getElementById('schedules').querySelector('input[value=block_first]').click()")  # starts again
    wait_until(lambda: coloured() > 0.08, 20)
    page.run("document.getElementById('stop').click()")


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_nothing_is_wider_than_the_screen(page, width, theme):
    page.resize(width, 800, theme)
    for view in ("video", "method"):
        page.run(f"document.getElementById('tab-{view}').click()")
        assert page.run("document.documentElement.scrollWidth") <= width
    wait_until(lambda: page.run("document.documentElement.dataset.theme") == theme, 20)  # set by an event
