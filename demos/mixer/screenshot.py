"""Takes the pictures of the mixer that the README shows: python -m demos.mixer.screenshot --gif FILE.

Opens the page, which plays, changes the mix, teaches it sunglasses from a dozen faces with them and a dozen
without, and keeps the page at the end (mixer.png) and on its way there (mixer.gif). Needs playwright and a
Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demos.mixer.pictures import GAP, from_uri
from demos.mixer.served import CHROMIUM_OPTIONS, find_chromium, served

ROOT = Path(__file__).resolve().parents[2]
GIF_WIDTH = 640
GIF_BYTES = 3 * 10**6
GIF_MILLISECONDS = 160
MARKS = 12
EYES = (slice(13, 17), [*range(9, 14), *range(18, 23)])  # rows and columns of a face of 32 px

__all__ = ["main"]


class Film:
    """Screenshots of a page, taken whenever one is looked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[Image.Image] = []

    def roll(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Takes pictures for some seconds, or until something holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            start = time.monotonic()
            picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            height = round(picture.height * GIF_WIDTH / picture.width)
            self.frames.append(picture.resize((GIF_WIDTH, height), Image.Resampling.LANCZOS))
            self.page.wait_for_timeout(max(0, GIF_MILLISECONDS - 1000 * (time.monotonic() - start)))

    def save(self, path: Path) -> None:
        """Writes an animation that begins anew; of one that is too large, every second frame."""
        small = [frame.quantize(64, dither=Image.Dither.NONE) for frame in self.frames]
        milliseconds = GIF_MILLISECONDS
        while True:
            content = io.BytesIO()
            durations = [milliseconds] * (len(small) - 1) + [2500]
            options = {"save_all": True, "append_images": small[1:], "duration": durations, "loop": 0}
            small[0].save(content, "GIF", optimize=True, **options)
            if content.tell() <= GIF_BYTES or len(small) < 3:
                break
            small, milliseconds = [*small[:-1:2], small[-1]], 2 * milliseconds
        partial = path.with_suffix(".partial")
        partial.write_bytes(content.getvalue())
        os.replace(partial, path)


def dark_and_clear(page: Any) -> tuple[list[int], list[int]]:
    """The faces of the picture whose lenses are dark, and those whose are not, surest first."""
    uri = page.locator("#picture img").get_attribute("src")
    pixels = np.asarray(Image.open(io.BytesIO(from_uri(uri))).convert("RGB"), float)
    across = (pixels.shape[1] + GAP) // (32 + GAP)
    count = int(page.locator("#chains").input_value())
    corners = [divmod(i, across) for i in range(count)]
    lenses = [pixels[r * (32 + GAP) :, c * (32 + GAP) :][EYES] for r, c in corners]
    skin = [float(np.ptp(lens, axis=-1).mean()) for lens in lenses]  # dark lenses are grey, and skin is not
    order = sorted(range(count), key=skin.__getitem__)
    return order[:MARKS], order[::-1][:MARKS]


def scrolled(page: Any, name: str = "picture") -> None:
    """Scrolls the pictures to an element of theirs, and the page to its top."""
    page.locator(f"#{name}").evaluate("element => element.scrollIntoView({ block: 'center' })")
    page.evaluate("scrollTo(0, 0)")


def teach(page: Any, film: Film) -> None:
    """Teaches sunglasses on the page, by keyboard."""
    page.locator("#chains").fill("36")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#caption").get_by_text("· seed").wait_for()
    page.get_by_role("tab", name="Teach").click()
    page.evaluate("scrollTo(0, 0)")
    film.roll(1.0)
    columns = 6
    at = 0
    page.locator("#picture").focus()
    page.keyboard.press("ArrowRight")
    for key, faces in zip("yn", dark_and_clear(page), strict=True):
        for face in sorted(faces):
            down, right = face // columns - at // columns, face % columns - at % columns
            for name, steps in (("Down", down), ("Up", -down), ("Right", right), ("Left", -right)):
                for _ in range(steps):
                    page.keyboard.press(f"Arrow{name}")
            at = face
            page.keyboard.press(key)
        film.roll(0.2)
    page.locator("#taught-name").fill("sunglasses")
    scrolled(page, "teach-go")
    film.roll(1.5)
    page.get_by_role("button", name="Teach it").click()
    film.roll(30, lambda: page.get_by_role("slider", name="sunglasses weight").count() > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/mixer.png")
    parser.add_argument("--gif", type=Path, default=None, help="where to write the animation, if anywhere")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--seconds", type=float, default=3.0, help="of playing each mix")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    if (chromium := find_chromium()) is None:
        sys.exit("no chromium found; install Debian's package chromium")
    from playwright.sync_api import TimeoutError, sync_playwright  # a development extra

    with served("--num-threads", "1") as mixer, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        page = browser.new_page(
            viewport={"width": arguments.width, "height": arguments.height},
            color_scheme="dark" if arguments.dark else "light",
            bypass_csp=True,  # for what is evaluated in the page from here
        )
        page.set_default_timeout(120_000)
        page.goto(mixer.address)
        page.locator("#picture img").wait_for()  # it opens playing
        with contextlib.suppress(TimeoutError):  # on a busy machine, some starts are drawn later
            drawn = "!document.getElementById('starts').textContent.includes('…')"
            page.wait_for_function(drawn, timeout=60_000)
        film = Film(page)
        film.roll(arguments.seconds)
        page.get_by_role("button", name="Grey curls and a beard").click()
        film.roll(arguments.seconds)
        page.get_by_role("button", name="Smiling, with glasses").click()
        film.roll(arguments.seconds)
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_function("document.getElementById('stop').disabled")
        if arguments.gif is not None:
            teach(page, film)
            page.locator("#chains").fill("16")
            scrolled(page)
            film.roll(3 * arguments.seconds)
            film.save(arguments.gif)
            print(arguments.gif)
        page.get_by_role("tab", name="Why").click()
        scrolled(page)
        page.screenshot(path=str(arguments.out))
        print(arguments.out)
        browser.close()


if __name__ == "__main__":
    main()
