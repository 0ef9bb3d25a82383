"""The mixer as a visitor meets it: how soon the first frame comes, how many follow, and how soon they
follow a slider. Measured in a real browser: python benchmarks/mixer.py. What several visitors at once get
is measured without one, see visitors.py.

Times are taken by a script in the page, from the press of a button or key to the first repaint after
the frame has arrived, so that everything between counts: the request, the chains, the picture, the way
back, the browser. Which recipe a frame was made with is read from its text for screen readers.

The first visitor comes to a server that has only just begun to answer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import visitors
from common import RESULTS, write_results

from demos.mixer.served import CHROMIUM_OPTIONS, find_chromium, served

GOALS = {"first_frame_seconds": 1.0, "frames_per_second": 8.0, "slider_seconds": 0.5}

# Notes when buttons and keys were pressed, and when a frame was first on the screen.
WATCH = """() => {
    const seen = (window.seen = { pressed: [], frames: [] });
    const press = () => seen.pressed.push(performance.now());
    document.addEventListener("click", press, true);
    document.addEventListener("keydown", press, true);
    let last = "";
    new MutationObserver(() => {
        const image = document.querySelector("#picture img");
        if (!image || image.src === last) return;
        last = image.src;
        const alt = image.alt;
        requestAnimationFrame(() => seen.frames.push([performance.now(), alt]));
    }).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ["src"] });
}"""


class Visitor:
    """A browser's page, and what its watching script has seen.

    Args:
        page: A page of playwright.
        address: Where the mixer is.
        server: Its process.
        num_chains: How many chains to play.
        experts: Experts to turn on beside those that are on already.
    """

    def __init__(
        self, page: Any, address: str, server: psutil.Process, num_chains: int, experts: list[str]
    ) -> None:
        self.page, self.server = page, server
        page.set_default_timeout(60_000)
        start = time.perf_counter()
        page.goto(f"{address}?still")  # it would open playing
        page.locator("body[data-ready]").wait_for()
        self.load_seconds = time.perf_counter() - start
        page.evaluate(WATCH)
        for name in experts:
            page.get_by_role("checkbox", name=name).check()
        page.locator("#chains").fill(str(num_chains))

    def play(self) -> float:
        """Seconds from pressing Play to the first frame."""
        self.page.wait_for_function("document.getElementById('stop').disabled")
        pressed = self._after("pressed")
        frames = self._after("frames")
        self._button("Play").click()
        return self._gap(pressed, frames)

    def steer(self, slider: str) -> float:
        """Seconds from a key that moves a slider to the first frame that was made with its weight."""
        handle = self.page.get_by_role("slider", name=slider)
        handle.focus()
        before = self.page.evaluate("window.seen.frames.at(-1)[1]")
        pressed = self._after("pressed")
        frames = self._after("frames")
        self.page.keyboard.press("ArrowLeft")
        return self._gap(pressed, frames, before)

    def rate(self, seconds: float) -> tuple[float, float]:
        """Frames a second while nothing is moved, and the server's CPU seconds for each."""
        first, before = self._after("frames"), self._cpu_seconds()
        self.page.wait_for_timeout(1000 * seconds)
        used = self._cpu_seconds() - before
        times = self.page.evaluate(f"window.seen.frames.slice({first}).map((frame) => frame[0])")
        return 1000 * (len(times) - 1) / (times[-1] - times[0]), used / len(times)

    def stop(self) -> str:
        """Ends the run; what was running."""
        running = self.page.evaluate("window.seen.frames.at(-1)[1]")
        self._button("Stop").click()
        self.page.locator("#caption").get_by_text("stopped at step").wait_for()
        return running

    def _cpu_seconds(self) -> float:
        times = self.server.cpu_times()
        return times.user + times.system

    def _button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def _after(self, what: str) -> int:
        return self.page.evaluate(f"window.seen.{what}.length")

    def _gap(self, pressed: int, frames: int, unlike: str = "") -> float:
        found = f"""() => {{
            const frame = window.seen.frames.slice({frames}).find((frame) => frame[1] !== {unlike!r});
            return frame && frame[0] - window.seen.pressed[{pressed}];
        }}"""
        return self.page.wait_for_function(found, polling=5).json_value() / 1000


def measure(open_page: Callable[[], Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, in seconds but for the rate.

    Args:
        open_page: Opens an empty page.
        arguments: What `main` was told.
    """
    options = ["--device", arguments.device]
    if arguments.num_threads is not None:
        options += ["--num-threads", str(arguments.num_threads)]
    firsts = []
    for _ in range(arguments.servers):
        with served(*options) as mixer:
            server = psutil.Process(mixer.process.pid)
            wanted = (mixer.address, server, arguments.num_chains, arguments.experts)
            visitor = Visitor(open_page(), *wanted)
            firsts.append(visitor.play())
            visitor.stop()
            if len(firsts) < arguments.servers:
                visitor.page.close()
                continue
            loads, plays, rates, moves = [visitor.load_seconds], [], [], []
            for _ in range(arguments.repeats):
                plays.append(visitor.play())
                visitor.page.wait_for_timeout(2000)  # the chains come down from noise
                rates.append(visitor.rate(arguments.seconds))
                for _ in range(2):
                    moves.append(visitor.steer(f"{arguments.slider} weight"))
                    visitor.page.wait_for_timeout(1000)
                running = visitor.stop()
                visitor.page.close()
                visitor = Visitor(open_page(), *wanted)
                loads.append(visitor.load_seconds)
    return {
        "running": running,
        "goals": GOALS,
        "page_load_seconds": _spread(loads),
        "first_visitor_first_frame_seconds": _spread(firsts),
        "first_frame_seconds": _spread(plays),
        "frames_per_second": _spread([rate for rate, _ in rates]),
        "server_cpu_seconds_per_frame": _spread([used for _, used in rates]),
        "slider_seconds": _spread(moves),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 3), "all": [round(value, 3) for value in values]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--experts", nargs="*", default=["curly"], help="to turn on beside the first")
    parser.add_argument("--slider", default="glasses", help="the expert whose weight is moved")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--servers", type=int, default=2, help="fresh ones, each with a first visitor")
    parser.add_argument("--seconds", type=float, default=5.0, help="to count frames for")
    parser.add_argument("--num-threads", type=int, default=None, help="of the server")
    parser.add_argument("--device", default="cpu", help="of the server, such as cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for mixer.json")
    arguments = parser.parse_args()
    if (chromium := find_chromium()) is None:
        print("no chromium found, so nothing is measured; install Debian's package chromium")
        return
    from playwright.sync_api import sync_playwright  # a development extra

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        size = {"width": 1280, "height": 900}
        figures = measure(lambda: browser.new_page(viewport=size, bypass_csp=True), arguments)
        figures = {"chromium": browser.version, "num_chains": arguments.num_chains, **figures}
        browser.close()
    together = visitors.measure(visitors.COUNTS, arguments.seconds, arguments.num_chains, arguments.device)
    path = write_results("mixer", {**figures, "visitors": together}, arguments.out)
    for name in ("page_load", "first_visitor_first_frame", "first_frame", "frames_per", "server", "slider"):
        key = next(key for key in figures if key.startswith(name))
        print(f"{key:>34}  {figures[key]['median']}")
    print(path)


if __name__ == "__main__":
    main()
