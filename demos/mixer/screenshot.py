"""Takes the pictures of the mixer that the README shows: python -m demos.mixer.screenshot.

Starts the page, plays a mix, moves a control, and keeps the page (mixer.png) and the picture as it
changes (mixer.gif). Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from demos.mixer.served import CHROMIUM_OPTIONS, find_chromium, served

ROOT = Path(__file__).resolve().parents[2]
GIF_PIXELS = 294  # three times nine faces of 32 px
GIF_BYTES = 2 * 10**6
GIF_MILLISECONDS = 120

__all__ = ["main"]


def film(page: Any, moves: list[tuple[str, str]], seconds: float) -> list[Image.Image]:
    """The live picture, while roles are changed one after the other, evenly over some seconds."""
    frames = []
    start, last = time.monotonic(), ""
    waiting = list(moves)
    while (passed := time.monotonic() - start) < seconds:
        if waiting and passed > seconds * (1 - len(waiting) / (len(moves) + 1)):
            expert, role = waiting.pop(0)
            page.get_by_role("group", name=f"{expert} role").get_by_label(role).check(force=True)
        uri = page.locator("#picture img").get_attribute("src")
        if uri != last:
            picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
            frames.append(picture.resize((GIF_PIXELS, GIF_PIXELS), Image.Resampling.NEAREST))
            last = uri
        page.wait_for_timeout(GIF_MILLISECONDS)
    return frames


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """Writes an animation that begins anew; of one that is too large, every second frame."""
    small = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    milliseconds, content = GIF_MILLISECONDS, io.BytesIO()
    while True:
        content = io.BytesIO()
        options = {"save_all": True, "append_images": small[1:], "duration": milliseconds, "loop": 0}
        small[0].save(content, "GIF", optimize=True, **options)
        if content.tell() <= GIF_BYTES or len(small) < 3:
            break
        small, milliseconds = small[::2], 2 * milliseconds
    partial = path.with_suffix(".partial")
    partial.write_bytes(content.getvalue())
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/mixer.png")
    parser.add_argument("--gif", type=Path, default=None, help="where to write the animation, if anywhere")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1020)
    parser.add_argument("--seconds", type=float, default=8.0, help="of playing")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    if (chromium := find_chromium()) is None:
        sys.exit("no chromium found; install Debian's package chromium")
    from playwright.sync_api import sync_playwright  # a development extra

    with served("--num-threads", "1") as mixer, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        page = browser.new_page(
            viewport={"width": arguments.width, "height": arguments.height},
            color_scheme="dark" if arguments.dark else "light",
        )
        page.set_default_timeout(120_000)
        page.goto(mixer.address)
        page.locator("#picture img").wait_for()  # it opens playing
        if arguments.gif is not None:
            page.locator("#chains").fill("9")
            page.get_by_role("img", name="9 running chains").wait_for()
        moves = [("glasses", "NOT"), ("beard", "AND"), ("glasses", "AND")] if arguments.gif else []
        frames = film(page, moves, arguments.seconds)
        page.locator("#picture").focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("pushes picture 1,").wait_for()
        page.wait_for_timeout(1000)
        page.locator("#picture").blur()
        page.screenshot(path=str(arguments.out))
        print(arguments.out)
        if arguments.gif is not None:
            save_gif(frames, arguments.gif)
            print(arguments.gif)
        browser.close()


if __name__ == "__main__":
    main()
