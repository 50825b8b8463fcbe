"""Record the pictures of docs/live.md from a running server, in headless Chromium.

make live    # in another terminal
python tests/live/record.py http://127.0.0.1:7860 docs/images
"""

import argparse
import base64
import io
import itertools
import tempfile
import time
from pathlib import Path

from browser import Browser, find_browser, open_browser
from PIL import Image

from utils.errors import UserError, command

FIRST = "an orange triangle moving right fast on a black background"
SECOND = "a blue circle moving right fast on a black background"
SECONDS, INTERVAL = 9.0, 0.125  # of the moving picture
WIDTH = 960  # pixels of the moving picture


def shot(browser: Browser) -> Image.Image:
    """Return the page as it is."""
    data = browser.call("Page.captureScreenshot", format="png")["data"]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def send_prompt(browser: Browser, prompt: str) -> None:
    browser.run(f"document.getElementById('prompt').value = {prompt!r}")
    browser.run("document.getElementById('go').click()")


def record(browser: Browser, url: str, folder: Path) -> None:
    """Write live.webp, which shows a change of the prompt, and a picture of each view."""
    browser.resize(1280, 800)
    browser.call("Page.navigate", url=url)
    while browser.run("document.body?.dataset.state") != "idle":
        time.sleep(0.2)
    browser.run("document.getElementById('tab-method').click()")
    send_prompt(browser, FIRST)
    time.sleep(9)
    send_prompt(browser, SECOND)
    pictures = browser.record(SECONDS)
    shot(browser).save(folder / "live-method.webp", quality=88)
    kept = [pictures[0]]
    for picture in pictures[1:]:
        if picture[0] > kept[-1][0] + INTERVAL:
            kept.append(picture)
    times = [when for when, _ in kept] + [pictures[-1][0] + INTERVAL]
    frames = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in kept]
    size = WIDTH, round(WIDTH * frames[0].height / frames[0].width)
    first, *later = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    durations = [round(1000 * (end - start)) for start, end in itertools.pairwise(times)]
    first.save(
        folder / "live.webp", save_all=True, append_images=later, duration=durations, loop=0, quality=75, method=4
    )
    browser.resize(1280, 800, "light")
    browser.run("document.getElementById('tab-video').click()")
    time.sleep(2)
    shot(browser).save(folder / "live-video.webp", quality=88)
    browser.run("document.getElementById('stop').click()")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the page")
    parser.add_argument("folder", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    program = find_browser()
    if program is None:
        raise UserError("Chromium is not installed")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open_browser(program, Path(profile)) as tab,
    ):
        record(tab, args.url, args.folder)


if __name__ == "__main__":
    main()
