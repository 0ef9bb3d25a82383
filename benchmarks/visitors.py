"""Several visitors of the mixer who play the same experts: frames a second for each of them.

Measured without a browser, by what the page's generators give to threads such as the server's; so
the pictures are made, but not sent: python benchmarks/visitors.py
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_results

from composable_ebm.experts.library import Library
from demos.mixer.runs import Runs
from demos.mixer.state import Limits, Request

RATIOS = [f"4*ratio(faces/{name}, faces/{name}[any])" for name in ("smile", "glasses", "curly")]
RECIPE = " + ".join(["faces/base", *RATIOS])
COUNTS = (1, 4, 8)

__all__ = ["measure"]


def measure(counts: Sequence[int], seconds: float, num_chains: int, device: str) -> dict[str, Any]:
    """Frames a second of each of several visitors, of the slowest, and the CPU seconds of a frame.

    Args:
        counts: How many visitors at once.
        seconds: To count frames for.
        num_chains: Of each visitor.
        device: Where the chains run.
    """
    runs = Runs(Library(device), Limits())
    runs.warm_up(RECIPE)
    return {str(count): _played(runs, count, seconds, num_chains) for count in counts}


def _played(runs: Runs, count: int, seconds: float, num_chains: int) -> dict[str, float]:
    times: list[list[float]] = [[] for _ in range(count)]
    names = [f"visitor {i}" for i in range(count)]

    def watch(i: int) -> None:
        for _ in runs.play(Request(RECIPE, num_chains, 80, i), names[i]):
            times[i].append(time.perf_counter())

    threads = [threading.Thread(target=watch, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    while min(map(len, times)) < 12:  # the chains come down from noise
        time.sleep(0.01)
    start, used = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    end, used = time.perf_counter(), time.process_time() - used
    frames = [sum(start < t <= end for t in each) for each in times]
    for name, thread in zip(names, threads, strict=True):
        runs.stop(name)
        thread.join()
    return {
        "frames_per_second": round(sum(frames) / count / (end - start), 2),
        "slowest_visitor": round(min(frames) / (end - start), 2),
        "cpu_seconds_per_frame": round(used / sum(frames), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="visitors at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="to count frames for")
    parser.add_argument("--num-chains", type=int, default=4, help="of each visitor")
    parser.add_argument("--num-threads", type=int, default=None, help="of the processor")
    parser.add_argument("--device", default="cpu", help="where the chains run, such as cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for visitors.json")
    arguments = parser.parse_args()
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    figures = measure(arguments.counts, arguments.seconds, arguments.num_chains, arguments.device)
    for count, each in figures.items():
        print(f"{count:>2} visitors  ", *(f"{name} {value}  " for name, value in each.items()))
    content = {"recipe": RECIPE, "num_chains": arguments.num_chains, "visitors": figures}
    print(write_results("visitors", content, arguments.out))


if __name__ == "__main__":
    main()
